"""Ragged rows times expert weights: row blocks of x, grouped by expert, each times its own matrix.

Shapes: `R` rows grouped by expert, `L` local experts, `D` input width, `F` output width.
"""

import torch

from megamf.ops import backend as backends
from megamf.ops.grouped_linear import naive

__all__ = ["grouped_linear"]

IMPLEMENTATIONS = {"torch": frozenset({"cpu", "cuda"}), "naive": frozenset[str]()}


def grouped_linear(
    x_RD: torch.Tensor, w_LDF: torch.Tensor, count_L: torch.Tensor, *, backend: str = "auto"
) -> torch.Tensor:
    """y_RF: the next count_L[e] rows of x_RD times w_LDF[e], for every e in order; differentiable in x and w.

    x_RD, w_LDF: one floating dtype. count_L: int64 [L], sum R; zeros, and R = 0, are fine.
    backend: "torch" is torch's grouped GEMM where it applies (`grouped_gemm_fits`) and the loop of `naive.py`
        elsewhere, a rule logged once a case: the loop makes the same products, one expert at a time. "naive" is the
        loop always. "auto" is "torch": on a CPU the grouped GEMM of torch 2.13 is itself a loop of matrix products
        and takes the time of ours, forward and backward, within the spread of measurement; on a GPU it is one kernel
        without a sync.

    Raises ValueError for shapes or types that do not fit.
    """
    _check(x_RD, w_LDF, count_L)
    name = backends.choose("grouped_linear", backend, x_RD.device, IMPLEMENTATIONS, "torch")
    if name == "torch" and grouped_gemm_fits(x_RD, w_LDF):
        offsets_L = count_L.cumsum(0).to(torch.int32)
        return torch.nn.functional.grouped_mm(x_RD.contiguous(), w_LDF.contiguous(), offs=offsets_L)
    return naive.grouped_linear(x_RD, w_LDF, count_L)


def grouped_gemm_fits(x_RD: torch.Tensor, w_LDF: torch.Tensor) -> bool:
    """Whether torch's grouped GEMM takes these operands, forward and backward.

    It wants float32 (CPU only), bfloat16 or float16, rows of both widths that are multiples of 16 bytes, and at least
    one row (its backward pass fails on none).
    """
    dtypes = {torch.bfloat16, torch.float16} | ({torch.float32} if x_RD.device.type != "cuda" else set())
    aligned = all(width * x_RD.element_size() % 16 == 0 for width in w_LDF.shape[1:])
    if x_RD.dtype not in dtypes or not aligned:
        backends.log_once(
            "grouped_linear",
            f"loop over the experts (torch's grouped GEMM does not take {x_RD.dtype} {tuple(w_LDF.shape[1:])})",
            x_RD.device,
        )
        return False
    return x_RD.shape[0] > 0


def _check(x_RD: torch.Tensor, w_LDF: torch.Tensor, count_L: torch.Tensor) -> None:
    if x_RD.dim() != 2 or w_LDF.dim() != 3 or x_RD.shape[1] != w_LDF.shape[1] or count_L.shape != w_LDF.shape[:1]:
        raise ValueError(
            f"grouped_linear: got x {tuple(x_RD.shape)}, w {tuple(w_LDF.shape)}, count {tuple(count_L.shape)}, "
            "expected [R, D], [L, D, F] and [L]"
        )
    if x_RD.dtype != w_LDF.dtype or count_L.dtype != torch.int64:
        raise ValueError(
            f"grouped_linear: got x {x_RD.dtype}, w {w_LDF.dtype}, count {count_L.dtype}, expected one dtype for x "
            "and w and torch.int64 for count"
        )
    # Reading the counts of a GPU would stop its queue.
    if count_L.device.type == "cpu" and not torch.compiler.is_compiling():
        total, smallest = int(count_L.sum()), int(count_L.min()) if count_L.numel() else 0
        if total != x_RD.shape[0] or smallest < 0:
            raise ValueError(
                f"grouped_linear: the counts sum to {total} (smallest {smallest}), expected the {x_RD.shape[0]} rows "
                "of x"
            )

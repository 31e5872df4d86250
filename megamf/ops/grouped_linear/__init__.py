"""Ragged rows times expert weights: row blocks of x, grouped by expert, each times its own matrix.

Shapes: `R` rows grouped by expert, `L` local experts, `D` input width, `F` output width, `N` tokens, `K` top-k.
"""

import torch
from torch._subclasses.fake_tensor import FakeTensor

from megamf.ops import backend as backends
from megamf.ops.grouped_linear import gemm, naive

HAS_TRITON = not backends.package_problem("triton")
if HAS_TRITON:
    from megamf.ops.grouped_linear import triton

__all__ = ["grouped_linear", "implementation", "routed_linear"]

IMPLEMENTATIONS = {
    "torch": frozenset({"cpu", "cuda"}),
    "triton": backends.TRITON_DEVICES,
    "megablocks": frozenset({"cuda"}),
    "loop": frozenset[str](),
}
ROUTED = {"triton": backends.TRITON_DEVICES, "naive": frozenset[str]()}
DTYPES = {
    "triton": (torch.bfloat16, torch.float16, torch.float32),
    "megablocks": (torch.bfloat16,),
}


def grouped_linear(
    x_RD: torch.Tensor, w_LDF: torch.Tensor, count_L: torch.Tensor, *, backend: str = "auto"
) -> torch.Tensor:
    """y_RF: the next count_L[e] rows of x_RD times w_LDF[e], for every e in order; differentiable in x and w.

    x_RD, w_LDF: one floating dtype. count_L: int64 [L], sum R; zeros, and R = 0, are fine.
    backend: see `implementation`. Only "megablocks" and, on a GPU, "loop" wait for the device.

    Raises ValueError for shapes or types that do not fit, UserError for a backend that cannot run.
    """
    _check(x_RD, w_LDF, count_L)
    name = implementation(x_RD, w_LDF, backend)
    if name == "triton":
        return triton.routed_linear(x_RD, w_LDF, count_L, None, None, 0, 0)
    if name != "loop" and x_RD.shape[0] > 0:
        if name == "megablocks":
            from megamf.ops.grouped_linear import megablocks

            return megablocks.grouped_linear(x_RD, w_LDF, count_L)
        return gemm.grouped_linear(x_RD, w_LDF.contiguous(), count_L)
    return naive.grouped_linear(x_RD, w_LDF, count_L)


def routed_linear(
    x: torch.Tensor,
    w_LDF: torch.Tensor,
    count_L: torch.Tensor,
    order_R: torch.Tensor,
    *,
    in_fan: int,
    out_fan: int,
    gate_NK: torch.Tensor | None = None,
    backend: str = "triton",
) -> torch.Tensor:
    """`permute`, `grouped_linear` and `unpermute` in one: tokens are gathered and scattered inside the product.

    A fan names the layout of a side: 0, one line for each of the R rows in expert order; 1, one line a copy n*K+k;
    K, one line a token. x has the layout of in_fan, the result that of out_fan: with out_fan K the copies of a token
    are added up, each times its gate where gate_NK (float32 [N, K]) is given. Nothing is kept for the backward pass
    but the arguments: neither the gathered rows nor the products.

    order_R: int64, order_R[r] = n*K+k of row r (from `sort_by_expert`). Differentiable in x, w and gate; deterministic.
    backend: "triton", or "naive", the specification.

    Raises ValueError for shapes or types that do not fit, UserError for a backend that cannot run.
    """
    R = order_R.shape[0]
    fits = x.dim() == 2 and w_LDF.dim() == 3 and x.shape[1] == w_LDF.shape[1] and count_L.shape == w_LDF.shape[:1]
    if not fits or x.shape[0] * max(in_fan, 1) != R or R % max(out_fan, 1):
        raise ValueError(
            f"routed_linear: got x {tuple(x.shape)}, w {tuple(w_LDF.shape)}, count {tuple(count_L.shape)}, order "
            f"{tuple(order_R.shape)}, in_fan {in_fan}, out_fan {out_fan}, expected [R / in_fan, D], [L, D, F], [L] "
            "and [R]"
        )
    if gate_NK is not None and (gate_NK.numel() != R or gate_NK.shape[-1] != out_fan):
        raise ValueError(f"routed_linear: got gates {tuple(gate_NK.shape)}, expected [{R} / out_fan, {out_fan}]")
    name = backends.choose("routed_linear", backend, x.device, ROUTED, "triton")
    if name == "naive":
        return naive.routed_linear(x, w_LDF, count_L, order_R, in_fan, out_fan, gate_NK)
    _check_dtype(name, x, w_LDF)
    return triton.routed_linear(x, w_LDF, count_L, order_R, gate_NK, in_fan, out_fan)


def implementation(x: torch.Tensor, w_LDF: torch.Tensor, backend: str = "auto") -> str:
    """The name of what `grouped_linear` runs for these operands.

    "torch" is torch's grouped GEMM where it applies (`grouped_gemm_fits`) and the loop of `naive.py` elsewhere, a rule
    logged once a case: the loop makes the same products, one expert at a time. "triton" takes bfloat16, float16 and
    float32, "megablocks" bfloat16; other types are an error there. "loop" is the loop always. "auto" is "torch", but on
    a GPU "triton" takes the operands that torch's grouped GEMM does not (float32, odd widths), where it can. On a CPU
    it is a set of matrix products that the threads share out (`gemm.py`); on a GPU it is one kernel without a sync.
    """
    name = backends.choose("grouped_linear", backend, x.device, IMPLEMENTATIONS, "torch")
    if name in ("triton", "megablocks"):
        _check_dtype(name, x, w_LDF)
        return name
    if name == "loop" or grouped_gemm_fits(x, w_LDF):
        return name
    if backend == "auto" and x.device.type == "cuda" and x.dtype in DTYPES["triton"] and HAS_TRITON:
        backends.log_once("grouped_linear", f"triton for {x.dtype} {tuple(w_LDF.shape[1:])}", x.device)
        return "triton"
    backends.log_once(
        "grouped_linear",
        f"loop over the experts (torch's grouped GEMM does not take {x.dtype} {tuple(w_LDF.shape[1:])})",
        x.device,
    )
    return "loop"


def grouped_gemm_fits(x: torch.Tensor, w_LDF: torch.Tensor) -> bool:
    """Whether torch's grouped GEMM takes these operands, forward and backward.

    It wants float32 (CPU only), bfloat16 or float16, and rows of both widths that are multiples of 16 bytes. (No rows
    at all go to the loop without a word: its backward pass fails on none.)
    """
    dtypes = {torch.bfloat16, torch.float16} | ({torch.float32} if x.device.type != "cuda" else set())
    return x.dtype in dtypes and all(width * x.element_size() % 16 == 0 for width in w_LDF.shape[1:])


def _check_dtype(name: str, x: torch.Tensor, w_LDF: torch.Tensor) -> None:
    dtypes = DTYPES[name]
    if x.dtype not in dtypes or w_LDF.dtype != x.dtype:
        raise ValueError(
            f"grouped_linear: backend {name!r} got x {x.dtype} and w {w_LDF.dtype}, expected one of "
            f"{', '.join(map(str, dtypes))} for both"
        )


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
    # Reading the counts of a GPU would stop its queue; fake ones have no values.
    if count_L.device.type == "cpu" and not torch.compiler.is_compiling() and not isinstance(count_L, FakeTensor):
        total, smallest = int(count_L.sum()), int(count_L.min()) if count_L.numel() else 0
        if total != x_RD.shape[0] or smallest < 0:
            raise ValueError(
                f"grouped_linear: the counts sum to {total} (smallest {smallest}), expected the {x_RD.shape[0]} rows "
                "of x"
            )

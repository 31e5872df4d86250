"""Routed copies grouped by expert and put back: sort, gather, weighted combination. `naive.py` is the specification.

Shapes: `N` tokens, `K` top-k, `R` = N*K routed copies, `D` width, `E` experts.
"""

from typing import NamedTuple

import torch

from megamf.ops import backend as backends
from megamf.ops.permutation import naive

if backends.has_extension():
    from megamf.ops.permutation import csrc

__all__ = ["Sorted", "permute", "sort_by_expert", "unpermute"]

# `csrc` and `cuda` are the same operations; torch chooses by the device of the tensors.
IMPLEMENTATIONS = {"csrc": frozenset({"cpu"}), "cuda": frozenset({"cuda"}), "naive": frozenset[str]()}


class Sorted(NamedTuple):
    """int64 tensors: order_R[r] = n*K+k of the r-th row in expert order; inverse_R[order_R[r]] = r; rows an expert."""

    order_R: torch.Tensor
    inverse_R: torch.Tensor
    count_E: torch.Tensor


def sort_by_expert(expert_NK: torch.Tensor, num_experts: int, *, backend: str = "auto") -> Sorted:
    """Stable order of the copies n*K+k by expert. expert_NK: int64 in 0..num_experts-1.

    Raises ValueError for another dtype or shape, IndexError (csrc) for an expert out of range. On a GPU nothing waits
    for the kernels: an index out of range ends them there (as torch's own do), and the next synchronisation raises.
    """
    if expert_NK.dim() != 2 or expert_NK.dtype != torch.int64:
        raise ValueError(f"sort_by_expert: got {expert_NK.dtype} {tuple(expert_NK.shape)}, expected int64 [N, K]")
    name = backends.choose(
        "sort_by_expert", backend, expert_NK.device, IMPLEMENTATIONS, backends.compiled(expert_NK.device)
    )
    sort = naive.sort_by_expert if name == "naive" else csrc.sort_by_expert
    return Sorted(*sort(expert_NK, num_experts))


def permute(
    x_ND: torch.Tensor, order_R: torch.Tensor, inverse_R: torch.Tensor, top_k: int, *, backend: str = "auto"
) -> torch.Tensor:
    """x_RD[r] = x_ND[order_R[r] // top_k]; the gradient sums the copies of a token in float32 (float64 for float64).

    Raises ValueError when the shapes do not fit, IndexError (csrc) for an index out of range.
    """
    if x_ND.dim() != 2 or not order_R.shape == inverse_R.shape == (x_ND.shape[0] * top_k,):
        raise ValueError(
            f"permute: got x {tuple(x_ND.shape)}, order {tuple(order_R.shape)}, inverse {tuple(inverse_R.shape)}, "
            f"top_k {top_k}, expected [N, D] and twice [N * top_k]"
        )
    name = backends.choose("permute", backend, x_ND.device, IMPLEMENTATIONS, backends.compiled(x_ND.device))
    return naive.permute(x_ND, order_R, top_k) if name == "naive" else csrc.permute(x_ND, order_R, inverse_R, top_k)


def unpermute(
    y_RD: torch.Tensor, order_R: torch.Tensor, inverse_R: torch.Tensor, gate_NK: torch.Tensor, *, backend: str = "auto"
) -> torch.Tensor:
    """y_ND[n] = sum over k of gate_NK[n, k] * y_RD[inverse_R[n*K+k]], in float32 (float64 for float64), of y's dtype.

    gate_NK may have another floating dtype than y. Differentiable in y and gate.
    Raises ValueError when the shapes do not fit, IndexError (csrc) for an index out of range.
    """
    R = y_RD.shape[0]
    if y_RD.dim() != 2 or gate_NK.dim() != 2 or gate_NK.numel() != R or not order_R.shape == inverse_R.shape == (R,):
        raise ValueError(
            f"unpermute: got y {tuple(y_RD.shape)}, order {tuple(order_R.shape)}, inverse {tuple(inverse_R.shape)}, "
            f"gate {tuple(gate_NK.shape)}, expected [R, D], twice [R], and [N, K] with N*K = R"
        )
    name = backends.choose("unpermute", backend, y_RD.device, IMPLEMENTATIONS, backends.compiled(y_RD.device))
    if name == "naive":
        return naive.unpermute(y_RD, inverse_R, gate_NK)
    return csrc.unpermute(y_RD, order_R, inverse_R, gate_NK, gate_NK.shape[1])

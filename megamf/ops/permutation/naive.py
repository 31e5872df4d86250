"""Rows grouped by expert, the specification: plain torch, any dtype, autograd by torch.

Shapes: `N` tokens, `K` top-k, `R` = N*K routed copies, `D` width, `E` experts.
"""

import torch


def sort_by_expert(expert_NK: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(order_R, inverse_R, count_E): the stable order of the copies n*K+k by expert, its inverse, rows an expert."""
    flat_R = expert_NK.flatten()
    order_R = flat_R.argsort(stable=True)
    return order_R, order_R.argsort(), torch.bincount(flat_R, minlength=num_experts)


def permute(x_ND: torch.Tensor, order_R: torch.Tensor, top_k: int) -> torch.Tensor:
    """x_RD[r] = x_ND[token of copy order_R[r]]."""
    return x_ND[order_R // top_k]


def unpermute(y_RD: torch.Tensor, inverse_R: torch.Tensor, gate_NK: torch.Tensor) -> torch.Tensor:
    """y_ND[n] = sum over k of gate[n, k] * y_RD[row of copy n*K+k], summed in float32 (float64 for float64)."""
    N, K = gate_NK.shape
    wide = torch.promote_types(y_RD.dtype, torch.float32)
    y_NKD = y_RD[inverse_R].view(N, K, y_RD.shape[1]).to(wide)
    return (gate_NK.to(wide)[..., None] * y_NKD).sum(1).to(y_RD.dtype)

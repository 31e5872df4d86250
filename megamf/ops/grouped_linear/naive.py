"""Each expert's rows times its own matrix, the specification: a loop. Any dtype, autograd by torch.

Shapes: `R` rows grouped by expert, `L` local experts, `D` input width, `F` output width, `N` tokens, `K` top-k.
"""

import torch


def grouped_linear(x_RD: torch.Tensor, w_LDF: torch.Tensor, count_L: torch.Tensor) -> torch.Tensor:
    """y_RF: the next count_L[e] rows of x times w_LDF[e], for every expert e in order."""
    parts = x_RD.split(count_L.tolist())
    return torch.cat([x @ w_DF for x, w_DF in zip(parts, w_LDF.unbind(), strict=True)])


def routed_linear(
    x: torch.Tensor,
    w_LDF: torch.Tensor,
    count_L: torch.Tensor,
    order_R: torch.Tensor,
    in_fan: int,
    out_fan: int,
    gate_NK: torch.Tensor | None,
) -> torch.Tensor:
    """Gather, `grouped_linear`, gates, scatter, sum of each token's copies in float32 (float64 for float64)."""
    x_RD = x[order_R // in_fan] if in_fan else x
    y_RF = grouped_linear(x_RD, w_LDF, count_L)
    if not out_fan:
        return y_RF
    y_NKF = y_RF[order_R.argsort()].view(-1, out_fan, w_LDF.shape[2])
    wide = y_NKF.to(torch.promote_types(y_RF.dtype, torch.float32))
    if gate_NK is not None:
        wide = wide * gate_NK.view(-1, out_fan, 1).to(wide.dtype)
    return wide.sum(1).to(y_RF.dtype)

"""A feed-forward layer in parts by the operations of mixtures of experts: permute, grouped products, unpermute.

Shapes: `N` tokens, `D` input width, `E` experts, `F` neurons of one expert, `K` chosen experts, `O` output width,
`R` = N*K rows in expert order.
"""

import torch

from megamf.ops.expert_ffn.naive import ACTIVATIONS
from megamf.ops.grouped_linear import grouped_linear
from megamf.ops.permutation import permute, sort_by_expert, unpermute


def expert_ffn(
    x_ND: torch.Tensor,
    expert_NK: torch.Tensor,
    gate_EDF: torch.Tensor,
    up_EDF: torch.Tensor | None,
    out_EFO: torch.Tensor,
    gate_bias_EF: torch.Tensor | None,
    up_bias_EF: torch.Tensor | None,
    out_bias_O: torch.Tensor | None,
    weight_NK: torch.Tensor | None,
    activation: str,
) -> torch.Tensor:
    """y_NO, differentiable in everything but expert_NK; see `megamf.ops.expert_ffn.expert_ffn`."""
    order_R, inverse_R, count_E = sort_by_expert(expert_NK, len(gate_EDF))
    x_RD = permute(x_ND, order_R, inverse_R, expert_NK.shape[1])
    expert_R = expert_NK.flatten()[order_R]
    h_RF = grouped_linear(x_RD, gate_EDF, count_E)
    h_RF = ACTIVATIONS[activation](h_RF if gate_bias_EF is None else h_RF + gate_bias_EF[expert_R])
    if up_EDF is not None:
        u_RF = grouped_linear(x_RD, up_EDF, count_E)
        h_RF = h_RF * (u_RF if up_bias_EF is None else u_RF + up_bias_EF[expert_R])
    weight_NK = torch.ones_like(expert_NK, dtype=torch.float32) if weight_NK is None else weight_NK
    y_NO = unpermute(grouped_linear(h_RF, out_EFO, count_E), order_R, inverse_R, weight_NK)
    return y_NO if out_bias_O is None else y_NO + out_bias_O

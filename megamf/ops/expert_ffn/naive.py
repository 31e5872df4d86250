"""A feed-forward layer in parts, the specification: all neurons are computed, those of other experts set to zero.

Shapes: `N` tokens, `D` input width, `E` experts, `F` neurons of one expert, `K` chosen experts, `O` output width.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "relu2": lambda x: F.relu(x).square(),
}


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
    """y_NO; see `megamf.ops.expert_ffn.expert_ffn`."""
    h_NEF = torch.einsum("nd,edf->nef", x_ND, gate_EDF)
    h_NEF = ACTIVATIONS[activation](h_NEF if gate_bias_EF is None else h_NEF + gate_bias_EF)
    if up_EDF is not None:
        u_NEF = torch.einsum("nd,edf->nef", x_ND, up_EDF)
        h_NEF = h_NEF * (u_NEF if up_bias_EF is None else u_NEF + up_bias_EF)
    weight_NK = torch.ones_like(expert_NK, dtype=x_ND.dtype) if weight_NK is None else weight_NK
    share_NE = x_ND.new_zeros(len(x_ND), len(gate_EDF)).scatter_add(1, expert_NK, weight_NK)
    y_NO = torch.einsum("nef,ne,efo->no", h_NEF, share_NE, out_EFO)
    return y_NO if out_bias_O is None else y_NO + out_bias_O

"""Sparse layers on megamf's own operations, and how long they take beside dense ones.

Shapes: N tokens, D input width, K chosen experts, O output width.
"""

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from megamf.compress.moefication.convert import sparse_layers
from megamf.compress.moefication.portable.sparse_ffn import SparseFfn
from megamf.ops.expert_ffn import ACTIVATIONS, expert_ffn


def accelerate(model: nn.Module, backend: str = "auto") -> nn.Module:
    """Let every sparse layer of a model compute its chosen experts by `megamf.ops.expert_ffn`; returns the model."""

    def kernel(
        layer: SparseFfn, x_ND: torch.Tensor, expert_NK: torch.Tensor, weight_NK: torch.Tensor | None
    ) -> torch.Tensor:
        return expert_ffn(
            x_ND,
            expert_NK,
            layer.gate_EDF,
            layer.out_EFO,
            up_EDF=layer.up_EDF,
            gate_bias_EF=layer.gate_bias_EF,
            up_bias_EF=layer.up_bias_EF,
            out_bias_O=layer.out_bias_O,
            weight_NK=None if weight_NK is None else weight_NK.to(x_ND.dtype),
            activation=layer.activation_name,
            backend=backend,
        )

    for layer in sparse_layers(model):
        layer.kernel = kernel
    return model


def seconds(function: Callable[[], object], repeats: int, budget: float = 3.0) -> float:
    """The median time of a call, of `repeats` calls after one that warms up, or of as many as fit the budget (s)."""
    function()
    taken: list[float] = []
    while len(taken) < repeats and (sum(taken) < budget or len(taken) < 3):
        began = time.perf_counter()
        function()
        taken.append(time.perf_counter() - began)
    return sorted(taken)[len(taken) // 2]


@torch.no_grad()
def ffn_times(
    width: int,
    hidden: int,
    *,
    gated: bool,
    activation: str,
    share: float = 0.25,
    expert_size: int = 32,
    tokens: tuple[int, ...] = (1, 16, 256, 2048),
    repeats: int = 50,
) -> list[dict[str, float]]:
    """Milliseconds of one feed-forward layer of random float32 weights, for batches of so many tokens.

    dense: torch's linear maps. sparse: the whole layer with its MLP router. kernel: the chosen experts alone. grouped:
    the same by permute and grouped products. all: every expert by the kernel, which tells what of its gain is the
    kernel's, not the experts left out.
    """
    experts = hidden // expert_size
    layer = SparseFfn((experts, width, expert_size, width), round(share * experts), "mlp", activation, up=gated)
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    accelerate(layer)
    up = layer.up_EDF
    gate_FD, up_FD = (
        None if w is None else w.permute(0, 2, 1).reshape(hidden, width).contiguous() for w in (layer.gate_EDF, up)
    )
    out_DF = layer.out_EFO.reshape(hidden, width).t().contiguous()
    act = ACTIVATIONS[activation]

    def dense(x_ND: torch.Tensor) -> torch.Tensor:
        h_NF = act(F.linear(x_ND, gate_FD))
        return F.linear(h_NF if up_FD is None else h_NF * F.linear(x_ND, up_FD), out_DF)

    rows = []
    for count in tokens:
        x_ND = torch.randn(count, width, generator=generator)
        expert_NK, _ = layer.choose(layer.scores(x_ND))
        given = (x_ND, expert_NK, layer.gate_EDF, layer.out_EFO)
        every = (x_ND, torch.arange(experts).expand(count, -1).contiguous(), layer.gate_EDF, layer.out_EFO)
        times = {
            "dense": seconds(lambda x=x_ND: dense(x), repeats),
            "sparse": seconds(lambda x=x_ND: layer(x), repeats),
            "kernel": seconds(lambda g=given: expert_ffn(*g, up_EDF=up, activation=activation), repeats),
            "all": seconds(lambda g=every: expert_ffn(*g, up_EDF=up, activation=activation), repeats),
            "grouped": seconds(
                lambda g=given: expert_ffn(*g, up_EDF=up, activation=activation, backend="grouped"), repeats
            ),
        }
        rows.append({"tokens": count} | {name: 1000 * value for name, value in times.items()})
    return rows

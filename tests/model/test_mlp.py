"""Feed-forward layers against loops over tokens and experts."""

import math

import pytest
import torch

from megamf.model.dispatch import LocalDispatcher
from megamf.model.mlp import DenseMlp, ExpertMlp

ACTIVATION = {
    "gelu_new": lambda v: 0.5 * v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))),
    "gelu": lambda v: 0.5 * v * (1 + math.erf(v / math.sqrt(2))),
    "relu": lambda v: max(v, 0.0),
    "silu": lambda v: v / (1 + math.exp(-v)),
}


def fill(layer):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return layer.double()


@pytest.mark.parametrize("activation", list(ACTIVATION))
def test_expert_mlp(make_config, activation):
    config = make_config(activation_function=activation)
    layer = fill(ExpertMlp(config, LocalDispatcher()))
    x_BTD = torch.randn(2, 3, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = torch.zeros_like(x_BTD)
    for b in range(2):
        for t in range(3):
            x = x_BTD[b, t]
            p = layer.gate.logits(x[None])[0].softmax(-1)
            for e in p.topk(config.k_mlp).indices.tolist():
                h = (x @ layer.experts.weight[e]).detach().clone().apply_(ACTIVATION[activation])
                expected[b, t] += p[e] * (h @ layer.output_experts.weight[e])
    assert torch.allclose(layer(x_BTD)[0], expected, rtol=1e-11, atol=1e-12)


def test_dense_mlp(make_config):
    layer = fill(DenseMlp(make_config(kind="dense")))
    x_BTD = torch.randn(2, 3, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    h = (x_BTD @ layer.fc1.weight.T).detach().apply_(ACTIVATION["gelu_new"])
    found, stats = layer(x_BTD)
    assert stats is None and torch.allclose(found, h @ layer.fc2.weight.T, rtol=1e-11, atol=1e-12)

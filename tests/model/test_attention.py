"""Attention layers against loops over queries, keys, heads and experts."""

import math

import pytest
import torch

from megamf.model.attention import DenseAttention, ExpertAttention
from megamf.model.dispatch import LocalDispatcher


def stick_breaking(query, keys, values):
    """One query that sees keys 0..i, itself the last: plain float64 arithmetic."""
    left, total = 1.0, torch.zeros_like(values[0])
    for key, value in zip(reversed(keys), reversed(values)):
        share = 1 / (1 + math.exp(-(query @ key).item() / math.sqrt(len(query))))
        total = total + left * share * value
        left *= 1 - share
    return total


def fill(layer):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return layer.double()


@pytest.mark.parametrize("changes", [{}, {"n_head": 1, "att_hidden": 16}, {"k_att": 4}], ids=str)
def test_expert_attention(make_config, changes):
    config = make_config(**changes)
    layer = fill(ExpertAttention(config, LocalDispatcher()))
    x_BTD = torch.randn(2, 5, config.n_embd, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    G, C = config.n_head, config.head_dim
    weights = layer.q_proj
    expected = torch.zeros_like(x_BTD)
    for b in range(2):
        x_TD = x_BTD[b]
        key = x_TD if layer.k_proj is None else x_TD @ layer.k_proj.weight.T + layer.k_proj.bias
        value = x_TD if layer.v_proj is None else x_TD @ layer.v_proj.weight.T + layer.v_proj.bias
        for t in range(5):
            p = weights.gate.logits(x_TD[t : t + 1])[0].softmax(-1)
            for e in p.argsort(descending=True)[: config.k_att].tolist():
                q_A = x_TD[t] @ weights.experts.weight[e]
                heads = [
                    stick_breaking(
                        q_A[g * C : (g + 1) * C],
                        list(key[: t + 1, g * C : (g + 1) * C]),
                        list(value[: t + 1, g * C : (g + 1) * C]),
                    )
                    for g in range(G)
                ]
                expected[b, t] += p[e] * (torch.cat(heads) @ weights.output_experts.weight[e])
    found, stats = layer(x_BTD)
    assert torch.allclose(found, expected, rtol=1e-11, atol=1e-12)
    assert stats.count_E.sum() == 10 * config.k_att


def test_dense_attention(make_config):
    config = make_config(kind="dense")
    layer = fill(DenseAttention(config))
    x_TD = torch.randn(4, config.n_embd, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    C = config.head_dim
    q = x_TD @ layer.q_proj.weight.T
    k = x_TD @ layer.k_proj.weight.T + layer.k_proj.bias
    v = x_TD @ layer.v_proj.weight.T + layer.v_proj.bias
    rows = []
    for t in range(4):
        heads = [slice(g * C, (g + 1) * C) for g in range(config.n_head)]
        rows.append(torch.cat([stick_breaking(q[t, h], list(k[: t + 1, h]), list(v[: t + 1, h])) for h in heads]))
    expected = torch.stack(rows) @ layer.o_proj.weight.T
    found, stats = layer(x_TD[None])
    assert stats is None
    assert torch.allclose(found[0], expected, rtol=1e-11, atol=1e-12)

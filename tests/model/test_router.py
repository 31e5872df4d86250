"""Routers against their formulas; drawn experts; statistics; precision."""

import math

import pytest
import torch

from megamf.model.router import Router


def make_router(make_config, **changes):
    router = Router(make_config(**changes), 5, 3)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.copy_(0.7 * torch.randn(parameter.shape, generator=generator))
    return router.double()


def inputs(count=7):
    return torch.randn(count, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def test_mlp_logits(make_config):
    router = make_router(make_config, gate_type="mlp")
    x_ND = inputs()
    h = x_ND @ router.w_gate[0].weight.T + router.w_gate[0].bias
    h = h * 0.5 * (1 + torch.erf(h / math.sqrt(2)))
    assert torch.allclose(router.logits(x_ND), h @ router.w_gate[3].weight.T, rtol=1e-13)


def test_linear_logits(make_config):
    router = make_router(make_config, gate_type="linear")
    assert torch.allclose(router.logits(inputs()), inputs() @ router.w_gate[0].weight.T, rtol=1e-13)


def test_gmm_logits(make_config):
    router = make_router(make_config, gate_type="gmm")
    h = inputs() @ router.w_gate.weight.T
    c = router.expert_centroids
    cosine = (h @ c.T) / (h.norm(dim=1)[:, None] * c.norm(dim=1)[None])
    assert torch.allclose(router.logits(inputs()), math.exp(router.temperature.item()) * cosine, rtol=1e-12)


def test_tanh_gate(make_config):
    router = make_router(make_config, gate_type="tanh")
    first, last = router.w_gate[0].weight, router.w_gate[2].weight
    for x, found in zip(inputs(), router.logits(inputs())):
        assert torch.allclose(found, last @ torch.tanh(first @ (x / x.norm())), rtol=1e-12)


@pytest.mark.parametrize("gate_type", ["mlp", "linear", "gmm", "tanh"])
def test_routing_and_statistics(make_config, gate_type):
    router = make_router(make_config, gate_type=gate_type).eval()
    x_ND = inputs()
    logits = router.logits(x_ND)
    p = logits.exp() / logits.exp().sum(1, keepdim=True)
    routing = router(x_ND)
    for n in range(7):
        chosen = sorted(range(5), key=lambda e: -p[n, e].item())[:3]
        assert routing.expert_NK[n].tolist() == chosen
        # The gates are raw probabilities, which do not add up to one; those of parts of a sum are 1 each.
        gates = torch.ones(3, dtype=torch.float64) if gate_type == "tanh" else p[n, chosen]
        assert torch.allclose(routing.gate_NK[n], gates, rtol=1e-12)
    stats = routing.stats
    assert torch.allclose(stats.prob_E, p.sum(0))
    assert torch.allclose(stats.entropy, -(p * p.log()).sum())
    assert torch.allclose(stats.logsumexp2, logits.exp().sum(1).log().square().sum())
    assert stats.count_E.tolist() == [(routing.expert_NK == e).sum() for e in range(5)]
    assert stats.tokens == 7
    assert router.expert_rows().shape[0] == 5


def test_drawn_experts(make_config):
    router = make_router(make_config, sample_topk=2)
    x_ND = inputs(1).expand(4000, 16)
    p = router.logits(x_ND[:1])[0].softmax(-1)
    torch.manual_seed(0)
    routing = router.train()(x_ND)
    assert (routing.expert_NK[:, 0] == p.argmax()).all()
    assert all(len(set(row)) == 3 for row in routing.expert_NK.tolist())
    assert torch.allclose(routing.gate_NK, p[routing.expert_NK], rtol=1e-12)
    # The first draw follows the probabilities of the experts that are left.
    rest = p.clone()
    rest[p.argmax()] = 0
    frequency = torch.bincount(routing.expert_NK[:, 1], minlength=5) / 4000
    assert torch.allclose(frequency, (rest / rest.sum()).float(), atol=0.03)
    assert torch.equal(router.eval()(x_ND[:1]).expert_NK[0], p.topk(3).indices)


@pytest.mark.parametrize("drawn", [0, 1, 3])
def test_no_tokens(make_config, drawn):
    routing = make_router(make_config, sample_topk=min(drawn, 2), k_att=2).train()(inputs(0))
    assert routing.expert_NK.shape == (0, 3) and routing.stats.count_E.tolist() == [0] * 5


@pytest.mark.parametrize("gate_type", ["mlp", "linear", "gmm", "tanh"])
def test_low_precision_models_route_in_float32(make_config, gate_type):
    router = make_router(make_config, gate_type=gate_type).bfloat16().eval()
    routing = router(inputs().bfloat16())
    assert routing.gate_NK.dtype == torch.float32
    # Probabilities that were rounded to bfloat16 would not add up to one this closely.
    assert abs(routing.stats.prob_E.sum().item() - 7) < 1e-5

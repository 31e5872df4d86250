"""Losses against their formulas, and the property that shares of a batch add up to the gradient on the whole."""

import math

import pytest
import torch
import torch.nn.functional as F

from megamf.config.run import Losses
from megamf.model.losses import auxiliary_loss, balance_terms, cross_entropy_sum, pack, routing_norm
from megamf.model.router import RouterStats


def stats_of(logits_NE, top_k=2):
    p = logits_NE.softmax(-1)
    chosen = p.topk(top_k).indices.flatten()
    return RouterStats(
        prob_E=p.sum(0),
        entropy=-(p * p.log()).sum(),
        logsumexp2=logits_NE.logsumexp(-1).square().sum(),
        count_E=torch.bincount(chosen, minlength=p.shape[1]).to(p.dtype),
        tokens=torch.tensor(float(p.shape[0]), dtype=p.dtype),
    )


def logits(count, experts, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, experts, dtype=torch.float64, generator=generator, requires_grad=True)


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_cross_entropy_in_chunks(chunk):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    weight = torch.randn(9, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    label = torch.tensor([1, -100, 8, 0, -100, 3, 3])
    expected = F.cross_entropy(hidden @ weight.T, label, ignore_index=-100, reduction="sum")
    expected_gradients = torch.autograd.grad(expected, [hidden, weight])
    found = cross_entropy_sum(hidden, weight, label, chunk)
    assert torch.allclose(found, expected, rtol=1e-13)
    for one, two in zip(torch.autograd.grad(found, [hidden, weight]), expected_gradients):
        assert torch.allclose(one, two, rtol=1e-12, atol=1e-14)
    with torch.no_grad():
        assert torch.allclose(cross_entropy_sum(hidden, weight, label, chunk), expected, rtol=1e-13)


def test_cross_entropy_without_labels_is_zero():
    found = cross_entropy_sum(torch.randn(3, 4), torch.randn(9, 4), torch.full((3,), -100), 2)
    assert found.item() == 0.0


def test_terms_against_formulas():
    routers = [logits(6, 4), logits(6, 3, seed=1)]
    terms = balance_terms(*[pack([stats_of(router) for router in routers])] * 2)
    mi = switch = z = marginal = 0.0
    for router in routers:
        p = router.softmax(-1)
        mean = p.mean(0)
        entropy = -sum(m * math.log(m + 1e-8) for m in mean.tolist())
        conditional = -(p * p.log()).sum().item() / 6
        count = torch.bincount(p.topk(2).indices.flatten(), minlength=p.shape[1]).double() / 12
        squared = sum(math.log(sum(math.exp(v) for v in row)) ** 2 for row in router.tolist()) / 6
        mi += conditional - entropy
        marginal += entropy
        z += squared
        switch += p.shape[1] * sum(a * b for a, b in zip(mean.tolist(), count.tolist())) + 0.1 * squared
    for name, expected in {"mi": mi, "switch": switch, "z": z, "concentration": marginal}.items():
        assert math.isclose(terms[name].item(), expected, rel_tol=1e-12), name


def test_mutual_information_bounds():
    one_hot = torch.full((8, 4), -200.0, dtype=torch.float64)
    one_hot[torch.arange(8), torch.arange(8) % 4] = 200.0
    sharp = RouterStats(
        prob_E=one_hot.softmax(-1).sum(0),
        entropy=torch.zeros((), dtype=torch.float64),
        logsumexp2=torch.zeros((), dtype=torch.float64),
        count_E=torch.full((4,), 2.0, dtype=torch.float64),
        tokens=torch.tensor(8.0, dtype=torch.float64),
    )
    flat = stats_of(torch.zeros(8, 4, dtype=torch.float64))
    for stats, expected in ((sharp, -math.log(4)), (flat, 0.0)):
        sums = pack([stats])
        assert balance_terms(sums, sums)["mi"].item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", ["mi", "switch", "z", "concentration"])
def test_shares_add_up_to_the_whole_gradient(name):
    whole = logits(10, 5)
    sums = pack([stats_of(whole)])
    term = balance_terms(sums, sums)[name]
    (expected,) = torch.autograd.grad(term, whole)
    parts = [whole[:3], whole[3:4], whole[4:]]
    packed = [pack([stats_of(part)]) for part in parts]
    scope = packed[0].with_flat(sum(part.flat() for part in packed))
    values, total = [], 0.0
    for part in packed:
        value = balance_terms(part, scope)[name]
        values.append(value.item())
        total = total + value
    assert values == pytest.approx([term.item()] * 3, rel=1e-12)
    assert torch.allclose(torch.autograd.grad(total, whole)[0], expected, rtol=1e-10, atol=1e-15)


def test_padding_of_small_routers_changes_nothing():
    small, large = stats_of(logits(6, 2)), stats_of(logits(6, 7, seed=1))
    together = pack([small, large])
    apart = [pack([small]), pack([large])]
    terms = balance_terms(together, together)
    for name, value in terms.items():
        expected = sum(balance_terms(one, one)[name] for one in apart)
        assert torch.allclose(value, expected, rtol=1e-12), name


def test_flat_and_back():
    sums = pack([stats_of(logits(6, 4)), stats_of(logits(6, 3, seed=1))])
    back = sums.with_flat(sums.flat())
    for name in ("prob_ME", "count_ME", "entropy_M", "logsumexp2_M", "tokens"):
        assert torch.equal(getattr(back, name), getattr(sums, name).detach())


def test_weights_of_the_auxiliary_loss():
    sums = pack([stats_of(logits(6, 4))])
    terms = {name: value.item() for name, value in balance_terms(sums, sums).items()}
    cases = [
        (Losses(balance="mi", balance_weight=0.5), 0.5 * terms["mi"]),
        (Losses(balance="switch", balance_weight=2.0, z_weight=0.1), 2 * terms["switch"] + 0.1 * terms["z"]),
        (Losses(balance="none", concentration=0.3), 0.3 * terms["concentration"]),
    ]
    for weights, expected in cases:
        assert auxiliary_loss(sums, sums, weights).item() == pytest.approx(expected, rel=1e-12)


def test_routing_norm():
    matrices = [torch.full((2, 3), 2.0), torch.ones(4, dtype=torch.bfloat16)]
    assert routing_norm(matrices).item() == 6 * 4 + 4

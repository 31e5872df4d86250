"""The routing decision against sums over tokens written out, its gradients, and what is refused."""

import math

import pytest
import torch

from megamf.errors import UserError
from megamf.ops.router import route, route_by_logits


def tensors(N=6, G=5, E=4):
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(N, G, dtype=torch.float64, generator=generator)
    return h.requires_grad_(), torch.randn(E, G, dtype=torch.float64, generator=generator).requires_grad_()


def test_against_loops():
    h, a = tensors()
    found = route(h, a, 2)
    prob, entropy, lse2, count = [0.0] * 4, 0.0, 0.0, [0] * 4
    for n, row in enumerate((h @ a.T).tolist()):
        total = sum(math.exp(v) for v in row)
        p = [math.exp(v) / total for v in row]
        chosen = sorted(range(4), key=lambda e: -p[e])[:2]
        assert found.expert_NK[n].tolist() == chosen
        assert found.gate_NK[n].tolist() == pytest.approx([p[e] for e in chosen])
        prob = [a + b for a, b in zip(prob, p)]
        entropy -= sum(v * math.log(v) for v in p)
        lse2 += math.log(total) ** 2
        for e in chosen:
            count[e] += 1
    assert found.prob_E.tolist() == pytest.approx(prob) and found.count_E.tolist() == count
    assert (found.entropy.item(), found.logsumexp2.item()) == pytest.approx((entropy, lse2))


def test_gradients():
    assert torch.autograd.gradcheck(lambda h, a: route(h, a, 2)[1:5], tensors())


def test_low_precision_is_multiplied_in_float32():
    h, a = (t.detach().bfloat16() for t in tensors())
    found, expected = route(h, a, 2), route(h.double(), a.double(), 2)
    assert found.gate_NK.dtype == torch.float32
    torch.testing.assert_close(found.gate_NK.double(), expected.gate_NK, rtol=1e-6, atol=0)


def test_experts_chosen_by_the_caller():
    h, a = tensors()
    logits = h @ a.T
    found = route_by_logits(logits, lambda prob: prob.argmin(1, keepdim=True))
    assert torch.equal(found.expert_NK[:, 0], logits.argmin(1)) and found.count_E.sum() == 6


def test_what_is_refused():
    h, a = tensors()
    for args, message in [
        ((h, a[:, :3], 2), r"got h .*\(6, 5\)"),
        ((h, a.float(), 2), "one dtype"),
        ((h, a, 5), "1 to 4"),
    ]:
        with pytest.raises(ValueError, match=message):
            route(*args)
    with pytest.raises(UserError, match="backend 'csrc' does not exist; expected auto, torch, triton"):
        route(h, a, 2, backend="csrc")

"""The fused router under Triton's interpreter against float64. Started by test_router_kernels.

bfloat16 runs with operands raised to float32 (the interpreter multiplies raw bits of it) and is stored truncated.
"""

import pytest
import torch

from megamf.ops.router import naive, route

# Probabilities and sums come from float32 sums of exact products; only the gradient of h is stored in h's dtype.
FLOAT = 1e-5
STORED = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Memory that a kernel forgets to write shows as NaN."""
    plain = torch.Tensor.new_empty
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda self, *a, **k: plain(self, *a, **k).fill_(float("nan"))
        if (k.get("dtype") or self.dtype).is_floating_point else plain(self, *a, **k),
    )  # fmt: skip


def tensors(N, G, E, dtype):
    generator = torch.Generator().manual_seed(N + G + E)
    return torch.randn(N, G, generator=generator).to(dtype), (2 * torch.randn(E, G, generator=generator)).to(dtype)


def everything(decision, inputs):
    """The decision's tensors, and the gradients of a sum in which each of them has a weight of its own."""
    _, gate, prob, entropy, lse2, _ = decision
    weights = [torch.linspace(-1, 2, t.numel(), dtype=t.dtype).view_as(t) for t in (gate, prob)]
    total = (gate * weights[0]).sum() + (prob * weights[1]).sum() + 0.3 * entropy + 0.01 * lse2
    return [t.detach() for t in decision], torch.autograd.grad(total, inputs)


@pytest.mark.parametrize("dtype", STORED, ids=str)
@pytest.mark.parametrize(("N", "G", "E", "K"), [(1, 16, 4, 2), (64, 24, 16, 1), (70, 7, 5, 5), (300, 80, 33, 2)])
def test_values_and_gradients(N, G, E, K, dtype):
    h, a = tensors(N, G, E, dtype)
    results = []
    for wide in (True, False):
        leaves = [(t.double() if wide else t).requires_grad_() for t in (h, a)]
        decision = naive.route(*leaves, K) if wide else route(*leaves, K, backend="triton")
        results.append(everything(decision, leaves))
    (expected, expected_grads), (found, found_grads) = results
    assert found[0].dtype == torch.int64 and torch.equal(found[0], expected[0])
    assert torch.equal(found[5].long(), expected[5].long())
    for e, f in zip(expected[1:], found[1:], strict=True):
        assert f.dtype == torch.float32 and f.shape == e.shape
        torch.testing.assert_close(f.double(), e, rtol=FLOAT, atol=FLOAT)
    for e, f in zip(expected_grads, found_grads, strict=True):
        assert f.dtype == dtype and torch.isfinite(f).all()
        assert float((f.double() - e).norm()) <= STORED[dtype] * float(e.norm())


def test_no_tokens():
    h, a = (t.requires_grad_() for t in tensors(0, 8, 4, torch.float32))
    (expert, gate, *sums), grads = everything(route(h, a, 2, backend="triton"), (h, a))
    assert expert.shape == gate.shape == (0, 2) and all((t == 0).all() for t in sums)
    assert grads[0].shape == (0, 8) and (grads[1] == 0).all()


def test_experts_stay_in_range_where_logits_are_not_numbers():
    h, a = tensors(8, 8, 5, torch.float32)
    h[3] = float("nan")
    h[5, 0] = float("inf")
    found = route(h, a, 3, backend="triton")
    assert ((found.expert_NK >= 0) & (found.expert_NK < 5)).all()
    assert all(len(set(row)) == 3 for row in found.expert_NK.tolist())
    assert found.gate_NK[3].isnan().all() and torch.isfinite(found.gate_NK[[0, 1, 2, 4, 6, 7]]).all()


def test_large_logits_do_not_overflow_and_decide_where_probabilities_vanish():
    h, a = (100 * t for t in tensors(16, 8, 5, torch.float32))
    found, logits = route(h, a, 2, backend="triton"), h.double() @ a.double().T
    assert torch.equal(found.expert_NK, logits.topk(2).indices)
    expected = naive.decide(logits, lambda _: found.expert_NK)
    for e, f in zip(expected[1:], found[1:], strict=True):
        torch.testing.assert_close(f.double(), e, rtol=1e-4, atol=1e-4)


def test_registration():
    """Schema, fake kernel and autograd agree with the operator. (opcheck's fourth test cannot do integer outputs.)"""
    h, a = (t.requires_grad_() for t in tensors(5, 8, 4, torch.float32))
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.megamf.route.default, (h, a, 2), test_utils=tests)


def test_repeated_runs_are_equal():
    results = []
    for _ in range(2):
        h, a = (t.requires_grad_() for t in tensors(300, 8, 4, torch.float32))
        decision, grads = everything(route(h, a, 2, backend="triton"), (h, a))
        results.append([*decision, *grads])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))

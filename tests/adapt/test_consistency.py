"""The distance of two passes: values against torch's distributions, and the side that gradients go through."""

import torch
from torch.distributions import Categorical, Normal, kl_divergence

from megamf.adapt.consistency import squared_difference, symmetric_kl


def two(*shape):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2)]


def test_symmetric_kl_is_half_of_both_divergences():
    a, b = two(7, 5)
    p, q = Categorical(logits=a), Categorical(logits=b)
    expected = (kl_divergence(p, q) + kl_divergence(q, p)).mean() / 2
    assert torch.allclose(symmetric_kl(a, b), expected, rtol=1e-12)
    assert symmetric_kl(a, a).abs() < 1e-15


def test_targets_of_the_divergences_receive_no_gradient():
    a, b = two(7, 5)
    symmetric_kl(a, b).backward()
    rows, p, q = a.shape[0], a.detach().softmax(-1), b.detach().softmax(-1)
    # d KL(q || softmax(a)) / da = softmax(a) - q; the other term holds `a` as a target only.
    assert torch.allclose(a.grad, (p - q) / (2 * rows), rtol=1e-10)
    assert torch.allclose(b.grad, (q - p) / (2 * rows), rtol=1e-10)


def test_regression_form_is_not_zero_and_is_that_of_normal_distributions():
    a, b = two(9)
    width = torch.tensor(0.5, dtype=torch.float64).sqrt()
    p, q = Normal(a, width), Normal(b, width)
    expected = (kl_divergence(p, q) + kl_divergence(q, p)).mean() / 2
    value = squared_difference(a, b)
    assert torch.allclose(value, expected, rtol=1e-12) and value > 0.1
    assert symmetric_kl(a[:, None], b[:, None]) == 0
    value.backward()
    assert torch.allclose(a.grad, (a - b).detach() / 9) and torch.allclose(b.grad, (b - a).detach() / 9)


def test_lower_precision_is_computed_in_float32():
    a, b = (x.detach().bfloat16() for x in two(4, 3))
    assert symmetric_kl(a, b).dtype == squared_difference(a, b).dtype == torch.float32
    assert torch.equal(symmetric_kl(a, b), symmetric_kl(a.float(), b.float()))

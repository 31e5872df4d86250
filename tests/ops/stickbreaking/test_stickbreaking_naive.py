"""The specification against scalar loops, published numbers and finite differences."""

import math

import pytest
import torch

from megamf.ops.stickbreaking import naive


def loop_weights(logits: list[list[float]], S: int) -> list[list[float]]:
    """The stick broken key by key, in Python floats; row t has the logits of keys 0..S-T+t."""
    rows = []
    for row in logits:
        left, weights = 1.0, [0.0] * S
        for j in range(len(row) - 1, -1, -1):
            z = 1 / (1 + math.exp(-row[j]))
            weights[j] = left * z
            left *= 1 - z
        rows.append(weights)
    return rows


def triangle(rows: list[list[float]], S: int) -> torch.Tensor:
    return torch.tensor([row + [math.nan] * (S - len(row)) for row in rows], dtype=torch.float64)


def test_zero_logits_halve_the_stick() -> None:
    weights = naive.scan(torch.zeros(9, 9, dtype=torch.float64))
    for i in range(9):
        for j in range(9):
            assert weights[i, j].item() == pytest.approx(2.0 ** -(i - j + 1) if j <= i else 0.0, abs=1e-15)
        assert weights[i].sum().item() == pytest.approx(1 - 2.0 ** -(i + 1), abs=1e-15)


def test_published_vector() -> None:
    weights = naive.scan(triangle([[0.3], [1.0, -0.5], [-2.0, 0.7, 1.5]], 3))
    expected = [[0.574443, 0, 0], [0.455054, 0.377541, 0], [0.007215, 0.121895, 0.817574]]
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float64), atol=5e-7, rtol=0)


@pytest.mark.parametrize(("T", "S"), [(1, 1), (5, 5), (3, 8)])
def test_scan_is_the_loop(T: int, S: int) -> None:
    generator = torch.Generator().manual_seed(T * S)
    logits = torch.randn(T, S, dtype=torch.float64, generator=generator) * 3
    rows = [logits[t, : S - T + t + 1].tolist() for t in range(T)]
    expected = torch.tensor(loop_weights(rows, S), dtype=torch.float64)
    torch.testing.assert_close(naive.scan(logits), expected, atol=1e-14, rtol=1e-12)


def test_attention_is_the_loop_with_start_mask_and_shared_heads() -> None:
    generator = torch.Generator().manual_seed(1)
    B, H, G, T, S, C = 2, 4, 2, 5, 7, 3
    q, k, v = (torch.randn(B, n, t, C, dtype=torch.float64, generator=generator) for n, t in ((H, T), (G, S), (G, S)))
    start = torch.randint(0, S + 1, (B, T), generator=generator)
    mask = torch.rand(B, S, generator=generator) > 0.3
    o = naive.attention(q, k, v, 0.7, start, mask)
    for b in range(B):
        for h in range(H):
            for t in range(T):
                left, expected = 1.0, torch.zeros(C, dtype=torch.float64)
                for j in range(S - T + t, int(start[b, t]) - 1, -1):
                    if mask[b, j]:
                        z = 1 / (1 + math.exp(-0.7 * float(q[b, h, t] @ k[b, h % G, j])))
                        expected += left * z * v[b, h % G, j]
                        left *= 1 - z
                torch.testing.assert_close(o[b, h, t], expected, atol=1e-13, rtol=1e-12)


def test_gradients_are_finite_differences() -> None:
    generator = torch.Generator().manual_seed(2)
    q, k, v = (
        torch.randn(2, n, t, 2, dtype=torch.float64, generator=generator).requires_grad_()
        for n, t in ((2, 4), (1, 5), (1, 5))
    )
    start = torch.tensor([[0, 1, 1, 4], [5, 0, 3, 2]])
    mask = torch.tensor([[True, False, True, True, True], [True, True, True, False, False]])
    assert torch.autograd.gradcheck(lambda *x: naive.attention(*x, 0.6, start, mask), (q, k, v))
    assert torch.autograd.gradcheck(
        naive.scan, (torch.randn(3, 4, dtype=torch.float64, generator=generator).requires_grad_(),)
    )


def test_what_nobody_sees_may_be_nan() -> None:
    q = torch.randn(1, 1, 4, 3, dtype=torch.float64)
    k = torch.randn(1, 1, 4, 3, dtype=torch.float64)
    mask = torch.tensor([[True, False, True, True]])
    clean = naive.attention(q, k, k, 1.0, None, mask)
    k[:, :, 1] = math.nan
    k.requires_grad_()
    o = naive.attention(q, k, k, 1.0, None, mask)
    torch.testing.assert_close(o, clean, atol=0, rtol=0)
    o.sum().backward()
    assert torch.isfinite(k.grad).all() and (k.grad[:, :, 1] == 0).all()

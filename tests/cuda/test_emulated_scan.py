"""The CUDA scan, run on the host thread by thread, against the specification in float64."""

import math

import pytest
import torch

from megamf.ops.stickbreaking import naive
from megamf.ops.stickbreaking.cuda import Rows

# Relative error (2-norm) of values and of gradients.
LIMITS = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}
TYPES = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.detach()).norm() / b.detach().norm().clamp_min(1e-30))


def case(B: int, G: int, T: int, K: int, S: int, seed: int = 0, causal: bool = True, options: str = ""):
    """Logits [B*G, T*K, S], Rows, and what each row sees."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(B * G, T * K, S, generator=generator) * 2
    start = torch.randint(0, S + 1, (B, T), generator=generator) if "start" in options else None
    start = start.int() if start is not None and "int32" in options else start
    mask = torch.rand(B, S, generator=generator) > 0.3 if "mask" in options else None
    rows = Rows(B, T, K, 0.7, -math.inf, causal, start, mask)
    seen = naive.visible(T, S, start, mask, logits.device, causal=causal).expand(B, T, S)
    return logits, rows, seen[:, None, :, None].expand(B, G, T, K, S).reshape(logits.shape)


def expected(logits, seen, rows, grad=None, grad_rest=None):
    wide = logits.double().requires_grad_()
    scaled = wide * rows.scale
    weights = naive.break_stick(scaled, seen)
    rest = torch.where(seen, torch.nn.functional.logsigmoid(-scaled), 0.0).sum(-1)
    if grad is None:
        return weights, rest
    (found,) = torch.autograd.grad(
        (weights * torch.where(seen, grad.double(), 0.0)).sum()
        + (0 if grad_rest is None else (rest * grad_rest.double()).sum()),
        wide,
    )
    return weights.detach(), rest.detach(), found


@pytest.mark.parametrize(("dtype", "out"), TYPES, ids=str)
@pytest.mark.parametrize(
    ("sizes", "causal", "options"),
    [
        ((1, 1, 1, 1, 1), True, ""),
        ((1, 1, 5, 1, 9), True, ""),
        ((2, 2, 3, 2, 261), True, "start mask"),
        ((1, 1, 3, 3, 600), True, "start int32"),
        ((1, 2, 4, 1, 3), False, "mask"),
        ((1, 1, 2, 2, 513), False, "start"),
    ],
)
def test_values_and_gradients(kernels, sizes, causal, options, dtype, out) -> None:
    logits, rows, seen = case(*sizes, causal=causal, options=options)
    logits = logits.to(dtype)
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(logits.shape, generator=generator).to(dtype)
    grad_rest = torch.randn(logits.shape[:2], generator=generator)
    weights, rest, grad_logits = expected(logits, seen, rows, grad, grad_rest)
    # Unseen logits and their gradients may hold anything.
    poison, grad = logits.masked_fill(~seen, math.nan), grad.masked_fill(~seen, math.nan)
    got, got_rest = kernels.forward(poison, rows, out)
    again, got_grad = kernels.backward(grad, grad_rest, poison, rows, out)
    assert torch.equal(got, again)
    for a, b, limit in (
        (got, weights, LIMITS[out]),
        (got_rest, rest, 2e-5 if out != torch.float32 else 2e-6),
        (got_grad, grad_logits, 2 * LIMITS[out]),
    ):
        assert torch.isfinite(a).all() and relative(a, b) < limit, relative(a, b)
    assert (got[~seen] == 0).all() and (got_grad[~seen] == 0).all()


@pytest.mark.parametrize("shift", [0, 1, 3])
def test_rows_that_start_anywhere(emulated_library, shift: int) -> None:
    """Logits and results off their aligned addresses, together and apart."""
    logits, rows, seen = case(1, 1, 4, 2, 37)
    memory = torch.full((logits.numel() + 16,), math.nan)
    moved = memory[shift : shift + logits.numel()].view(logits.shape).copy_(logits)
    weights, _ = expected(logits, seen, rows)
    for out_shift in (0, shift):
        got, _ = emulated_library.forward(moved, rows, torch.float32, out_shift)
        assert relative(got, weights) < LIMITS[torch.float32]


def test_in_place(emulated_library) -> None:

    logits, rows, seen = case(1, 1, 3, 1, 300)
    grad = torch.randn(logits.shape)
    weights, _, grad_logits = expected(logits, seen, rows, grad)
    both = [logits.clone(), grad.clone()]
    emulated_library.backward_in_place(both[1], both[0], rows)
    assert relative(both[0], weights) < 2e-6 and relative(both[1], grad_logits) < 4e-6


@pytest.mark.parametrize("logit", [math.log(3e-8), math.log(1e-6), math.log(3e-3)])
@pytest.mark.parametrize("out", [torch.float32, torch.bfloat16])
def test_a_long_row_of_tiny_shares_does_not_drift(emulated_library, logit: float, out: torch.dtype) -> None:
    logits = torch.full((1, 1, 4096), logit)
    rows = Rows(1, 1, 1, 1.0, -120.0, True, None, None)
    got, rest = emulated_library.forward(logits, rows, out)
    wide = logits.double()
    assert relative(got, naive.scan(wide)) < LIMITS[out]
    assert relative(rest, torch.nn.functional.logsigmoid(-wide).sum(-1)) < 3e-6


@pytest.mark.parametrize("out", [torch.float32, torch.bfloat16])
def test_extreme_logits(emulated_library, out: torch.dtype) -> None:
    logits = torch.tensor([[[-1e4, 1e4, -200.0, 90.0, -90.0, 0.0, math.inf, -math.inf, -3.0]]])
    rows = Rows(1, 1, 1, 1.0, -120.0, True, None, None)
    got, _ = emulated_library.forward(logits, rows, out)
    want = naive.scan(logits.double().clamp(-1e5, 1e5))
    torch.testing.assert_close(got.double(), want, atol=1e-30, rtol=1e-6 if out == torch.float32 else 4e-3)


def test_used_up_sticks_end_the_walk(emulated_library) -> None:
    """A stick of half its length a key is below 1e-6 after 20: the third tile, poisoned, is never looked at."""
    logits = torch.zeros(1, 1, 768)
    logits[..., :256] = math.nan
    rows = Rows(1, 1, 1, 1.0, math.log(1e-6), True, None, None)
    weights, rest = emulated_library.forward(logits, rows, torch.float32)
    assert torch.isfinite(weights).all() and (weights[..., :512] == 0).all() and rest.item() < math.log(1e-6)
    _, grad = emulated_library.backward(torch.ones_like(logits), None, logits, rows, torch.float32)
    assert torch.isfinite(grad).all() and (grad[..., :512] == 0).all()

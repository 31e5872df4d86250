"""The compiled scan against the specification in float64."""

import math
from collections.abc import Iterator

import pytest
import torch

from megamf.ops.stickbreaking import naive, stickbreaking_scan

LIMITS = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 4e-3}


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (64, 64), (2, 3, 5, 9), (3, 65, 130), (2, 1, 200), (0, 4, 4)])
@pytest.mark.parametrize("with_start", [False, True])
def test_values_and_gradient(shape: tuple[int, ...], with_start: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(len(shape))
    logits = (torch.randn(shape, generator=generator, dtype=torch.float64) * 2).to(dtype)
    grad = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    start = torch.randint(0, shape[-1] + 1, shape[:-1], generator=generator) if with_start else None
    seen = naive.visible(shape[-2], shape[-1], start, None, logits.device).expand(shape)
    wide = logits.double().requires_grad_()
    want = naive.scan(wide, start)
    (want_grad,) = torch.autograd.grad(want, wide, grad.double())
    # Unseen logits and their gradients may hold anything.
    poisoned = logits.masked_fill(~seen, math.nan).requires_grad_()
    got = stickbreaking_scan(poisoned, start_XT=start, backend="csrc")
    (got_grad,) = torch.autograd.grad(got, poisoned, grad.masked_fill(~seen, math.nan))
    for a, b in ((got.detach(), want.detach()), (got_grad, want_grad)):
        assert a.dtype == dtype and torch.isfinite(a).all()
        assert (a[~seen] == 0).all()
        assert float((a.double() - b).norm()) <= 3 * LIMITS[dtype] * float(b.norm())


def test_published_vector() -> None:
    rows = [[0.3, math.nan, math.nan], [1.0, -0.5, math.nan], [-2.0, 0.7, 1.5]]
    expected = [[0.574443, 0, 0], [0.455054, 0.377541, 0], [0.007215, 0.121895, 0.817574]]
    torch.testing.assert_close(stickbreaking_scan(torch.tensor(rows)), torch.tensor(expected), atol=1e-6, rtol=0)


def test_zero_logits_halve_the_stick_exactly() -> None:
    weights = stickbreaking_scan(torch.zeros(30, 30))
    for i in range(30):
        assert weights[i, : i + 1].tolist() == [2.0 ** -(i - j + 1) for j in range(i + 1)]
        assert weights[i].double().sum().item() == 1 - 2.0 ** -(i + 1)


def test_extreme_logits() -> None:
    logits = torch.tensor([[-1e4, 1e4, -200.0, 90.0, -90.0, 0.0]])
    want = naive.scan(logits.double())
    torch.testing.assert_close(stickbreaking_scan(logits).double(), want, atol=1e-30, rtol=1e-6)


def test_opcheck_and_refusals() -> None:
    torch.use_deterministic_algorithms(False)
    logits = torch.randn(2, 3, 5, requires_grad=True)
    torch.library.opcheck(torch.ops.megamf.stickbreaking_scan, (logits, None))
    with pytest.raises(ValueError, match="T <= S"):
        stickbreaking_scan(torch.zeros(4, 3))
    with pytest.raises(ValueError, match="start"):
        stickbreaking_scan(torch.zeros(2, 3, 3), start_XT=torch.zeros(3, dtype=torch.int64))

"""The CUDA decoding kernel, run on the host thread by thread, against the specification in float64."""

import math

import pytest
import torch

from megamf.ops.stickbreaking import naive

LIMITS = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}


def inputs(B: int, H: int, G: int, S: int, C: int, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(B * H * S + C)
    q = torch.randn(B, H, C, generator=generator).to(dtype)
    k, v = (torch.randn(B, S, G, C, generator=generator).to(dtype).transpose(1, 2) for _ in range(2))
    return q, k, v


def check(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype) -> None:
    assert torch.isfinite(got).all()
    assert float((got.double() - want).norm()) <= LIMITS[dtype] * float(want.norm().clamp_min(1e-30))


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize(
    ("B", "H", "G", "S", "C", "parts"),
    [(1, 1, 1, 1, 1, 1), (2, 2, 1, 40, 64, 1), (1, 6, 1, 70, 20, 3), (1, 4, 2, 300, 136, 4), (1, 2, 1, 33, 2048, 2)],
)
def test_values(kernels, B: int, H: int, G: int, S: int, C: int, parts: int, dtype: torch.dtype) -> None:
    q, k, v = inputs(B, H, G, S, C, dtype)
    got = kernels.decode(q, k, v, None, None, C**-0.5, parts=parts)
    check(got, naive.decode(q.double(), k.double(), v.double(), C**-0.5), dtype)


@pytest.mark.parametrize("parts", [1, 2, 5])
def test_starts_and_masks_hide_anything(kernels, parts: int) -> None:
    """Hidden rows hold NaN; a sequence that sees nothing gets zeros."""
    q, k, v = inputs(4, 2, 1, 150, 24, torch.float32)
    start = torch.tensor([0, 77, 149, 150])
    mask = torch.rand(4, 150, generator=torch.Generator().manual_seed(3)) > 0.4
    want = naive.decode(q.double(), k.double(), v.double(), 0.2, start, mask)
    hidden = ~mask | (torch.arange(150) < start[:, None])
    k, v = (x.masked_fill(hidden[:, None, :, None], math.nan) for x in (k, v))
    for typed in (start, start.int()):
        got = kernels.decode(q, k, v, typed, mask, 0.2, parts=parts)
        check(got, want, torch.float32)
        assert (got[3] == 0).all()


def test_keys_that_are_also_values_and_its_own_choice_of_parts(emulated_library) -> None:
    q, k, _ = inputs(1, 2, 1, 400, 32, torch.float32)
    got = emulated_library.decode(q, k, k, None, None, 0.3)
    check(got, naive.decode(q.double(), k.double(), k.double(), 0.3), torch.float32)


def test_used_up_sticks_end_the_walk(emulated_library) -> None:
    """A stick of half its length a key is below 1e-6 after 20: older keys are never looked at."""
    q, k, v = torch.zeros(1, 1, 8), torch.zeros(1, 1, 96, 8), torch.ones(1, 1, 96, 8)
    k[:, :, :64], v[:, :, :64] = math.nan, math.nan
    for parts in (1, 3):
        got = emulated_library.decode(q, k, v, None, None, 1.0, math.log(1e-6), parts)
        torch.testing.assert_close(got, torch.ones(1, 1, 8), atol=2e-6, rtol=0)

"""Gathered weights: gradients, and for how long they are there. What several ranks do is in tests/parity."""

import time
import weakref
from functools import partial

import pytest
import torch

from megamf.ops.grouped_linear import grouped_linear
from megamf.parallel.gather import with_all_experts

COUNT_L = torch.tensor([3, 0, 4])


def product(x_RD, backend, alive, w_LDF):
    alive.append(weakref.ref(w_LDF.untyped_storage()))
    return grouped_linear(x_RD, w_LDF, COUNT_L, backend=backend)


def gone(reference, seconds=5.0):
    """Whether it is let go of. The thread of the collective may hold it for a moment after the call has returned."""
    end = time.monotonic() + seconds
    while reference() is not None and time.monotonic() < end:
        time.sleep(0.01)
    return reference() is None


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("backend", ["torch", "loop"])
def test_gradients_and_life(alone, backend, keep):
    generator = torch.Generator().manual_seed(0)
    x_RD = torch.randn(7, 8, generator=generator, requires_grad=True)
    w_LDF = torch.randn(3, 8, 4, generator=generator, requires_grad=True)
    expected = torch.autograd.grad(grouped_linear(x_RD, w_LDF, COUNT_L, backend=backend).square().sum(), (x_RD, w_LDF))
    alive = []
    y_RF = with_all_experts(partial(product, x_RD, backend, alive), w_LDF, alone, keep=keep)
    assert gone(alive[0], 0.2 if keep else 5.0) != keep, (
        "gathered weights are kept for the backward pass only where asked for"
    )
    for found, wanted in zip(torch.autograd.grad(y_RF.square().sum(), (x_RD, w_LDF)), expected, strict=True):
        assert torch.equal(found, wanted)
    del y_RF
    assert gone(alive[0])


def test_no_gradient_no_keeping(alone):
    alive = []
    w_LDF = torch.randn(3, 8, 4, requires_grad=True)
    with torch.no_grad():
        y_RF = with_all_experts(partial(product, torch.randn(7, 8), "torch", alive), w_LDF, alone, keep=False)
    assert not y_RF.requires_grad and gone(alive[0])


def test_low_precision_gradients_are_added_in_float32(alone, monkeypatch):
    import torch.distributed as dist

    seen = []
    real = dist.reduce_scatter_tensor
    monkeypatch.setattr(dist, "reduce_scatter_tensor", lambda o, i, **k: (seen.append(i.dtype), real(o, i, **k)))
    w_LDF = torch.randn(3, 8, 8).bfloat16().requires_grad_()
    x_RD = torch.randn(7, 8).bfloat16()
    with_all_experts(partial(product, x_RD, "auto", []), w_LDF, alone, keep=False).sum().backward()
    assert seen == [torch.float32] and w_LDF.grad.dtype == torch.bfloat16

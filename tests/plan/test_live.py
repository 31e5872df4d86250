"""Live bytes of tensors, real and fake."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from megamf.plan.live import LiveBytes


@pytest.mark.parametrize("fake", [False, True])
def test_storages_count_once_while_they_live(fake):
    live = LiveBytes()
    with FakeTensorMode() if fake else torch.no_grad(), live:
        a = torch.empty(1000)
        view = a.view(10, 100)[2:]
        assert live.now == 4000
        b = torch.empty(500, dtype=torch.bfloat16)
        assert live.now == 5000
        del a
        assert live.now == 5000  # the view holds it
        del view
        assert live.now == 1000
        del b
    assert (live.now, live.peak) == (0, 5000)


def test_gradients_and_what_the_backward_pass_needs_are_seen():
    weight = torch.ones(10, 10, requires_grad=True)
    live = LiveBytes()
    with live:
        assert live.watch([weight, weight]) == 400
        out = torch.exp(weight)  # keeps its result for the backward pass
        total = out.sum()
        del out
        assert live.now == 400 + 400 + 4
        total.backward()
        del total
        assert live.now == 400 + 400  # the weight and its gradient
        live.reset_peak()
        assert live.peak == 800


def test_a_storage_that_grows_counts_in_full():
    live = LiveBytes()
    with live:
        a = torch.empty(10)
        a.resize_(100)
        assert live.now == 400
        del a
    assert live.now == 0

"""Transfers in the order of the graph, and what a host waits for on a GPU, told by a stand-in for its streams.

What several ranks exchange is in tests/parity.
"""

from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist

from megamf.parallel import exchange
from megamf.parallel.exchange import CountExchange, Transfer, begin, finish


@pytest.fixture
def log(monkeypatch):
    """What happens, in order: transfers started and waited for, and calls of the stand-in streams."""
    events = []
    real = dist.all_to_all_single

    class Work:
        def __init__(self, work):
            self.work = work

        def wait(self):
            events.append("wait")
            self.work.wait()

    def start(*args, **kwargs):
        events.append("start")
        assert kwargs["async_op"]
        return Work(real(*args, **kwargs))

    monkeypatch.setattr(dist, "all_to_all_single", start)
    return events


class Noted(torch.autograd.Function):
    """x, with a note of every pass."""

    @staticmethod
    def forward(ctx, x, events):
        ctx.events = events
        events.append("other work")
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.events.append("its gradient")
        return grad, None


def test_work_between_begin_and_finish_runs_beside_the_transfer_both_ways(alone, log):
    x_RD = torch.arange(6.0).view(3, 2).requires_grad_()
    other = torch.ones(3, 2, requires_grad=True)
    transfer = Transfer([3], [3], alone)
    buffer = begin(x_RD, transfer)
    meanwhile = Noted.apply(other, log)
    received = finish(buffer, transfer)
    assert log == ["start", "other work", "wait"]
    assert torch.equal(received, x_RD)
    log.clear()
    (received * meanwhile).sum().backward()
    assert log == ["start", "its gradient", "wait"]
    assert torch.equal(other.grad, x_RD) and torch.equal(x_RD.grad, torch.ones(3, 2))


def test_a_transfer_is_finished_once(alone):
    transfer = Transfer([1], [1], alone)
    finish(begin(torch.ones(1, 2), transfer), transfer)
    with pytest.raises(AssertionError, match="finished once"):
        transfer.wait()


def test_split_sizes(alone):
    counts = CountExchange(torch.tensor([[2, 0, 5]]), alone)
    assert counts.splits() == ([7], [7])
    assert counts.receive_PL.tolist() == [[2, 0, 5]]


def test_on_a_gpu_the_host_waits_for_one_copy_and_as_late_as_it_can(alone, log, monkeypatch):
    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            log.append(f"{self.name} waits for {other.name}")

        def wait_event(self, event):
            log.append(f"{self.name} waits for the copy")

    class Event:
        def record(self, stream):
            log.append(f"copy queued on {stream.name}")

        def synchronize(self):
            log.append("host waits for the copy")

    @contextmanager
    def on(stream):
        log.append(f"on {stream.name}")
        yield

    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Stream("model"))
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(exchange, "pinned", lambda shape: torch.empty(shape, dtype=torch.int64))
    counts = CountExchange(torch.tensor([[2, 0, 5]]), alone, Stream("side"))
    assert log == ["start", "side waits for model", "on side", "wait", "copy queued on side"]
    log.clear()
    assert counts.splits() == ([7], [7])
    assert log == ["host waits for the copy", "model waits for the copy"]

"""What counts as waiting, on a clock that the test moves."""

import pytest
import torch
import torch.distributed as dist

from megamf.parallel import stopwatch
from megamf.parallel.stopwatch import Stopwatch


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: now[0])
    return now


@pytest.fixture
def collective(monkeypatch, clock):
    """A collective that takes two seconds to call and ten to wait for."""

    def call(*_, **__):
        clock[0] += 2

    def wait(*_, **__):
        clock[0] += 10
        return True

    monkeypatch.setattr(dist.ProcessGroup, "allreduce", call)
    monkeypatch.setattr(dist.Work, "wait", wait)
    return call, wait


def test_own_time_is_the_rest(clock, collective):
    with Stopwatch(torch.device("cpu")) as watch:
        dist.Work.wait(None)
        watch.start()
        clock[0] += 3
        dist.ProcessGroup.allreduce(None)
        assert dist.Work.wait(None) is True
        clock[0] += 4
        watch.stop()
        clock[0] += 100
        watch.start()
        clock[0] += 1
        watch.stop()
    assert watch.seconds == 3 + 4 + 1


def test_a_failed_wait_is_a_wait(clock, monkeypatch):
    def fail(*_):
        clock[0] += 10
        raise RuntimeError("a peer is gone")

    monkeypatch.setattr(dist.Work, "wait", fail)
    with Stopwatch(torch.device("cpu")) as watch:
        watch.start()
        with pytest.raises(RuntimeError, match="a peer is gone"):
            dist.Work.wait(None)
        watch.stop()
    assert watch.seconds == 0


def test_everything_is_as_before_afterwards(collective):
    with Stopwatch(torch.device("cpu")):
        assert dist.ProcessGroup.allreduce is not collective[0]
    assert (dist.ProcessGroup.allreduce, dist.Work.wait) == collective

import os
import sys
import threading
import time

import pytest
import torch

from megamf.checkpoint import BackgroundWriter, Checkpoint, save, snapshot
from megamf.heartbeat import beat


def test_a_snapshot_does_not_follow_training():
    source = torch.arange(6.0).reshape(2, 3).T.requires_grad_()
    copies = snapshot(iter({"a": source}.items()))
    with torch.no_grad():
        source.zero_()
    assert torch.equal(copies["a"], torch.arange(6.0).reshape(2, 3).T)
    assert copies["a"].is_contiguous() and not copies["a"].requires_grad


def test_buffers_are_used_again_while_they_fit():
    buffers = {}
    first = snapshot({"a": torch.ones(3), "b": torch.ones(2)}, buffers)
    again = snapshot({"a": torch.full((3,), 2.0), "b": torch.ones(4)}, buffers)
    assert again["a"] is first["a"] and torch.equal(again["a"], torch.full((3,), 2.0))
    assert again["b"] is not first["b"] and buffers.keys() == {"a", "b"}
    assert snapshot({"a": torch.ones(3)})["a"] is not first["a"]


@pytest.mark.skipif(sys.platform != "linux", reason="threads have a priority of their own on Linux only")
def test_writing_gives_way_to_training():
    before = os.getpriority(os.PRIO_PROCESS, 0)
    seen = []
    with BackgroundWriter() as writer:
        writer.submit(lambda: seen.append(os.getpriority(os.PRIO_PROCESS, 0)))
    assert seen == [max(before, 10)] and os.getpriority(os.PRIO_PROCESS, 0) == before


def test_submit_returns_while_the_save_runs_and_only_one_runs(tmp_path):
    gate, order = threading.Event(), []
    with BackgroundWriter() as writer:
        writer.submit(lambda: (gate.wait(10), order.append(1)))
        assert writer.busy
        threading.Timer(0.1, gate.set).start()
        writer.submit(lambda: order.append(2))
        assert order[0] == 1  # the second began after the first had ended
    assert order == [1, 2]
    assert not writer.busy


@pytest.mark.parametrize("ask", ["wait", "close", "submit"])
def test_errors_come_back_once_in_the_main_thread(ask):
    writer = BackgroundWriter()
    started = []

    def failing():
        raise OSError(28, "No space left on device")

    writer.submit(failing)
    with pytest.raises(OSError, match="No space"):
        writer.submit(lambda: started.append(1)) if ask == "submit" else getattr(writer, ask)()
    assert started == []
    writer.submit(lambda: started.append(2))
    writer.close()
    assert started == [2]


def test_a_background_save_is_a_checkpoint(tmp_path):
    weight = torch.ones(4)
    with BackgroundWriter() as writer:
        copies = snapshot({"weights/a": weight})
        writer.submit(lambda: save(tmp_path, 1, copies, {}, [], {}, run_id="r"))
        weight.zero_()
    assert torch.equal(Checkpoint(tmp_path).tensor("a"), torch.ones(4))


def test_after_a_failure_a_save_that_goes_on_is_waited_for():
    def save_slowly():
        for _ in range(8):
            time.sleep(0.1)
            beat("save.shard")
        done.set()

    done = threading.Event()
    writer = BackgroundWriter()
    writer.submit(save_slowly)
    writer.leave(0.5)
    assert done.is_set() and not writer.busy


def test_after_a_failure_a_save_that_waits_for_nothing_is_left():
    gate = threading.Event()
    writer = BackgroundWriter()
    writer.submit(lambda: gate.wait(60))
    began = time.monotonic()
    writer.leave(0.3)
    assert writer.busy and time.monotonic() - began < 30
    (thread,) = [thread for thread in threading.enumerate() if thread.name == "checkpoint-writer"]
    assert thread.daemon, "the interpreter would wait for it"
    gate.set()
    writer.close()

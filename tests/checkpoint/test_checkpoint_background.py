import threading

import pytest
import torch

from megamf.checkpoint import BackgroundWriter, Checkpoint, save, snapshot


def test_a_snapshot_does_not_follow_training():
    source = torch.arange(6.0).reshape(2, 3).T.requires_grad_()
    copies = snapshot(iter({"a": source}.items()))
    with torch.no_grad():
        source.zero_()
    assert torch.equal(copies["a"], torch.arange(6.0).reshape(2, 3).T)
    assert copies["a"].is_contiguous() and not copies["a"].requires_grad


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


def test_the_interpreter_waits_for_the_save_at_its_end():
    """It does for every thread that is not a daemon."""
    gate = threading.Event()
    with BackgroundWriter() as writer:
        writer.submit(lambda: gate.wait(10))
        (thread,) = [thread for thread in threading.enumerate() if thread.name == "checkpoint-writer"]
        assert thread.is_alive() and not thread.daemon
        gate.set()

import json
import multiprocessing
import os
import random
import resource
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from checkpoint_samples import MODULES, training_state
from safetensors import safe_open

from megamf.checkpoint import (
    Checkpoint,
    abort,
    begin,
    finish,
    latest,
    list_steps,
    rotate,
    save,
    sweep,
    verify,
    write_rank,
)
from megamf.checkpoint import write as write_module
from megamf.errors import UserError

# Children start at once, with everything imported; they run no parallel torch operation.
FORK = multiprocessing.get_context("fork")
META = {"state": {"step": 7}, "modules": MODULES, "model": {"n_layer": 2}}


def shares(tensors, num_ranks):
    names = sorted(tensors)
    return [{name: tensors[name] for name in names[rank::num_ranks]} for rank in range(num_ranks)]


def contents(path):
    with Checkpoint(path) as checkpoint:
        return {
            f"{group}/{name}": checkpoint.tensor(name, group)
            for group in checkpoint.groups
            for name in checkpoint.names(group)
        }


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


@pytest.mark.parametrize("num_ranks", [1, 3, 8])
def test_any_number_of_ranks_writes_the_same_checkpoint(tmp_path, num_ranks):
    tensors = training_state()

    def one_rank(rank):
        tmp = begin(tmp_path, 7, "n")
        write_rank(tmp, rank, iter(shares(tensors, num_ranks)[rank].items()), max_file_bytes=700)
        if rank == 0:
            finish(tmp, tmp_path, 7, num_ranks, run_id="r", expected=set(tensors), timeout_s=20, poll=0.01, **META)

    with ThreadPoolExecutor(num_ranks) as pool:
        list(pool.map(one_rank, reversed(range(num_ranks))))
    assert_same(contents(tmp_path / "step-00000007"), tensors)
    assert verify(tmp_path / "step-00000007") == []
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-00000007"]
    assert (tmp_path / "latest").read_text() == "step-00000007\n"
    assert not any(name.endswith(".done.json") for name in os.listdir(tmp_path / "step-00000007"))


def test_more_ranks_than_tensors(tmp_path):
    tmp = begin(tmp_path, 1, "n")
    write_rank(tmp, 0, {"weights/a": torch.ones(2)})
    write_rank(tmp, 1, {})
    path = finish(tmp, tmp_path, 1, 2, {}, [], {}, run_id="r")
    assert_same(contents(path), {"weights/a": torch.ones(2)})


def test_every_dtype_empty_tensors_and_scalars_come_back(tmp_path):
    tensors = {f"weights/{d}": torch.tensor([0, 1, 3]).to(d) for d in (torch.bfloat16, torch.float32, torch.float64)}
    tensors |= {"weights/int": torch.tensor([-(2**62)]), "weights/bool": torch.tensor([True, False])}
    tensors |= {"weights/none": torch.empty(0, 3), "weights/scalar": torch.tensor(2.5)}
    assert_same(contents(save(tmp_path, 0, tensors, {}, [], {}, run_id="r")), tensors)


def test_files_stay_below_the_limit_and_only_one_is_held_while_streaming(tmp_path):
    alive = set()

    class Watched:
        def __init__(self, name):
            self.name = name
            alive.add(name)

        def __del__(self):
            alive.discard(self.name)

    most = 0

    def stream():
        nonlocal most
        for index in range(20):
            tensor = torch.full((100,), float(index))  # 400 bytes
            tensor.watched = Watched(index)
            most = max(most, len(alive))
            yield f"weights/w{index:02d}", tensor

    path = save(tmp_path, 1, stream(), {}, [], {}, run_id="r", max_file_bytes=1700)
    shards = sorted(path.glob("*.safetensors"))
    assert len(shards) == 5
    with safe_open(shards[0], "pt") as shard:
        assert len(list(shard.keys())) == 4
    assert most <= 4 + 2  # one file's worth, the tensor that did not fit, and the one being made


def test_a_repeated_save_of_a_rank_leaves_no_file_of_the_first(tmp_path):
    tmp = begin(tmp_path, 1, "n")
    write_rank(tmp, 0, {f"weights/w{i}": torch.ones(4) for i in range(4)}, max_file_bytes=16)
    write_rank(tmp, 0, {"weights/w0": torch.zeros(4)})
    assert_same(contents(finish(tmp, tmp_path, 1, 1, {}, [], {}, run_id="r")), {"weights/w0": torch.zeros(4)})


def test_an_existing_step_is_replaced(tmp_path):
    save(tmp_path, 7, training_state(0), run_id="r", **META)
    path = save(tmp_path, 7, training_state(50), run_id="r", **META)
    assert_same(contents(path), training_state(50))
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-00000007"]


def test_an_existing_step_survives_a_failing_replacement(tmp_path, monkeypatch):
    save(tmp_path, 7, training_state(0), run_id="r", **META)
    rename = os.rename

    def failing(source, target):
        if Path(source).name.startswith(".tmp-step") and Path(target).name == "step-00000007":
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(write_module.os, "rename", failing)
    with pytest.raises(UserError, match="errno 5"):
        save(tmp_path, 7, training_state(50), run_id="r", **META)
    monkeypatch.undo()
    assert_same(contents(tmp_path), training_state(0))
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-00000007"]


def finish_two(tmp_path, first, second, **options):
    tmp = begin(tmp_path, 7, "n")
    write_rank(tmp, 0, first)
    write_rank(tmp, 1, second)
    return finish(tmp, tmp_path, 7, 2, {}, [], {}, run_id="r", **options)


@pytest.mark.parametrize(
    ("first", "second", "expected", "message"),
    [
        ({"weights/a": 1}, {"weights/a": 1}, None, "written by two ranks.*weights/a"),
        (
            {"weights/a": 1},
            {"weights/b": 1},
            {"weights/a", "weights/b", "weights/c"},
            r"1 tensors are missing \(weights/c",
        ),
        ({"weights/a": 1}, {"weights/b": 1}, {"weights/a"}, r"1 unexpected \(weights/b\)"),
        ({"weights/e.0": 1}, {"weights/e.2": 1}, None, "lacks module 1"),
        ({"weights/e.0": 1}, {"exp_avg/e.1": 1}, None, r"exp_avg/e has shape \[2, 1\]"),
        ({"weights/transformer.h.0.mlpf.experts.weight.0": 1}, {}, None, "in the module table"),
    ],
)
def test_tensors_that_make_no_whole_are_refused_and_nothing_is_left(tmp_path, first, second, expected, message):
    save(tmp_path, 3, {"weights/a": torch.ones(1)}, {}, [], {}, run_id="r")
    with pytest.raises(ValueError, match=message):
        finish_two(
            tmp_path,
            {name: torch.ones(n) for name, n in first.items()},
            {name: torch.ones(n) for name, n in second.items()},
            expected=expected,
        )
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-00000003"]


def test_a_missing_rank_is_named_after_the_timeout(tmp_path):
    tmp = begin(tmp_path, 7, "n")
    write_rank(tmp, 1, {"weights/a": torch.ones(1)})
    with pytest.raises(TimeoutError, match=r"2 of 3 ranks .*: 0, 2"):
        finish(tmp, tmp_path, 7, 3, {}, [], {}, run_id="r", timeout_s=0.05, poll=0.01)
    assert os.listdir(tmp_path) == []


def test_the_mark_of_another_attempt_does_not_count(tmp_path):
    old = begin(tmp_path, 7, "old")
    write_rank(old, 0, {"weights/a": torch.ones(1)})
    new = begin(tmp_path, 7, "new")
    for file in old.iterdir():
        file.rename(new / file.name)
    with pytest.raises(ValueError, match=r"mark of rank 0 of \.tmp-step-00000007-old"):
        finish(new, tmp_path, 7, 1, {}, [], {}, run_id="r")


def test_files_of_a_rank_beyond_the_number_of_ranks_are_refused(tmp_path):
    tmp = begin(tmp_path, 7, "n")
    for rank in range(2):
        write_rank(tmp, rank, {f"weights/{rank}": torch.ones(1)})
    with pytest.raises(ValueError, match="files of no rank"):
        finish(tmp, tmp_path, 7, 1, {}, [], {}, run_id="r")


def test_when_one_rank_gives_up_the_others_and_rank_0_stop_at_once(tmp_path):
    tmp = begin(tmp_path, 7, "n")
    errors = []

    def rank_0():
        try:
            write_rank(tmp, 0, {"weights/a": torch.ones(1)})
            finish(tmp, tmp_path, 7, 3, {}, [], {}, run_id="r", timeout_s=30, poll=0.01)
        except UserError as error:
            errors.append(error)

    waiting = threading.Thread(target=rank_0)
    start = time.monotonic()
    waiting.start()
    time.sleep(0.1)
    with pytest.raises(ValueError, match="complex"):
        write_rank(tmp, 1, {"weights/b": torch.ones(1, dtype=torch.complex64)})
    waiting.join()
    assert "another rank gave up" in str(errors[0])
    with pytest.raises(UserError, match="another rank gave up"):
        write_rank(tmp, 2, iter({"weights/c": torch.ones(1)}.items()))
    assert time.monotonic() - start < 10
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"state": {1: 2}}, "JSON keys are strings"),
        ({"state": {"t": torch.ones(1)}}, "state.t is a Tensor"),
        ({"modules": [{"layer": 0}]}, "module table"),
        ({"modules": [*MODULES, MODULES[0]]}, "twice"),
    ],
)
def test_bad_documents_are_refused_before_waiting(tmp_path, options, message):
    tmp = begin(tmp_path, 7, "n")
    with pytest.raises(ValueError, match=message):
        finish(tmp, tmp_path, 7, 5, **(META | options), run_id="r", timeout_s=60)
    assert os.listdir(tmp_path) == []


def test_finish_refuses_a_directory_that_is_not_its_own(tmp_path):
    other = begin(tmp_path, 8, "n")
    with pytest.raises(ValueError, match="not a temporary directory for step 7"):
        finish(other, tmp_path, 7, 1, {}, [], {}, run_id="r")
    assert other.exists()


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([("weights/a", torch.ones(1)), ("weights/a", torch.ones(1))], "twice"),
        ([("weights/a", torch.ones(9)), ("weights/b", torch.ones(9)), ("weights/a", torch.ones(1))], "twice"),
        ([("a", torch.ones(1))], "no tensor name"),
    ],
)
def test_bad_names_are_refused(tmp_path, tensors, message):
    tmp = begin(tmp_path, 7, "n")
    with pytest.raises(ValueError, match=message):
        write_rank(tmp, 0, iter(tensors), max_file_bytes=40)
    assert os.listdir(tmp_path) == []


def test_state_comes_back_exactly(tmp_path):
    state = {"lr": 0.1 + 0.2, "big": 2**70, "text": "ü\n", "list": [None, True, -0.0], "tree": {"a": {"b": []}}}
    path = save(tmp_path, 1, {}, state, [], {"x": 1}, run_id="the run")
    checkpoint = Checkpoint(path)
    assert checkpoint.state == state
    assert checkpoint.model == {"x": 1}
    assert checkpoint.manifest.run_id == "the run"
    assert checkpoint.manifest.total_bytes == sum(
        file.stat().st_size for file in path.iterdir() if not file.name.startswith("manifest")
    )


# Running out of space, no permission, and sudden death.


def test_too_little_free_space_is_told_ahead(tmp_path, monkeypatch):
    save(tmp_path, 3, {"weights/a": torch.ones(1)}, {}, [], {}, run_id="r")
    monkeypatch.setattr("megamf.checkpoint.files.free_bytes", lambda path: 1000)
    with pytest.raises(UserError, match="4,000 bytes needed, 1,000 free"):
        save(tmp_path, 4, {"weights/a": torch.ones(1000)}, {}, [], {}, run_id="r")
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-00000003"]


def save_with_small_file_limit(root, tensors, reply):
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    try:
        save(root, 4, iter(tensors.items()), {}, [], {}, run_id="r")
    except UserError as error:
        reply.send(str(error))


def test_a_write_that_fails_half_way_leaves_the_previous_checkpoint(tmp_path):
    save(tmp_path, 3, training_state(), run_id="r", **META)
    answer, reply = FORK.Pipe(duplex=False)
    tensors = {f"weights/w{i}": torch.ones(1 << 17) for i in range(4)}
    child = FORK.Process(target=save_with_small_file_limit, args=(tmp_path, tensors, reply), daemon=True)
    child.start()
    assert answer.poll(60)
    message = answer.recv()
    child.join()
    assert "File too large" in message and "bytes needed: 2,097,152" in message and "free: " in message
    assert ".tmp-step-00000004" in message
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-00000003"]
    assert verify(tmp_path / "step-00000003") == []


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system of one MiB, where the machine allows mounting one."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", place], capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_no_space_left_on_the_device(tiny_disk):
    root = tiny_disk / "checkpoints"
    save(root, 3, {"weights/a": torch.ones(1000)}, {}, [], {}, run_id="r")
    stream = ((f"weights/w{i}", torch.ones(1 << 16)) for i in range(8))
    with pytest.raises(UserError, match=r"No space left on device.*bytes needed: [\d,]+, free: "):
        save(root, 4, stream, {}, [], {}, run_id="r", max_file_bytes=1 << 18)
    assert sorted(os.listdir(root)) == ["latest", "step-00000003"]
    assert verify(latest(root)) == []
    save(root, 4, {"weights/a": torch.ones(1000)}, {}, [], {}, run_id="r")


def test_a_read_only_file_system_is_told(tiny_disk):
    root = tiny_disk / "checkpoints"
    save(root, 3, {"weights/a": torch.ones(1000)}, {}, [], {}, run_id="r")
    subprocess.run(["mount", "-o", "remount,ro", tiny_disk], check=True)
    with pytest.raises(UserError, match="Read-only file system"):
        save(root, 4, {"weights/a": torch.ones(1000)}, {}, [], {}, run_id="r")
    assert verify(latest(root)) == []


def test_a_root_that_is_a_file_is_told(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="Not a directory"):
        begin(tmp_path / "file", 1, "n")


@pytest.mark.parametrize("fails", ["manifest.json", "state.json", "latest"])
def test_failing_small_files_leave_the_previous_checkpoint(tmp_path, monkeypatch, fails):
    save(tmp_path, 3, training_state(), run_id="r", **META)
    from megamf.checkpoint import files

    real = files.write_durably

    def failing(path, content):
        if fails in path.name:
            raise OSError(28, "No space left on device")
        real(path, content)

    monkeypatch.setattr(files, "write_durably", failing)
    monkeypatch.setattr(write_module, "write_durably", failing)
    with pytest.raises(UserError, match="No space left"):
        save(tmp_path, 7, training_state(), run_id="r", **META)
    monkeypatch.undo()
    assert verify(latest(tmp_path)) == []
    assert latest(tmp_path).name == "step-00000003"
    assert not any(name.startswith(".") for name in os.listdir(tmp_path))


def save_until_killed(root, states, reply):
    sweep(root)
    for turn in range(100_000):
        if turn == 1:
            reply.send("up")
        save(root, 1 + turn % 3, states[turn % len(states)], run_id="r", max_file_bytes=1500, **META)
        rotate(root, 2)


def test_kill_at_any_moment_leaves_latest_valid(tmp_path):
    root = tmp_path / "checkpoints"
    states = [training_state(seed) for seed in range(4)]
    rng = random.Random(0)
    for attempt in range(8):
        answer, reply = FORK.Pipe(duplex=False)
        writer = FORK.Process(target=save_until_killed, args=(root, states, reply), daemon=True)
        writer.start()
        assert answer.poll(60)
        time.sleep(0.2 * rng.random())
        writer.kill()
        writer.join()
        for step in list_steps(root):
            assert verify(root / f"step-{step:08d}") == []
        sweep(root)
        assert verify(latest(root)) == [], attempt
        assert not any(name.startswith(".") for name in os.listdir(root))


def test_abort_of_a_directory_that_is_gone_is_no_error(tmp_path):
    abort(tmp_path / ".tmp-step-00000001-x")


def test_a_done_mark_is_plain_json(tmp_path):
    tmp = begin(tmp_path, 7, "n")
    write_rank(tmp, 2, {"weights/a": torch.ones(2)})
    mark = json.loads((tmp / "rank-00002.done.json").read_text())
    assert mark["tensors"]["weights/a"]["shape"] == [2]

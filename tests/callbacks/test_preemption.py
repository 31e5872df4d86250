"""A stop signal anywhere: all ranks stop at one place, with a complete checkpoint, and the run goes on from there."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megamf.checkpoint import list_steps, verify
from megamf.parallel.launch import free_port

WORKER = Path(__file__).with_name("jobs_worker.py")
STEPS = 6
SETTINGS = [
    "model.vocab_size=61", "model.n_layer=1", "model.n_embd=16", "model.att_hidden=16", "model.ffd_hidden=16",
    "model.n_att_experts=4", "model.n_mlp_experts=4", "model.gating_size=8", "model.bos_token_id=null",
    "model.eos_token_id=0", f"train.steps={STEPS}", "train.seq_len=24", "train.micro_batch=1", "train.global_batch=4",
    "train.eval_every=2", "train.eval_batches=3", "optim.warmup_steps=1", "data.valid_fraction=0.1",
    "checkpoint.every=2", "checkpoint.keep=0", "logging.tensorboard=false",
]  # fmt: skip
# Where the signal comes (a point of megamf.faults, the step in progress there) -> the step that the run stops at.
PLACES = {
    "start": ("term", "start", None, 0),
    "data": ("usr1", "data", 3, 2),
    "forward": ("int", "forward", 3, 3),
    "accumulation": ("term", "gradients", 3, 3),
    "update": ("term", "step", 3, 3),
    "evaluation": ("usr1", "evaluation", 4, 4),
    "save-begin": ("term", "save.begin", 4, 4),
    "save-shard": ("usr1", "save.shard", 4, 4),
    "save-manifest": ("int", "save.manifest", 4, 4),
    "save-rename": ("term", "save.rename", 4, 4),
    "last-evaluation": ("term", "evaluation", STEPS, STEPS),
}
TOGETHER = {"start": 1, "accumulation": 1, "evaluation": 1, "save-shard": 0}


def fault(place: str, rank: int | None = None) -> dict:
    action, point, step, _ = PLACES[place]
    later = {"after": 1} if place in ("accumulation", "evaluation", "save-shard") else {}
    return {"action": action, "at": point, "step": step, "rank": rank} | later


def job(root: Path, corpus: Path, name: str, faults=(), run: str | None = None, more=()) -> dict:
    settings = [f"run.dir={root / (run or name)}", f"data.train=[{{path: {corpus}}}]", *SETTINGS, *more]
    return {"name": name, "arguments": settings, "faults": list(faults)}


@pytest.fixture(scope="module")
def alone(corpus, launch_ranks, tmp_path_factory) -> Path:
    """One process, stopped at every place, each time started again."""
    root = tmp_path_factory.mktemp("alone")
    jobs = [job(root, corpus, "whole")]
    for place in PLACES:
        jobs += [job(root, corpus, place, [fault(place)])]
        if place == "data":
            jobs += [job(root, corpus, "data-untouched", [fault("start")], run="data")]
        jobs += [job(root, corpus, f"{place}-again", run=place)]
    background = ["checkpoint.background=true"]
    # By the time of the second save's end, training has gone on to a step that nobody can foretell.
    second = {"action": "term", "at": "save.rename", "after": 1}
    jobs += [job(root, corpus, "background", [second], more=background)]
    jobs += [job(root, corpus, "background-again", run="background", more=background)]
    jobs += [job(root, corpus, "end", [{"action": "term", "at": "end"}])]
    launch_ranks(WORKER, 1, jobs, root / "out")
    return root


@pytest.fixture(scope="module")
def together(corpus, launch_ranks, tmp_path_factory) -> Path:
    """Two processes, one of which gets the signal."""
    root = tmp_path_factory.mktemp("together")
    layout = ["parallel.ep=2", "deepspeed=zero2"]
    jobs = [job(root, corpus, "whole", more=layout)]
    for place, rank in TOGETHER.items():
        jobs += [job(root, corpus, place, [fault(place, rank)], more=layout)]
        jobs += [job(root, corpus, f"{place}-again", run=place, more=layout)]
    launch_ranks(WORKER, 2, jobs, root / "out")
    return root


def codes(root: Path, rank: int = 0) -> dict[str, int]:
    return json.loads((root / "out" / f"codes-{rank}.json").read_text())


def figures(run: Path) -> list[tuple]:
    """Losses and evaluations of a run, without the times."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return sorted((line["step"], "valid_loss" in line, line.get("loss", line.get("valid_loss"))) for line in lines)


@pytest.mark.parametrize("place", PLACES)
def test_stops_with_a_checkpoint_and_goes_on_as_if_nothing_had_been(alone, place):
    found = codes(alone)
    assert (found[place], found[f"{place}-again"]) == (75, 0)
    said = (alone / "out" / f"{place}-0.err").read_text()
    assert f"stopped at step {PLACES[place][3]} as asked (SIG{PLACES[place][0].upper()})" in said
    steps = list_steps(alone / place / "checkpoints")
    assert steps == sorted({PLACES[place][3], 2, 4, 6})
    assert figures(alone / place) == figures(alone / "whole")
    assert all(verify(alone / place / "checkpoints" / f"step-{step:08d}") == [] for step in steps)


def test_a_resumed_run_that_made_no_step_leaves_its_checkpoint(alone):
    assert codes(alone)["data-untouched"] == 75
    assert "stopped at step 2 as asked" in (alone / "out" / "data-untouched-0.err").read_text()


def test_a_background_save_is_finished_first(alone):
    found = codes(alone)
    # The steps are short: the last one may be over before the first save is.
    assert (found["background"], found["background-again"]) in ((75, 0), (0, 0))
    assert figures(alone / "background") == figures(alone / "whole")
    assert list_steps(alone / "background" / "checkpoints")[-1] == STEPS


def test_a_signal_after_the_last_step_changes_nothing(alone):
    assert codes(alone)["end"] == 0
    assert figures(alone / "end") == figures(alone / "whole")


@pytest.mark.parametrize("place", TOGETHER)
def test_one_rank_that_was_told_is_enough(together, place):
    for rank in (0, 1):
        found = codes(together, rank)
        assert (found[place], found[f"{place}-again"]) == (75, 0)
    who = "SIG" + PLACES[place][0].upper() if TOGETHER[place] == 0 else "another rank"
    said = (together / "out" / f"{place}-0.err").read_text()
    assert f"stopped at step {PLACES[place][3]} as asked ({who})" in said
    assert figures(together / place) == figures(together / "whole")


def start(root: Path, corpus: Path, faults: list[dict], more: list[str]) -> subprocess.Popen:
    arguments = job(root, corpus, "run", more=more)["arguments"]
    environment = os.environ | {
        "MEGAMF_FAULTS": json.dumps(faults), "OMP_NUM_THREADS": "1", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
    }  # fmt: skip
    command = [sys.executable, "-m", "megamf.train", *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_a_signal_while_the_process_starts(corpus, tmp_path):
    """As early as the process has its handlers: the first thing that is seen of it is torch being imported."""
    process = start(tmp_path, corpus, [], [])
    try:
        while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text() and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 75, said
    assert list_steps(tmp_path / "run" / "checkpoints") == [0]


def test_a_second_interrupt_ends_it_at_once(corpus, tmp_path):
    twice = [{"at": "forward", "action": "int", "step": 3, "times": 2}]
    process = start(tmp_path, corpus, twice, [])
    try:
        said, _ = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == -signal.SIGINT, said
    assert list_steps(tmp_path / "run" / "checkpoints") == [2]

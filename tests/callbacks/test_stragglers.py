"""The rank that holds up the others is named, whatever they wait in."""

import json
import socket
from pathlib import Path

import pytest

from megamf.callbacks.stragglers import slow_ranks

SETTINGS = [
    "model.vocab_size=61", "model.n_layer=1", "model.n_embd=16", "model.att_hidden=16", "model.ffd_hidden=16",
    "model.n_att_experts=4", "model.n_mlp_experts=4", "model.gating_size=8", "model.bos_token_id=null",
    "model.eos_token_id=0", "train.steps=9", "train.seq_len=24", "train.micro_batch=1", "train.global_batch=4",
    "optim.warmup_steps=1", "checkpoint.every=0", "logging.tensorboard=false", "logging.straggler_every=3",
    "logging.straggler_factor=2",
]  # fmt: skip
LAYOUTS = {
    "exchanges": ["parallel.ep=2", "deepspeed=zero1"],
    "reductions": ["parallel.ep=1", "deepspeed=zero2"],
    "data": ["parallel.ep=1", "deepspeed=zero0"],
}


@pytest.mark.parametrize(
    ("seconds", "slow"),
    [([1.0, 1.1, 0.9, 1.6], [3]), ([1.0, 1.4], []), ([3.0, 1.0], [0]), ([1.0] * 5 + [2.0, 4.0], [6, 5])],
)
def test_measured_against_the_median(seconds, slow):
    assert slow_ranks(seconds, 1.5) == slow


@pytest.fixture(scope="module")
def runs(corpus, launch_ranks, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("stragglers")
    jobs = []
    for name, layout in LAYOUTS.items():
        # Far longer than anything else in a step, on whatever machine.
        where = "data" if name == "data" else "forward"
        slow = {"at": where, "action": "sleep", "seconds": 0.4, "rank": 1, "times": 0}
        arguments = [f"run.dir={root / name}", f"data.train=[{{path: {corpus}}}]", *SETTINGS, *layout]
        jobs.append({"name": name, "arguments": arguments, "faults": [slow]})
    launch_ranks(Path(__file__).with_name("jobs_worker.py"), 2, jobs, root / "out")
    return root


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_slow_rank_is_named(runs, name):
    lines = [json.loads(line) for line in (runs / name / "metrics.jsonl").read_text().splitlines()]
    told = [line for line in lines if line.get("event") == "straggler"]
    assert told and {line["rank"] for line in told} == {1}
    # The first comparison may be drowned in what only happens once.
    assert told[-1]["step"] == 9 and told[-1]["ratio"] > 2 and told[-1]["host"] == socket.gethostname()
    # Two micro batches a step sleep; the data is read once.
    assert told[-1]["seconds"] > (0.4 if name == "data" else 0.8)
    said = (runs / "out" / f"{name}-0.err").read_text()
    assert f"rank 1 on {socket.gethostname()} is slow" in said

"""A batch that spoils loss or gradients leaves no trace: training goes on as if it had never been in the data."""

import json
from pathlib import Path

import pytest
import torch

from megamf.checkpoint import Checkpoint, list_steps, verify

STEPS, BATCH = 6, 8
SPOILT = 3  # the update in progress when it happens, counted from 1
LAYOUTS = {
    "zero0": {"deepspeed": "zero0", "ep": 2, "precision": "fp32"},
    "zero1": {"deepspeed": "zero1", "ep": 2, "precision": "fp32"},
    "zero1-bf16": {"deepspeed": "zero1", "ep": 1, "precision": "bf16"},
    "zero2": {"deepspeed": "zero2", "ep": 1, "precision": "fp32"},
    "zero2-bf16": {"deepspeed": "zero2", "ep": 2, "precision": "bf16"},
    "zero3": {"deepspeed": "zero3", "ep": 2, "precision": "fp32"},
    "zero3-bf16": {"deepspeed": "zero3", "ep": 1, "precision": "bf16"},
    "zero2-offload": {"deepspeed": "zero2_offload", "ep": 2, "precision": "bf16"},
    "zero3-offload": {"deepspeed": "zero3_offload", "ep": 2, "precision": "bf16"},
}
NAN_LOSS = {"at": "loss", "action": "nan", "rank": 1, "step": SPOILT, "after": 1}
NAN_GRADIENT = {"at": "backward", "action": "nan", "rank": 1, "step": SPOILT}


def config(root: Path, name: str, corpus: Path, deepspeed: str, ep: int, precision: str, **guards) -> dict:
    return {
        "run": {"dir": str(root / name), "seed": 5},
        "model": {
            "vocab_size": 61, "n_layer": 2, "n_embd": 16, "n_head": 1, "att_hidden": 16, "ffd_hidden": 20,
            "n_att_experts": 4, "n_mlp_experts": 4, "gating_size": 8, "moe_pdrop": 0.1, "resid_pdrop": 0.1,
            "bos_token_id": None, "eos_token_id": 0,
        },
        "data": {"train": [{"path": str(corpus)}]},
        "losses": {"balance_weight": 0.02, "scope": "micro_batch"},
        "optim": {"lr": 1e-2, "min_lr": 1e-3, "warmup_steps": 2},
        "train": {
            "steps": STEPS, "seq_len": 24, "micro_batch": 2, "global_batch": BATCH, "precision": precision,
        },
        "parallel": {"ep": ep},
        "guards": guards,
        "checkpoint": {"every": 2, "keep": 0},
        "logging": {"tensorboard": False},
        "deepspeed": deepspeed,
    }  # fmt: skip


@pytest.fixture(scope="module")
def runs(corpus, launch_ranks, tmp_path_factory) -> Path:
    """All jobs on two ranks, two micro batches a step, in one process group; a job `X-without` is the oracle of X."""
    root = tmp_path_factory.mktemp("guards")
    jobs = []

    def job(name, layout, faults=(), without=(), copy=None, **guards):
        source = [str(root / copy[0] / "checkpoints" / f"step-{copy[1]:08d}"), str(root / name)] if copy else None
        tree = config(root, name, corpus, **LAYOUTS[layout], **guards)
        jobs.append({"config": tree, "faults": list(faults), "without": list(without), "copy": source})

    for layout in LAYOUTS:
        fault = NAN_GRADIENT if layout in ("zero1", "zero2-bf16", "zero0", "zero3", "zero2-offload") else NAN_LOSS
        job(layout, layout, [fault])
        job(f"{layout}-without", layout, without=[(SPOILT - 1) * BATCH])
    spike = {"at": "loss", "action": "scale", "factor": 3.0, "rank": 0, "step": 5, "times": 2}
    job("spike", "zero1", [spike], spike_zscore=8.0, spike_window=3)
    job("spike-without", "zero1", without=[4 * BATCH])
    # Three bad batches in a row, two are too many: back to step 2, and over the data of steps 3 to 5.
    three = NAN_LOSS | {"step": 4, "after": 0, "times": 6}
    job("back", "zero1", [three], max_skips=2)
    job("back-without", "zero1", copy=("zero1-without", 2), without=[k * BATCH for k in (2, 3, 4, 5)])
    for_ever = NAN_LOSS | {"step": 4, "after": 0, "times": 0}
    job("lost", "zero2", [for_ever], max_skips=1, max_rollbacks=1)
    job("no-way-back", "zero1", [NAN_LOSS | {"step": 1, "after": 0}], max_skips=0)
    job("strict", "zero1", [NAN_LOSS], skip_nonfinite=False)
    launch_ranks(Path(__file__).with_name("guard_worker.py"), 2, jobs, root / "out")
    return root


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> dict[int, tuple[float, float, float]]:
    return {line["step"]: (line["loss"], line["lr"], line["grad_norm"]) for line in lines(run) if "loss" in line}


def events(run: Path) -> list[dict]:
    return [line for line in lines(run) if "event" in line]


def assert_same_state(run: Path, other: Path, step: int) -> None:
    name = f"checkpoints/step-{step:08d}"
    with Checkpoint(run / name) as one, Checkpoint(other / name) as two:
        assert one.state["optimizer_step"] == two.state["optimizer_step"] == step
        assert one.groups == two.groups
        for group in one.groups:
            for tensor in one.names(group):
                assert torch.equal(one.tensor(tensor, group), two.tensor(tensor, group)), f"{group}/{tensor}"


@pytest.mark.parametrize("name", [*LAYOUTS, "spike"])
def test_a_skipped_batch_leaves_no_trace(runs, name):
    found, wanted = losses(runs / name), losses(runs / f"{name}-without")
    assert sorted(found) == list(range(1, STEPS + 1))
    assert found == wanted
    assert_same_state(runs / name, runs / f"{name}-without", STEPS)
    [event] = events(runs / name)
    spoilt = 5 if name == "spike" else SPOILT
    assert (event["event"], event["step"], event["consumed_samples"]) == ("skip", spoilt - 1, spoilt * BATCH)
    assert ("loss spike" if name == "spike" else "not finite") in event["reason"]
    with Checkpoint(runs / name / "checkpoints" / f"step-{STEPS:08d}") as checkpoint:
        assert checkpoint.state["consumed_samples"] == (STEPS + 1) * BATCH


def test_after_too_many_the_run_goes_back_and_over_the_data(runs):
    found, wanted = losses(runs / "back"), losses(runs / "back-without")
    assert sorted(found) == list(range(1, STEPS + 1)) and sorted(wanted) == [3, 4, 5, 6]
    assert {step: found[step] for step in wanted} == wanted
    assert_same_state(runs / "back", runs / "back-without", STEPS)
    told = events(runs / "back")
    assert [event["event"] for event in told] == ["skip", "skip", "skip", "rollback"]
    assert told[-1] | {"step": 2, "from_step": 3, "consumed_samples": 6 * BATCH} == told[-1]
    assert told[-1]["checkpoint"] == "step-00000002"
    with Checkpoint(runs / "back" / "checkpoints" / "step-00000002") as checkpoint:
        assert checkpoint.state["consumed_samples"] == 6 * BATCH and checkpoint.state["guard"]["rollbacks"] == 1


def test_a_bounded_number_of_rollbacks(runs):
    for rank in (0, 1):
        ended = json.loads((runs / "out" / f"lost-{rank}.json").read_text())
        assert "max_rollbacks=1" in ended["failure"] and ended["step"] == 3
    assert [event["event"] for event in events(runs / "lost")] == ["skip", "skip", "rollback", "skip", "skip"]
    assert list_steps(runs / "lost" / "checkpoints") == [2]


def test_nothing_to_go_back_to(runs):
    ended = json.loads((runs / "out" / "no-way-back-1.json").read_text())
    assert "no good checkpoint" in ended["failure"] and ended["step"] == 0


def test_without_skipping_the_run_ends_at_once(runs):
    ended = json.loads((runs / "out" / "strict-0.json").read_text())
    assert "skip_nonfinite=false" in ended["failure"] and "loss nan" in ended["failure"]
    assert list_steps(runs / "strict" / "checkpoints") == [2]


def test_everything_written_is_good(runs):
    for path in sorted(runs.glob("*/checkpoints/step-*")):
        assert verify(path) == [], path

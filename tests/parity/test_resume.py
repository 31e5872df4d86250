"""A resumed run is the same run: bit for bit on the same topology, to rounding on every other, moments included."""

import json
from pathlib import Path

import pytest
import torch

from megamf.checkpoint import Checkpoint, verify
from megamf.modularity.edit import Kept, rearrange
from megamf.modularity.places import Place

STEPS = 8


def config(root: Path, name: str, corpus: Path, ranks: int, ep: int, stage: int, precision: str) -> dict:
    return {
        "run": {"dir": str(root / name), "seed": 5},
        "model": {
            "vocab_size": 61, "n_layer": 2, "n_embd": 16, "n_head": 1, "att_hidden": 16, "ffd_hidden": 20,
            "n_att_experts": 4, "n_mlp_experts": 8, "gating_size": 8, "moe_pdrop": 0.1, "resid_pdrop": 0.1,
            "bos_token_id": None, "eos_token_id": 0,
        },
        "data": {"train": [{"path": str(corpus)}]},
        "losses": {"balance_weight": 0.02},
        "optim": {"lr": 1e-2, "min_lr": 1e-3, "warmup_steps": 2},
        "train": {
            "steps": STEPS, "seq_len": 24, "micro_batch": 1, "global_batch": 8, "precision": precision,
        },
        "parallel": {"ep": ep},
        "checkpoint": {"every": 2, "keep": 0},
        "logging": {"tensorboard": False},
        "deepspeed": f"zero{stage}",
    }  # fmt: skip


def without_dropout(tree: dict) -> dict:
    # Dropout masks belong to a rank: only the same topology repeats them.
    tree["model"] |= {"moe_pdrop": 0.0, "resid_pdrop": 0.0}
    return tree


@pytest.fixture(scope="module")
def runs(corpus, launch, tmp_path_factory) -> Path:
    """EP 2 on four ranks, through and resumed; then EP 2 -> one process -> EP 4, each from the one before.

    And EP 2 -> some modules less -> one process, and EP 2 again.
    """
    root = tmp_path_factory.mktemp("resume")

    def job(name: str, layout: tuple, source: str | None = None, step: int = 4, *, dropout: bool = False) -> dict:
        tree = config(root, name, corpus, *layout)
        if not dropout:
            without_dropout(tree)
        step_name = f"checkpoints/step-{step:08d}"
        if source == "pruned":
            with Checkpoint(root / source / step_name) as checkpoint:
                tree["model"] = checkpoint.model
        return {"config": tree, "copy": [str(root / source / step_name), str(root / name)] if source else None}

    first = [
        job("full", (4, 2, 1, "fp32"), dropout=True),
        job("full-again", (4, 2, 1, "fp32"), "full", dropout=True),
        job("plain", (4, 2, 1, "fp32")),
        job("zero0", (4, 4, 0, "fp32"), "plain"),
        job("bf16", (4, 2, 2, "bf16")),
        job("bf16-again", (4, 2, 2, "bf16"), "bf16"),
        job("bf16-zero1", (4, 4, 1, "bf16"), "bf16"),
    ]
    launch("resume_worker.py", 4, first, root / "first")
    with Checkpoint(root / "plain" / "checkpoints" / "step-00000004") as source:
        left = {Place(0, "mlp"): (0, 2, 3, 5, 7), Place(1, "attention"): (0, 1, 3)}
        arrangement = {place: [Kept(index) for index in indices] for place, indices in left.items()}
        rearrange(source, root / "pruned" / "checkpoints", arrangement, what={"job": "prune"})
    second = [job("alone", (1, 1, 1, "fp32"), "plain"), job("pruned-alone", (1, 1, 1, "fp32"), "pruned")]
    launch("resume_worker.py", 1, second, root / "second")
    third = [job("ep4", (4, 4, 2, "fp32"), "alone", 6), job("pruned-ep2", (4, 2, 1, "fp32"), "pruned")]
    launch("resume_worker.py", 4, third, root / "third")
    return root


def losses(run: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


@pytest.mark.parametrize(("run", "again"), [("full", "full-again"), ("bf16", "bf16-again")])
def test_same_topology_is_bit_exact(runs, run, again):
    through, resumed = losses(runs / run), losses(runs / again)
    assert sorted(resumed) == [5, 6, 7, 8]
    assert resumed == {step: through[step] for step in resumed}
    final = f"checkpoints/step-{STEPS:08d}"
    with Checkpoint(runs / run / final) as one, Checkpoint(runs / again / final) as other:
        assert one.groups == other.groups
        for group in one.groups:
            for name in one.names(group):
                assert torch.equal(one.tensor(name, group), other.tensor(name, group)), f"{group}/{name}"


@pytest.mark.parametrize(
    ("run", "resumed", "steps"),
    [
        ("plain", "zero0", [5, 6, 7, 8]),
        ("plain", "alone", [5, 6, 7, 8]),
        ("plain", "ep4", [7, 8]),
        ("pruned-alone", "pruned-ep2", [5, 6, 7, 8]),
    ],
)
def test_other_topology_agrees_to_rounding(runs, run, resumed, steps):
    through, found = losses(runs / run), losses(runs / resumed)
    assert sorted(found) == steps
    for step in steps:
        assert found[step] == pytest.approx(through[step], abs=2e-5)
    final = f"checkpoints/step-{STEPS:08d}"
    with Checkpoint(runs / run / final) as one, Checkpoint(runs / resumed / final) as other:
        assert one.state["optimizer_step"] == other.state["optimizer_step"] == STEPS
        for group in one.groups:
            for name in one.names(group):
                wanted, got = one.tensor(name, group).double(), other.tensor(name, group).double()
                assert (got - wanted).norm() <= 1e-2 * wanted.norm() + 1e-12, f"{group}/{name}"


def test_moments_matter_to_this_test(runs):
    """The comparison above would notice moments lost: they are far from zero, and so is what AdamW makes of them."""
    with Checkpoint(runs / "plain" / "checkpoints" / "step-00000004") as checkpoint:
        assert all(checkpoint.tensor(name, "exp_avg_sq").abs().sum() > 0 for name in checkpoint.names("exp_avg_sq"))


def test_low_precision_keeps_masters_and_moves_between_stages(runs):
    through, found = losses(runs / "bf16"), losses(runs / "bf16-zero1")
    for step in (5, 6, 7, 8):
        assert found[step] == pytest.approx(through[step], abs=2e-2)
    with Checkpoint(runs / "bf16" / "checkpoints" / "step-00000008") as checkpoint:
        for name in checkpoint.names("master"):
            master, weights = checkpoint.tensor(name, "master"), checkpoint.tensor(name)
            assert master.dtype == torch.float32 and weights.dtype == torch.bfloat16
            assert torch.equal(master.bfloat16(), weights), name


def test_everything_written_is_good(runs):
    for path in sorted(runs.glob("*/checkpoints/step-*")):
        assert verify(path) == [], path

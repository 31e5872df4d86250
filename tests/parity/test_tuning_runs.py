"""Runs that train inserted modules alone: what moves, what is kept, what a checkpoint holds, and resuming."""

import json
from pathlib import Path

import pytest
import torch

from megamf.checkpoint import Checkpoint, verify
from megamf.config import ModelConfig
from megamf.model import ModuleFormer, initialise
from megamf.modularity.edit import Kept, rearrange
from megamf.modularity.insert import arrangement, random_row, random_template
from megamf.modularity.places import Place

STEPS = 4
OLD = {"attention": 4, "mlp": 5}
NEW = {"attention": 1, "mlp": 2}
MODEL = ModelConfig(
    vocab_size=61, n_layer=2, n_embd=16, n_head=1, att_hidden=16, ffd_hidden=20, n_att_experts=4, n_mlp_experts=5,
    gating_size=8, bos_token_id=None, eos_token_id=0,
)  # fmt: skip


def config(root: Path, corpus: Path, name: str, tune: dict, stage: int = 1, precision: str = "fp32") -> dict:
    with Checkpoint(root / "grown") as grown:
        model = grown.model
    return {
        "run": {"dir": str(root / name), "seed": 5},
        "model": model,
        "data": {"train": [{"path": str(corpus)}]},
        "losses": {"balance_weight": 0.02},
        "tune": tune,
        "optim": {"lr": 1e-2, "min_lr": 1e-3, "warmup_steps": 1},
        "train": {"steps": STEPS, "seq_len": 24, "micro_batch": 1, "global_batch": 4, "precision": precision},
        "checkpoint": {"every": 2, "keep": 0, "init_from": str(root / "grown")},
        "logging": {"tensorboard": False},
        "deepspeed": f"zero{stage}",
    }


@pytest.fixture(scope="module")
def runs(corpus, launch, save_model, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("tuning")
    model = ModuleFormer(MODEL)
    initialise(model, MODEL, 0)
    with Checkpoint(save_model(root / "base", model)) as base:
        grown = arrangement(
            base,
            NEW,
            lambda place, number: random_template(MODEL, place, number, 0),
            lambda place, number, _: random_row(MODEL, place, number, 0),
            zero_output=False,
        )
        rearrange(base, root / "grown", grown, what={"job": "insert"})

    def job(name: str, tune: dict, source: str | None = None, **layout) -> dict:
        step = "checkpoints/step-00000002"
        copy = None if source is None else [str(root / source / step), str(root / name)]
        return {"config": config(root, corpus, name, tune, **layout), "copy": copy}

    rows = {"strategy": "router_rows"}
    jobs = [
        job("rows0", rows, stage=0),
        job("rows", rows, stage=1),
        job("rows2", rows, stage=2),
        job("again", rows, "rows", stage=1),
        job("again2", rows, "rows", stage=2),
        job("pulled", rows | {"rows_regularisation": 3.0}, stage=1),
        job("inserted", {"strategy": "inserted", "embeddings": True}, stage=1),
        job("bf16", rows, stage=2, precision="bf16"),
        job("bf16-again", rows, "bf16", stage=2, precision="bf16"),
    ]
    launch("resume_worker.py", 2, jobs, root / "two")
    return root


def step(root: Path, run: str, number: int = STEPS) -> Checkpoint:
    return Checkpoint(root / run / "checkpoints" / f"step-{number:08d}")


def trained_modules() -> set[str]:
    """Names of all tensors of inserted modules."""
    return {
        f"{key}.{index}"
        for layer in range(2)
        for kind, count in OLD.items()
        for key in Place(layer, kind).expert_keys()
        for index in range(count, count + NEW[kind])
    }


def row_keys() -> dict[str, int]:
    """Router matrix -> its old rows."""
    return {Place(layer, kind).rows_key(MODEL): count for layer in range(2) for kind, count in OLD.items()}


@pytest.mark.parametrize("run", ["rows0", "rows", "rows2", "bf16"])
def test_only_inserted_modules_and_their_rows_move(runs, run):
    with step(runs, run) as after, Checkpoint(runs / "grown") as before:
        assert not verify(after.path)
        dtype = torch.bfloat16 if run == "bf16" else torch.float32
        assert after.names() == before.names() and after.logical_shapes() == before.logical_shapes()
        for name in after.names():
            old, new = before.tensor(name).to(dtype), after.tensor(name)
            if name in row_keys():
                kept = row_keys()[name]
                assert torch.equal(old[:kept], new[:kept]) and not torch.equal(old[kept:], new[kept:]), name
            else:
                assert torch.equal(old, new) == (name not in trained_modules()), name


def test_the_whole_router_and_the_ends_move_where_asked(runs):
    with step(runs, "inserted") as after, Checkpoint(runs / "grown") as before:
        moved = {name for name in after.names() if not torch.equal(after.tensor(name), before.tensor(name))}
        routers = {name for name in after.names() if ".gate." in name}
        assert moved == trained_modules() | routers | {"transformer.wte.weight", "lm_head.weight"}
        assert set(after.names("exp_avg")) == moved


@pytest.mark.parametrize("run", ["rows0", "rows", "rows2", "bf16"])
def test_moments_of_what_is_trained_alone(runs, run):
    with step(runs, run) as after:
        groups = {"exp_avg", "exp_avg_sq"} | ({"master"} if run == "bf16" else set())
        assert set(after.groups) == groups | {"weights"}
        for group in groups:
            assert set(after.names(group)) == trained_modules() | set(row_keys())
        for key, kept in row_keys().items():
            moment = after.tensor(key, "exp_avg_sq")
            assert not moment[:kept].any() and moment[kept:].any()


@pytest.mark.parametrize("run", ["rows", "rows2"])
def test_stages_agree(runs, run):
    assert losses(runs / run) == pytest.approx(losses(runs / "rows0"), abs=1e-5)


def losses(run: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


@pytest.mark.parametrize(("run", "again"), [("rows", "again"), ("bf16", "bf16-again")])
def test_resuming_is_bit_exact(runs, run, again):
    assert losses(runs / again) == {number: loss for number, loss in losses(runs / run).items() if number > 2}
    with step(runs, run) as one, step(runs, again) as other:
        assert one.manifest.tensors.keys() == other.manifest.tensors.keys()
        for group in one.groups:
            assert all(torch.equal(one.tensor(name, group), other.tensor(name, group)) for name in one.names(group))


def test_resuming_with_another_stage(runs):
    through, resumed = losses(runs / "rows"), losses(runs / "again2")
    assert resumed == pytest.approx({number: through[number] for number in (3, 4)}, abs=1e-5)


def test_regularisation_pulls_inserted_rows_to_zero(runs):
    def norm(run: str) -> float:
        with step(runs, run) as checkpoint:
            return sum(checkpoint.tensor(key)[kept:].square().sum().item() for key, kept in row_keys().items())

    assert norm("pulled") < 0.5 * norm("rows")


def test_surgery_on_what_was_tuned(runs, tmp_path):
    """Moments that are not there stay away; those that are go along."""
    place = Place(0, "mlp")
    with step(runs, "bf16") as source:
        rearrange(source, tmp_path / "out", {place: [Kept(i) for i in (1, 3, 4, 6)]}, what={"job": "prune"})
        with Checkpoint(tmp_path / "out") as pruned:
            assert not verify(pruned.path)
            key = place.expert_keys()[0]
            for group in ("exp_avg", "master"):
                assert [i for i in range(4) if pruned.has(f"{key}.{i}", group)] == [3]
                assert torch.equal(pruned.tensor(f"{key}.3", group), source.tensor(f"{key}.6", group))
            assert [row.provenance for row in pruned.modules if (row.layer, row.kind) == (0, "mlp")][-1] == "inserted"

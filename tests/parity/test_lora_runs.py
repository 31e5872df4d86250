"""Runs that train adapters beside frozen weights: what moves, what a checkpoint holds, resuming, and folding."""

import json
from pathlib import Path

import pytest
import torch

from megamf.adapt.fold import check_adapters, fold
from megamf.adapt.lora import adapter_shapes
from megamf.callbacks.checkpointing import inserted_modules
from megamf.checkpoint import Checkpoint, verify
from megamf.cli import run
from megamf.config import ModelConfig, validate
from megamf.config.run import Tune
from megamf.errors import UserError
from megamf.evaluate.load import load_model
from megamf.model import ModuleFormer, initialise
from megamf.tools import checkpoint as checkpoint_job
from megamf.tools import export_hf as export_job
from megamf.tools import modules as modules_job

STEPS = 4
SIZES = {"vocab_size": 61, "n_layer": 2, "n_embd": 16, "ffd_hidden": 20, "bos_token_id": None, "eos_token_id": 0}
MODELS = {
    "sparse": SIZES | {
        "n_head": 2, "att_hidden": 12, "n_att_experts": 4, "n_mlp_experts": 5, "n_mlp_experts_per_layer": [5, 3],
        "gating_size": 8,
    },
    "dense": SIZES | {"kind": "dense", "n_head": 2, "att_hidden": 16},
}  # fmt: skip
LORA = {"strategy": "lora", "lora_rank": 4, "lora_alpha": 12.0}
RUNS = {
    "sparse0": ("sparse", LORA, 0, "fp32"),
    "sparse1": ("sparse", LORA, 1, "fp32"),
    "sparse2": ("sparse", LORA, 2, "fp32"),
    "bf16": ("sparse", LORA | {"embeddings": True}, 2, "bf16"),
    "dense0": ("dense", LORA, 0, "fp32"),
    "dense1": ("dense", LORA | {"lora_targets": "attention"}, 1, "fp32"),
    "dense2": ("dense", LORA, 2, "bf16"),
}


def config(root: Path, corpus: Path, name: str, changes: dict | None = None) -> dict:
    model, tune, stage, precision = RUNS[name]
    return {
        "run": {"dir": str(root / name), "seed": 5},
        "model": MODELS[model],
        "data": {"train": [{"path": str(corpus)}]},
        "losses": {"balance_weight": 0.02} if model == "sparse" else {},
        "tune": tune,
        "optim": {"lr": 1e-2, "min_lr": 1e-3, "warmup_steps": 1},
        "train": {"steps": STEPS, "seq_len": 24, "micro_batch": 1, "global_batch": 4, "precision": precision},
        "checkpoint": {"every": 2, "keep": 0, "init_from": str(root / model)},
        "logging": {"tensorboard": False},
        "deepspeed": f"zero{stage}",
    } | (changes or {})


@pytest.fixture(scope="module")
def runs(corpus, launch, save_model, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("lora")
    for name, sizes in MODELS.items():
        model = ModuleFormer(ModelConfig(**sizes))
        initialise(model, model.config, 0)
        save_model(root / name, model)
    jobs = [{"config": config(root, corpus, name), "copy": None} for name in RUNS]
    for name in ("sparse1", "bf16", "dense1"):
        again = str(root / f"{name}-again")
        tree = config(root, corpus, name, {"run": {"dir": again, "seed": 5}})
        jobs.append({"config": tree, "copy": [str(root / name / "checkpoints/step-00000002"), again]})
    launch("resume_worker.py", 2, jobs, root / "two")
    return root


def step(root: Path, run: str, number: int = STEPS) -> Checkpoint:
    return Checkpoint(root / run / "checkpoints" / f"step-{number:08d}")


def losses(run: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


@pytest.mark.parametrize("name", RUNS)
def test_weights_stay_and_adapters_move(runs, name):
    model, tune, _, precision = RUNS[name]
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    ends = {"transformer.wte.weight", "lm_head.weight"} if tune.get("embeddings") else set()
    with step(runs, name) as after, Checkpoint(runs / model) as before:
        assert not verify(after.path)
        shapes = adapter_shapes(ModelConfig(**MODELS[model]), Tune(**tune))
        assert after.logical_shapes() == before.logical_shapes() | shapes
        for key in before.names():
            assert torch.equal(after.tensor(key), before.tensor(key).to(dtype)) == (key not in ends), key
        assert all(after.full(key).any() for key in shapes)
        groups = {"exp_avg", "exp_avg_sq"} | ({"master"} if precision == "bf16" else set())
        assert set(after.groups) == groups | {"weights"}
        for group in groups:
            assert after.logical_shapes(group).keys() == shapes.keys() | ends


def test_stages_agree(runs):
    for name in ("sparse1", "sparse2"):
        assert losses(runs / name) == pytest.approx(losses(runs / "sparse0"), abs=1e-5)


@pytest.mark.parametrize("name", ["sparse1", "bf16", "dense1"])
def test_resuming_is_bit_exact(runs, name):
    again = losses(runs / f"{name}-again")
    assert again == {number: loss for number, loss in losses(runs / name).items() if number > 2}
    with step(runs, name) as one, step(runs, f"{name}-again") as other:
        assert one.manifest.tensors.keys() == other.manifest.tensors.keys()
        for group in one.groups:
            assert all(torch.equal(one.tensor(key, group), other.tensor(key, group)) for key in one.names(group))


@pytest.mark.parametrize("name", ["sparse1", "bf16", "dense0", "dense2"])
def test_folded_is_the_sum(runs, name, tmp_path):
    precision = RUNS[name][3]
    with step(runs, name) as source:
        path = fold(source, tmp_path / "out")
        with Checkpoint(path) as plain:
            assert not verify(path)
            assert plain.logical_shapes() == {
                key: shape for key, shape in source.logical_shapes().items() if ".lora_" not in key
            }
            group = "master" if precision == "bf16" else "weights"
            for key, shape in plain.logical_shapes().items():
                value = source.full(key).double()
                if key in source.logical_shapes("master") and precision == "bf16":
                    value = source.full(key, "master").double()
                prefix = key.removesuffix(".weight")
                adapted = f"{prefix}.lora_A" in source.logical_shapes()
                if adapted:
                    a, b = (source.full(f"{prefix}.{part}", group).double() for part in ("lora_A", "lora_B"))
                    value = value + 12.0 / 4 * (a @ b if len(shape) == 3 else b @ a)
                    assert not torch.equal(plain.full(key), source.full(key))
                assert torch.equal(plain.full(key), value.to(plain.full(key).dtype)) or not adapted, key
                if adapted and precision == "bf16":
                    assert torch.equal(plain.full(key, "master"), value.float()), key
            assert plain.state["origin"]["edit"]["job"] == "fold" and "tune" not in plain.state["config"]
            assert plain.modules == source.modules
    # What reads checkpoints reads the one with adapters as if it were folded.
    input_BT = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(0))
    one, other = load_model(runs / name)[0], load_model(tmp_path / "out")[0]
    assert torch.equal(one(input_BT).hidden_BTD, other(input_BT).hidden_BTD)


def test_export(runs, tmp_path, capsys):
    """The base model's folder and the adapters' beside it; and one with everything in it."""
    sparse, out = str(runs / "sparse1"), tmp_path / "adapter"
    assert run(export_job.main, [sparse, str(out), "--adapters", "--base", "base"]) == 0
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == "base"
    assert (out / "adapter_model.safetensors").stat().st_size
    assert run(export_job.main, [sparse, str(tmp_path / "whole"), "--check"]) == 0
    printed = capsys.readouterr().out
    assert float(printed.split("to the checkpoint: ")[1]) < 1e-5
    for arguments, message in (
        (["--adapters", "--check"], "--check is about exported models"),
        (["--base", "x"], "--base belongs to --adapters"),
    ):
        assert run(export_job.main, [sparse, str(tmp_path / "third"), *arguments]) == 2
        assert message in " ".join(capsys.readouterr().err.split())


def run_it(root: Path, name: str, changes: dict) -> str | None:
    """What training says when it is refused, in one process; None where it is not."""
    tree = config(root, root / "text", name)
    for section, values in changes.items():
        tree[section] = tree.get(section, {}) | values
    try:
        checked = validate(tree)
        inserted_modules(checked)
        with Checkpoint(root / name) as opened:
            check_adapters(opened, checked.tune, begins=False)
    except UserError as error:
        return " ".join(str(error).split())
    return None


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("sparse1", {"tune": {"lora_rank": 6}}, "tune.lora_rank=4, this run says 6"),
        ("sparse1", {"tune": {"lora_alpha": 6.0}}, "tune.lora_alpha=12.0, this run says 6.0"),
        ("dense1", {"tune": {"lora_targets": "all"}}, "tune.lora_targets=attention, this run says all"),
        ("sparse1", {"tune": {"lora_rank": 12}}, "lora_rank=12 is no low rank of matrices whose smaller side is 12"),
        ("sparse1", {"tune": {"rows_regularisation": 1.0}}, "rows_regularisation=1.0 needs tune.strategy=inserted"),
        ("sparse1", {"losses": {"routing_regularisation": 1.0}}, "losses.routing_regularisation=1.0 has no effect"),
        ("sparse1", {"parallel": {"ep": 2}}, "tune.strategy=lora needs parallel.ep=1, not 2"),
        ("sparse1", {"tune": {"strategy": "full"}}, "tune.lora_rank=4 needs tune.strategy=lora, not full"),
        ("dense1", {"run": {"dir": "/new"}, "checkpoint": {"init_from": None}}, "this run starts from nothing"),
    ],
)  # fmt: skip
def test_runs_that_are_refused(runs, name, changes, message):
    assert message in (run_it(runs, name, changes) or "nothing was refused")


def test_adapters_and_other_runs(runs):
    """A checkpoint with adapters is gone on with, or folded; one without is started from."""
    folded = "megamf checkpoint fold"
    full = Tune()
    with step(runs, "sparse1") as source, Checkpoint(runs / "sparse") as base:
        for begins in (True, False):
            check_adapters(source, Tune(**LORA), begins=begins)
            check_adapters(base, full, begins=begins)
            with pytest.raises(UserError, match=folded):
                check_adapters(source, full, begins=begins)
        check_adapters(base, Tune(**LORA), begins=True)
        with pytest.raises(UserError, match=r"has no adapters, this run says lora.*init_from"):
            check_adapters(base, Tune(**LORA), begins=False)


def test_jobs(runs, tmp_path, capsys):
    sparse, out = str(runs / "sparse1"), str(tmp_path / "plain")
    assert run(checkpoint_job.main, ["fold", sparse, out]) == 0
    assert "12 adapters of rank 4" in capsys.readouterr().out
    assert run(checkpoint_job.main, ["fold", sparse, out]) == 2
    assert "already holds checkpoints" in capsys.readouterr().err
    assert run(checkpoint_job.main, ["fold", out, str(tmp_path / "third")]) == 2
    assert "has no adapters" in capsys.readouterr().err
    for arguments in (["insert", sparse, str(tmp_path / "x"), "--attention", "1"],
                      ["merge", sparse, str(tmp_path / "x"), "--with", str(runs / "sparse")],
                      ["merge", str(runs / "sparse"), str(tmp_path / "x"), "--with", sparse]):  # fmt: skip
        assert run(modules_job.main, arguments) == 2
        error = " ".join(capsys.readouterr().err.split())
        assert f"megamf checkpoint fold {runs}" in error.replace("- ", "-"), error
    assert not (tmp_path / "x").exists()
    assert run(modules_job.main, ["insert", out, str(tmp_path / "x"), "--attention", "1"]) == 0

"""A step on fake tensors: bytes against the formula and against each other. Real steps: test_measured_layouts.py."""

import json
from importlib import resources

import pytest
import torch
import torch.distributed as dist

from megamf import train
from megamf.cli import run
from megamf.config import load_config
from megamf.errors import UserError
from megamf.plan.fake import fake_process_group, fake_step, shares
from megamf.plan.job import Job
from megamf.plan.memory import rank_memory


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """engine(stage): a DeepSpeed configuration whose bucket is small beside the model."""
    folder = tmp_path_factory.mktemp("engines")

    def write(stage: int) -> str:
        tree = json.loads((resources.files("megamf.ds_configs") / f"zero{stage}.json").read_text())
        tree["zero_optimization"]["reduce_bucket_size"] = 1_000_000
        (folder / f"zero{stage}.json").write_text(json.dumps(tree))
        return f"deepspeed={folder / f'zero{stage}.json'}"

    return write


@pytest.mark.parametrize(
    ("ranks", "imbalance", "stage", "overrides"),
    [
        (1, 1.0, 1, ["train.precision=bf16", "train.activation_checkpointing=experts"]),
        (2, 1.0, 0, []),
        (4, 1.5, 2, ["parallel.ep=4", "parallel.attention_experts=move_tokens"]),
        (4, 1.5, 1, ["parallel.ep=2", "parallel.attention_experts=gather_weights",
                     "train.activation_checkpointing=full"]),
        (64, 1.0, 1, ["model.n_att_experts=64", "model.n_mlp_experts=64", "parallel.ep=64"]),
        (8, 1.0, 2, ["parallel.context=4"]),
    ],
)  # fmt: skip
def test_the_formula_agrees_with_the_count(engine, ranks, imbalance, stage, overrides):
    config = load_config(preset="nano", overrides=[engine(stage), "train.global_batch=512", *overrides])
    counted = fake_step(config, ranks, imbalance)
    formula = rank_memory(Job.of(config, ranks), imbalance)
    assert (formula.weights, formula.optimizer, formula.gradients) == (
        counted.weights, counted.optimizer, counted.gradients,
    )  # fmt: skip
    assert formula.peak == pytest.approx(counted.peak, rel=0.05)


def test_a_large_model_needs_no_memory_here():
    config = load_config(preset="molm-700m-8b", overrides=["model.n_layer=6", "parallel.ep=8"])
    counted = fake_step(config, 64)
    formula = rank_memory(Job.of(config, 64))
    # More than a gibibyte; nothing of it was allocated, or this would take its time.
    assert counted.peak > 2**30
    assert formula.peak == pytest.approx(counted.peak, rel=0.05)


def test_dense_models_too(engine):
    config = load_config(preset="dense-350m", overrides=["model.n_layer=3", "train.global_batch=64", engine(1)])
    assert rank_memory(Job.of(config, 8)).peak == pytest.approx(fake_step(config, 8).peak, rel=0.05)


def test_rows_are_shared_out_whole():
    assert shares(10, 4) == [2, 2, 3, 3]
    assert shares(0, 3) == [0, 0, 0]


def test_a_fake_world_is_not_made_inside_another():
    with fake_process_group(3):
        assert (dist.get_rank(), dist.get_world_size()) == (0, 3)
        with pytest.raises(UserError, match="inside a process group"), fake_process_group(2):
            pass
    assert not dist.is_initialized()
    assert torch.get_default_dtype() == torch.float32


def test_the_dry_run_counts_and_the_option_needs_it(capsys):
    given = ["--preset", "nano", "data.train=[{path: none}]", "train.global_batch=16", "parallel.ep=2"]
    assert run(train.main, [*given, "--dry-run", "--fake-world", "4"]) == 0
    printed = capsys.readouterr().out
    assert "4 ranks, ep 2" in printed and "counted" in printed and "fake process group" in printed
    with pytest.raises(SystemExit) as stopped:
        run(train.main, [*given, "--fake-world", "4"])
    assert stopped.value.code == 2
    assert "needs --dry-run" in capsys.readouterr().err

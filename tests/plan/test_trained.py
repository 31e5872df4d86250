"""Trained parameters by formula against the model itself, and what frozen ones save."""

import pytest

from megamf.adapt.lora import attach
from megamf.config import ConfigError, load_config
from megamf.model import ModuleFormer
from megamf.model.tuning import specialise
from megamf.plan.cluster import Cluster
from megamf.plan.fake import fake_step
from megamf.plan.flops import count_parameters
from megamf.plan.job import Job
from megamf.plan.layout import possible_degrees, warnings
from megamf.plan.memory import rank_memory
from megamf.plan.predict import predict
from megamf.plan.trained import trained_parameters

SMALL = ["model.n_layer=2", "model.vocab_size=500", "train.global_batch=16"]
INSERTED = {(0, "attention"): 1, (0, "mlp"): 2, (1, "mlp"): 1}
CASES = [
    ("nano", ["tune.strategy=lora", "tune.lora_rank=4"]),
    ("nano", ["tune.strategy=lora", "tune.lora_targets=mlp", "tune.embeddings=true"]),
    ("nano", ["tune.strategy=inserted", "tune.embeddings=true"]),
    ("nano", ["tune.strategy=inserted", "model.gate_type=gmm"]),
    ("nano", ["tune.strategy=router_rows"]),
    ("nano", ["tune.strategy=router_rows", "model.gate_type=linear"]),
]


def tuned(preset: str, overrides: list[str]):
    return load_config(preset=preset, overrides=[*SMALL, *overrides])


@pytest.mark.parametrize(("preset", "overrides"), CASES)
def test_the_count_is_that_of_the_model(preset, overrides):
    config = tuned(preset, overrides)
    model = ModuleFormer(config.model)
    whole = sum(parameter.numel() for parameter in model.parameters())
    specialise(model, config.tune, INSERTED)
    attach(model, config.tune, 0)
    found = trained_parameters(config, count_parameters(config.model), INSERTED)
    assert found.total == sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert found.added == sum(parameter.numel() for parameter in model.parameters()) - whole


@pytest.mark.parametrize(("preset", "overrides"), CASES)
@pytest.mark.parametrize("stage", [0, 2])
def test_the_formula_agrees_with_a_step_on_fake_tensors(preset, overrides, stage):
    config = tuned(preset, [*overrides, f"deepspeed=zero{stage}", "train.activation_checkpointing=experts"])
    counted = fake_step(config, 4, inserted=INSERTED)
    formula = rank_memory(Job.of(config, 4, inserted=INSERTED))
    assert (formula.weights, formula.optimizer, formula.gradients) == (
        counted.weights, counted.optimizer, counted.gradients,
    )  # fmt: skip
    # Of a model this small the formula is a tenth off when everything is trained, too.
    assert formula.peak == pytest.approx(counted.peak, rel=0.15)


def test_frozen_weights_need_no_more_than_themselves():
    config = load_config(preset="molm-350m-4b", overrides=["tune.strategy=lora"])
    job = Job.of(config, 8)
    everything = Job.of(load_config(preset="molm-350m-4b"), 8)
    found, whole = rank_memory(job), rank_memory(everything)
    assert found.weights == whole.weights + 2 * job.tuned.added
    assert found.optimizer == 12 * (-(-job.tuned.total // 8)) < whole.optimizer / 50
    both = [predict(run.config, Cluster.of("h100", 1, 8)) for run in (job, everything)]
    assert both[0].time.products < 0.8 * both[1].time.products
    assert both[0].time.zero < 0.1 * both[1].time.zero
    assert both[0].checkpoint.training < 0.2 * both[1].checkpoint.training


def test_layouts_that_the_run_would_refuse():
    config = tuned("nano", ["tune.strategy=lora"])
    assert possible_degrees(config, 4) == [1]
    with pytest.raises(ConfigError, match=r"tune\.strategy=lora needs parallel\.ep=1, not 2"):
        Job.of(config.model_copy(update={"parallel": config.parallel.model_copy(update={"ep": 2})}), 4)


def test_inserted_modules_that_nobody_counted():
    config = tuned("nano", ["tune.strategy=inserted"])
    found = predict(config, Cluster.of("h100", 1, 4))
    assert found.job.tuned is None
    assert any("figures are those of training everything" in said for said in warnings(found))

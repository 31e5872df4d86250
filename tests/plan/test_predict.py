"""Sizes that are exact: checkpoints against published and written ones."""

import json

import pytest
from safetensors.torch import load_file

from megamf.checkpoint import module_table, save
from megamf.config import load_config
from megamf.hf.layout import public_shapes
from megamf.model import ModuleFormer, initialise
from megamf.plan.cluster import Cluster
from megamf.plan.predict import predict, summary


def test_the_public_layout_of_the_8b_model_has_its_published_size():
    found = predict(load_config(preset="molm-700m-8b"), Cluster.of("h100", 8, 8))
    assert found.checkpoint.exported == 16_515_088_384
    # 2 weight + 4 master + 8 moments
    assert found.checkpoint.training == 14 * 8_182_046_720


def test_a_checkpoint_that_was_written_has_the_predicted_bytes(tmp_path):
    config = load_config(preset="nano")
    model = ModuleFormer(config.model)
    initialise(model, config.model, 0)
    tensors = {}
    for name, value in model.state_dict().items():
        parts = {f".{e}": value[e] for e in range(len(value))} if value.dim() == 3 else {"": value}
        for group in ("weights", "exp_avg", "exp_avg_sq"):
            tensors |= {f"{group}/{name}{suffix}": part for suffix, part in parts.items()}
    table = module_table(config.model.n_layer, config.model.n_att_experts, config.model.n_mlp_experts)
    path = save(tmp_path, 1, tensors, {}, table, config.model.model_dump(mode="json"), run_id="r")
    stored = 0
    for file in path.glob("*.safetensors"):
        stored += sum(tensor.nbytes for tensor in load_file(file).values())
    cluster = Cluster.of("cpu", 1, 1, memory=2**34, peak_flops=1e11)
    assert predict(config, cluster).checkpoint.training == stored


def test_the_tree_is_plain_json_and_adds_up():
    config = load_config(preset="molm-700m-8b", overrides=["parallel.ep=8"])
    found = predict(config, Cluster.of("h100", 8, 8))
    tree = json.loads(json.dumps(found.tree() | summary(config)))
    seconds = dict(tree["seconds"])
    step, hidden = seconds.pop("step"), seconds.pop("hidden")
    assert step == pytest.approx(sum(seconds.values())) and hidden >= 0
    assert tree["tokens_per_day"] == pytest.approx(86400 * 3072 * 1024 / step)
    assert tree["days_to_300b_tokens"] == pytest.approx(300e9 / tree["tokens_per_day"])
    assert tree["parameters"]["total"] == 8_182_046_720 == sum(_numel(s) for s in public_shapes(config.model).values())
    assert set(tree["attention_experts_bytes"]) == {"move_tokens", "gather_weights"}


def _numel(shape):
    count = 1
    for size in shape:
        count *= size
    return count

import json
import sys
from types import SimpleNamespace

import pytest

from megamf.config import ConfigError, load_config
from megamf.model import ModuleFormer, expert_indices
from megamf.parallel.zero import check_engine, deepspeed_config, parameter_groups

SMALL = ["train.micro_batch=2", "train.global_batch=16"]


def written(tmp_path, tree) -> str:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(tree) if not isinstance(tree, str) else tree)
    return str(path)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_auto_is_filled_from_the_run(stage):
    filled = deepspeed_config(load_config(overrides=[*SMALL, f"deepspeed=zero{stage}", "optim.clip=0.7"]), 4)
    assert filled["train_micro_batch_size_per_gpu"] == 2
    assert filled["gradient_accumulation_steps"] == 2
    assert filled["train_batch_size"] == 16
    assert filled["zero_optimization"]["stage"] == stage
    assert filled["bf16"] == {"enabled": False}
    # Stage 0 is clipped by megamf itself: DeepSpeed's norm there is the mean of the ranks'.
    assert filled["gradient_clipping"] == (0.0 if stage == 0 else 0.7)


@pytest.mark.parametrize(
    ("tree", "overrides", "message"),
    [
        ({"gradient_accumulation_steps": 3}, [], r"gradient_accumulation_steps=3.*says 2"),
        ({"bf16": {"enabled": True}}, [], r"bf16\.enabled=True.*says False"),
        ({"zero_optimization": {"stage": 4}}, [], r"stage=4 is not supported; stages: 0, 1, 2, 3"),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}},
            [],
            "offload_param.*offload_optimizer",
        ),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}, [], "zero_hpz_partition_size=2"),
        ({"zero_optimization": {"stage": 3, "zero_quantized_gradients": True}}, [], "zero_quantized_gradients=True"),
        ({"fp16": {"enabled": True}}, [], "fp16"),
        ({"optimizer": {"type": "Adam"}}, [], "section 'optimizer'"),
        ({"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}}, [], "stage is 0.*zero2_offload"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}, [], "'nvme' is not supported"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "ratio": 0.3}}}, [], "ratio=0.3"),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
            ["optim.implementation=apex"],
            "optim.implementation=torch",
        ),
        ({"unknown_size": "auto"}, [], "unknown_size"),
        ({"zero_optimization": {"stage": 0}}, ["train.precision=bf16"], "bf16.*stage 0"),
        ("{", [], "not valid JSON"),
        ("[]", [], "JSON object"),
    ],
)
def test_contradictions_are_refused(tmp_path, tree, overrides, message):
    config = load_config(overrides=[*SMALL, *overrides, f"deepspeed={written(tmp_path, tree)}"])
    with pytest.raises(ConfigError, match=message):
        deepspeed_config(config, 4)


def test_shared_sequences_count_once_in_the_json_and_for_every_rank_in_the_engine(tmp_path):
    """4 ranks, 2 to a sequence: two data ranks run 4 micro batches of 2 each, and DeepSpeed sees four ranks do so."""
    tree = {"train_batch_size": 16, "gradient_accumulation_steps": "auto"}
    config = load_config(overrides=[*SMALL, "parallel.context=2", f"deepspeed={written(tmp_path, tree)}"])
    filled = deepspeed_config(config, 4)
    assert filled["gradient_accumulation_steps"] == 4
    assert filled["train_batch_size"] == 2 * 4 * 4
    tree["train_batch_size"] = 32
    config = load_config(overrides=[*SMALL, "parallel.context=2", f"deepspeed={written(tmp_path, tree)}"])
    with pytest.raises(ConfigError, match=r"train_batch_size=32.*says 16"):
        deepspeed_config(config, 4)


def test_missing_file_lists_the_packaged_ones():
    with pytest.raises(ConfigError, match="zero0, zero1, zero2, zero2_offload, zero3, zero3_offload"):
        deepspeed_config(load_config(overrides=[*SMALL, "deepspeed=zero9"]), 4)


def test_only_matrices_decay_and_experts_are_apart():
    config = load_config(
        overrides=["model.vocab_size=7", "model.n_layer=1", "model.n_embd=8", "model.att_hidden=8",
                   "model.ffd_hidden=8", "model.gating_size=4", "model.gate_type=mlp"]
    )  # fmt: skip
    model = ModuleFormer(config.model)
    experts = expert_indices(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for name in experts:
        dict(model.named_parameters())[name].group_name = "ep_size_2"
    groups = parameter_groups(model, config.optim, experts)
    placed = {names[id(p)]: (g["weight_decay"], g.get("moe", False), g["name"]) for g in groups for p in g["params"]}
    assert placed.keys() == set(names.values())
    for name, (decay, moe, group) in placed.items():
        vector = name.endswith("bias") or ".ln_" in name
        assert decay == (0.0 if vector else config.optim.weight_decay), name
        assert moe == ("experts" in name), name
        if moe:
            assert group == "ep_size_2"


@pytest.mark.parametrize(
    ("recognised", "stage", "ranks"), [(False, 1, [0]), (False, 3, [0]), (True, 4, [0]), (True, 3, [0, 1])]
)
def test_an_engine_that_would_average_experts_is_refused(monkeypatch, recognised, stage, ranks):
    """At stage 3 the pieces must lie on the replicas, here rank 0 alone."""
    monkeypatch.setattr("torch.distributed.get_process_group_ranks", lambda group: group)
    engine = SimpleNamespace(has_moe_layers=recognised, zero_optimization_stage=lambda: stage)
    expert = SimpleNamespace(ds_process_group=ranks, ds_zero_placement_family="autoep_expert", ds_shape=(2, 3, 4))
    mesh = SimpleNamespace(edp_group=[0])
    with pytest.raises(RuntimeError, match="expert"):
        check_engine(engine, [expert], mesh)
    check_engine(engine, [], mesh)


def test_stage_3_with_experts_names_the_version_it_needs(monkeypatch):
    """An older DeepSpeed does not know experts at stage 3 and would average them over all ranks."""
    monkeypatch.setitem(sys.modules, "deepspeed.module_inject.auto_ep_layer", None)
    overrides = [*SMALL, "deepspeed=zero3"]
    deepspeed_config(load_config(overrides=overrides), 4)
    with pytest.raises(ConfigError, match=r"needs DeepSpeed 0\.19\.8.*parallel\.ep=1.*deepspeed=zero2"):
        deepspeed_config(load_config(overrides=[*overrides, "parallel.ep=2"]), 4)


@pytest.mark.parametrize("name", ["zero2_offload", "zero3_offload"])
def test_offload_needs_no_compiler(name):
    filled = deepspeed_config(load_config(overrides=[*SMALL, f"deepspeed={name}"]), 4)
    assert filled["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    assert filled["zero_force_ds_cpu_optimizer"] is False

"""Portions, layouts and derived sizes."""

import pytest
import yaml
from pydantic import ValidationError

from megamf.config import ConfigError, ModelConfig, RunConfig, dump, load_config, validate
from megamf.config.run import Parallel


def test_accumulation_steps_share_the_global_batch():
    train = load_config(overrides=["train.global_batch=48", "train.micro_batch=4"]).train
    assert [train.accumulation_steps(ranks) for ranks in (1, 2, 4)] == [12, 6, 3]
    with pytest.raises(ValueError, match=r"global_batch=48.*micro_batch=4.* 5 data-parallel ranks = 20"):
        train.accumulation_steps(5)


@pytest.mark.parametrize(
    ("ep", "ranks", "message"),
    [(4, 6, "world size 6 .*ep=4"), (3, 3, None), (16, 16, None), (17, 17, "layer 0 has 16 attention .*ep=17")],
)
def test_layouts_are_checked_against_ranks_and_experts(ep, ranks, message):
    if message is None:
        Parallel(ep=ep).check(ranks, ModelConfig())
        return
    with pytest.raises(ValueError, match=message):
        Parallel(ep=ep).check(ranks, ModelConfig())


def test_context_divides_ranks_sequences_and_batches():
    with pytest.raises(ValueError, match=r"world size 6 .*context=4"):
        Parallel(context=4).check(6, ModelConfig())
    with pytest.raises(ConfigError, match=r"seq_len=36 .*2 x parallel\.context=4 = 8"):
        load_config(overrides=["parallel.context=4", "train.seq_len=36"])
    config = load_config(overrides=["parallel.context=2", "train.global_batch=48", "train.micro_batch=4"])
    assert [config.accumulation_steps(ranks) for ranks in (2, 4, 8)] == [12, 6, 3]
    with pytest.raises(ValueError, match="5 data-parallel ranks = 20"):
        config.accumulation_steps(10)


def test_a_dense_model_has_nothing_to_share():
    with pytest.raises(ValueError, match=r"ep=2 .*dense"):
        Parallel(ep=2).check(2, ModelConfig(kind="dense"))


def test_keys_and_values_are_shared_exactly_as_in_the_release():
    assert ModelConfig().shares_kv
    assert not ModelConfig(n_head=8).shares_kv
    assert not ModelConfig(att_hidden=512).shares_kv
    assert not ModelConfig(kind="dense").shares_kv
    assert load_config(preset="molm-8b-hd128").model.head_dim == 128


def test_sections_check_later_changes_too():
    config = RunConfig()
    with pytest.raises(ValidationError):
        config.train.steps = -1


@pytest.mark.parametrize("preset", ["molm-350m-4b", "molm-700m-4b", "molm-700m-8b", "molm-8b-hd128", "dense-350m"])
def test_release_presets_train_the_published_budget(preset):
    config = load_config(preset=preset)
    batch = config.train.global_batch * config.train.seq_len
    assert abs(batch / 3e6 - 1) < 0.05
    assert abs(batch * config.train.steps / 300e9 - 1) < 1e-4
    for ranks in (1, 8, 64):
        config.train.accumulation_steps(ranks)
        config.parallel.check(ranks, config.model)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_packaged_deepspeed_files_leave_the_portions_to_the_run(stage):
    import json
    from importlib import resources

    tree = json.loads((resources.files("megamf.ds_configs") / f"zero{stage}.json").read_text())
    assert tree["zero_optimization"]["stage"] == stage
    portions = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    assert {tree[key] for key in portions} == {"auto"}
    assert tree["bf16"]["enabled"] == "auto"


def test_backends_are_named():
    names = ["experts.backend=triton", "attention.backend=csrc", "norm.backend=apex", "optim.implementation=apex"]
    config = load_config(overrides=names)
    chosen = config.experts.backend, config.attention.backend, config.norm.backend, config.optim.implementation
    assert chosen == ("triton", "csrc", "apex", "apex")
    with pytest.raises(ConfigError, match=r"experts.backend.*megablock"):
        load_config(overrides=["experts.backend=megablock"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_att_experts_per_layer": [4]}, "has 1 entries, n_layer is 2"),
        ({"n_att_experts_per_layer": [3, 2]}, "n_att_experts=4, but the largest of n_att_experts_per_layer is 3"),
        ({"n_mlp_experts_per_layer": [6, 1]}, "k_mlp=2 is larger than the 1 experts of layer 1"),
    ],
)
def test_layers_with_numbers_of_their_own(fields, message):
    sizes = {"n_layer": 2, "n_att_experts": 4, "n_mlp_experts": 6}
    with pytest.raises(ValueError, match=message):
        ModelConfig(**sizes, **fields)


def test_a_layer_is_built_from_its_own_numbers():
    config = ModelConfig(n_layer=2, n_att_experts=4, n_mlp_experts=6, n_mlp_experts_per_layer=[3, 6])
    assert [config.num_experts(layer, "mlp") for layer in (0, 1)] == [3, 6]
    assert [config.num_experts(layer, "attention") for layer in (0, 1)] == [4, 4]
    assert config.of_layer(0) == ModelConfig(n_layer=2, n_att_experts=4, n_mlp_experts=3)
    even = ModelConfig()
    assert even.of_layer(3) is even
    with pytest.raises(ValueError, match="neither attention nor mlp"):
        config.num_experts(0, "dense")


NEOX = {
    "kind": "gpt_neox", "vocab_size": 50, "n_layer": 1, "n_embd": 32, "n_head": 2, "att_hidden": 32, "ffd_hidden": 64,
    "parallel_residual": True, "rotary_fraction": 0.25, "rotary_base": 10000.0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rotary_base": None}, "kind=gpt_neox needs rotary_base"),
        ({"att_hidden": 64}, "att_hidden equal to n_embd=32, not 64"),
        ({"rotary_fraction": 0.2}, "0.2 of 16 head channels is 3: channels turn in pairs"),
        ({"rotary_fraction": 0.01}, "0.01 of 16 head channels is 0"),
        ({"k_mlp": 2}, "kind=gpt_neox has no experts, but these were set: k_mlp"),
        ({"kind": "dense"}, "kind=dense is no GPT-NeoX, but these were set: parallel_residual=True"),
        ({"kind": "moduleformer"}, "kind=moduleformer is no GPT-NeoX"),
    ],
)
def test_gpt_neox_fields(changes, message):
    assert not ModelConfig(**NEOX).sparse and ModelConfig(**NEOX).rotary_channels == 4
    with pytest.raises(ValueError, match=message):
        ModelConfig(**{**NEOX, **changes})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["attention.backend=naive"], "attention.backend=naive has no effect on model.kind=gpt_neox"),
        (["experts.backend=loop"], "experts.backend=loop has no effect"),
        (["train.activation_checkpointing=experts"], "needs experts, but model.kind=gpt_neox has none"),
        (["tune.strategy=inserted"], "tune.strategy=inserted needs experts, but model.kind=gpt_neox has none"),
        (["tune.strategy=router_rows"], "tune.strategy=router_rows needs experts"),
    ],
)
def test_gpt_neox_runs(overrides, message):
    model = [f"model.{name}={value}" for name, value in NEOX.items()]
    config = load_config(overrides=model)
    assert validate(yaml.safe_load(dump(config))).model == config.model
    for wrong, count in ((Parallel(ep=2), 2), (Parallel(context=2), 2)):
        with pytest.raises(ValueError, match="gpt_neox has"):
            wrong.check(count, config.model)
    with pytest.raises(ConfigError, match=message):
        load_config(overrides=[*model, *overrides])

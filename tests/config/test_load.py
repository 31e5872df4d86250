"""Merging, overrides, refusals and the round trip of the run configuration."""

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from megamf.config import ConfigError, dump, load_config, preset_names, to_tree, validate
from megamf.config.load import merge, parse_override


def write(tmp_path, text):
    file = tmp_path / "run.yaml"
    file.write_text(text, encoding="utf-8")
    return file


@pytest.mark.parametrize("preset", preset_names())
def test_every_preset_survives_the_round_trip(preset, tmp_path):
    config = load_config(preset=preset)
    again = load_config(write(tmp_path, dump(config)))
    assert again == config
    assert dump(again) == dump(config)


def test_dense_dump_leaves_the_expert_fields_out(tmp_path):
    tree = to_tree(load_config(preset="nano-dense"))
    assert tree["model"]["kind"] == "dense"
    assert not {"n_att_experts", "k_att", "gating_size"} & tree["model"].keys()


def test_later_layers_win_key_by_key(tmp_path):
    file = write(tmp_path, "train: {seq_len: 96}\noptim: {lr: 2e-3}\n")
    config = load_config(file, preset="nano", overrides=["train.micro-batch=2", "optim.lr=5e-4"])
    assert (config.train.seq_len, config.train.micro_batch, config.optim.lr) == (96, 2, 5e-4)
    assert config.model.n_embd == 192


def test_overrides_are_yaml():
    tree = parse_override("data.train=[{path: a/b, weight: 2}]")
    assert tree == {"data": {"train": [{"path": "a/b", "weight": 2}]}}
    assert parse_override("optim.lr=3e-4") == {"optim": {"lr": 3e-4}}
    assert parse_override("logging.wandb=null") == {"logging": {"wandb": None}}
    assert parse_override("run.dir=runs/a=b") == {"run": {"dir": "runs/a=b"}}
    assert parse_override("run.dir=2e") == {"run": {"dir": "2e"}}


@pytest.mark.parametrize("text", ["train.steps", "=3", "a.b=[1"])
def test_malformed_overrides_are_refused_with_their_text(text):
    with pytest.raises(ConfigError) as error:
        parse_override(text)
    assert text in str(error.value)


def test_unknown_keys_are_named_with_their_value():
    with pytest.raises(ConfigError, match=r"unknown key train\.step \(value 7\)"):
        load_config(overrides=["train.step=7"])
    with pytest.raises(ConfigError, match=r"unknown key trian"):
        load_config(overrides=["trian.steps=7"])


def test_all_problems_are_listed_at_once():
    with pytest.raises(ConfigError) as error:
        load_config(overrides=["train.step=7", "optim.lr=-1"])
    assert "train.step" in str(error.value)
    assert "optim.lr" in str(error.value)
    assert "-1" in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "values"),
    [
        (["train.global_batch=10", "train.micro_batch=4"], ["10", "4"]),
        (["optim.lr=1e-4", "optim.min_lr=1e-3"], ["0.0001", "0.001"]),
        (["optim.schedule=wsd"], ["wsd", "0"]),
        (["optim.schedule=cosine", "optim.decay_steps=5"], ["5", "cosine"]),
        (["optim.warmup_steps=50", "train.steps=20"], ["50", "20"]),
        (["model.k_att=17"], ["17", "16"]),
        (["model.k_mlp=2", "model.sample_topk=3"], ["3", "2"]),
        (["model.att_hidden=100", "model.n_head=3"], ["100", "3"]),
        (["losses.concentration=0.1"], ["0.1", "mi"]),
        (["data.valid=[{path: v}]", "data.valid_fraction=0.1"], ["1", "0.1"]),
        (["model.kind=dense", "model.k_att=2"], ["dense", "k_att"]),
    ],
)
def test_contradictions_print_both_values(overrides, values):
    with pytest.raises(ConfigError) as error:
        load_config(overrides=overrides)
    for value in values:
        assert value in str(error.value)


def test_a_key_given_twice_is_refused_with_both_values_and_its_line(tmp_path):
    file = write(tmp_path, "train:\n  steps: 5\n  steps: 6\n")
    with pytest.raises(ConfigError, match=r"line 3: key 'steps' is given twice: 5 and 6"):
        load_config(file)


def test_yaml_that_is_no_mapping_or_no_yaml_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="must hold sections"):
        load_config(write(tmp_path, "- 1\n"))
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(write(tmp_path, "train: [1\n"))
    with pytest.raises(ConfigError, match=r"train: .*got 5"):
        load_config(write(tmp_path, "train: 5\n"))


def test_yaml_cannot_build_objects(tmp_path):
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(write(tmp_path, "run: !!python/object/apply:os.getcwd []\n"))


def test_yaml_merge_keys_and_aliases_work(tmp_path):
    file = write(tmp_path, "data:\n  train: &t\n  - {path: a}\n  valid: *t\n")
    config = load_config(file)
    assert config.data.train == config.data.valid


def test_missing_file_and_preset_are_named(tmp_path):
    with pytest.raises(ConfigError, match="no configuration file at"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match=r"no preset 'molm'; presets: .*nano"):
        load_config(preset="molm")


def test_nothing_is_coerced_silently():
    overrides = (
        "train.steps=1.5", "train.steps=many", "train.steps=0", "train.steps=true", "train.steps='5'", "optim.lr=true",
        "data.document_mask=perhaps", "data.document_mask=1", "run.dir=5",
    )  # fmt: skip
    for override in overrides:
        with pytest.raises(ConfigError) as error:
            load_config(overrides=[override])
        assert override.partition("=")[0] in str(error.value)


trees = st.recursive(
    st.integers() | st.booleans(), lambda inner: st.dictionaries(st.sampled_from("abc"), inner, max_size=3)
)


@given(st.dictionaries(st.sampled_from("abc"), trees), st.dictionaries(st.sampled_from("abc"), trees))
def test_merge_keeps_what_the_top_does_not_name(base, top):
    merged = merge(base, top)
    assert merged.keys() == base.keys() | top.keys()
    for key, value in merged.items():
        if key not in top:
            assert value == base[key]
        elif not (isinstance(value, dict) and isinstance(base.get(key), dict)):
            assert value == top[key]


def test_validate_takes_what_dump_writes():
    config = load_config(preset="nano")
    assert validate(yaml.safe_load(dump(config))) == config


def test_a_model_taken_from_a_checkpoint(tmp_path):
    model = load_config(overrides=["model.n_layer=2"]).model
    pruned = model.model_copy(update={"n_mlp_experts": 30, "n_mlp_experts_per_layer": [30, 7], "resid_pdrop": 0.1})
    path = tmp_path / "run.yaml"
    path.write_text("model: {n_layer: 2, n_mlp_experts: 32}\n")
    # The file of the original run serves; dropout is as the checkpoint has it, or as it is given.
    assert load_config(path, model=pruned).model == pruned
    assert load_config(path, overrides=["model.resid_pdrop=0.3"], model=pruned).model.resid_pdrop == 0.3
    with pytest.raises(ConfigError, match=r"model\.n_mlp_experts=32 in the command line, 30 in the checkpoint"):
        load_config(path, overrides=["model.n_mlp_experts=32"], model=pruned)
    path.write_text("model: {n_layer: 2, n_embd: 512}\n")
    with pytest.raises(ConfigError, match=r"model\.n_embd=512 in the configuration file or preset, 1024 in the check"):
        load_config(path, model=pruned)
    with pytest.raises(ConfigError, match=r"unknown key model\.n_layr"):
        load_config(overrides=["model.n_layr=2"], model=pruned)


def test_a_dense_model_taken_from_a_checkpoint():
    dense = load_config(overrides=["model.kind=dense", "model.n_layer=2"]).model
    assert load_config(overrides=["model.n_layer=2"], model=dense).model == dense

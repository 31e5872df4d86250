"""GPT-NeoX folders written by transformers: imported, evaluated, exported again, refused where they do not fit."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM

from megamf.checkpoint import Checkpoint
from megamf.errors import UserError
from megamf.evaluate import load_model
from megamf.evaluate.generation import Sampling, generate
from megamf.evaluate.weights import expected_shapes, trained_length
from megamf.hf.convert import export_hf, import_hf, max_logit_difference
from megamf.hf.gpt_neox import shapes, to_model_config, to_public

TINY = {
    "vocab_size": 37, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 48, "initializer_range": 0.3, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
# As the released files have them: constants that no parameter stands for.
CONSTANTS = {
    "gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 48, 48, dtype=torch.bool).tril(),
    "gpt_neox.layers.0.attention.masked_bias": torch.tensor(-1e9),
    "gpt_neox.layers.1.attention.rotary_emb.inv_freq": torch.ones(1),
}


@pytest.fixture
def folder(tmp_path):
    def make(name="pythia", dtype=torch.float32, **changes):
        torch.manual_seed(0)
        model = GPTNeoXForCausalLM(GPTNeoXConfig(**{**TINY, **changes}))
        for parameter in model.parameters():
            if parameter.dim() == 1:
                torch.nn.init.normal_(parameter, 0.5, 0.3)
        model.to(dtype).save_pretrained(tmp_path / name)
        return tmp_path / name

    return make


def ids():
    return torch.randint(1, 37, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("dtype", "changes"),
    [(torch.float32, {}), (torch.float16, {"use_parallel_residual": False, "rotary_pct": 0.5, "rotary_emb_base": 99})],
)
def test_round_trip(folder, tmp_path, dtype, changes):
    place = folder(dtype=dtype, **changes)
    step = import_hf(place, tmp_path / "imported")
    with Checkpoint(step) as checkpoint:
        assert checkpoint.modules == [] and checkpoint.model["kind"] == "gpt_neox"
        assert checkpoint.state["origin"] == {"format": "GPT-NeoX layout", "name": "pythia"}
    report = export_hf(step, tmp_path / "exported", max_shard_bytes=3000)
    assert len(report.files) > 2 and not list((tmp_path / "exported").glob("*.py"))
    before, after = load_file(place / "model.safetensors"), {}
    for file in report.files:
        after |= load_file(tmp_path / "exported" / file)
    assert before.keys() == after.keys()
    for name, value in after.items():
        assert value.dtype == dtype and torch.equal(value, before[name]), name
    # Which names a configuration has is a matter of versions; what it says is not.
    one, two = (GPTNeoXConfig.from_pretrained(path).to_dict() for path in (place, tmp_path / "exported"))
    assert {**one, "_name_or_path": ""} == {**two, "_name_or_path": ""}
    ours, _ = load_model(step, torch.float64)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", dtype=torch.float64)
    assert type(theirs) is GPTNeoXForCausalLM
    found = ours.logits(ours(ids()).hidden_BTD)
    assert (found - theirs(ids()).logits).abs().max() < 1e-12 * found.abs().max()
    assert max_logit_difference(step, tmp_path / "exported") < 1e-4
    card = (tmp_path / "exported" / "README.md").read_text()
    assert "2 heads of 8" in card and "GPT-NeoX layout" in card and "experts" not in card and "trust_remote" not in card
    assert card.count("{") == card.count("}")


def test_a_folder_is_evaluated_as_it_is(folder):
    place = folder(use_cache=True)
    ours, config = load_model(place, torch.float64)
    theirs = GPTNeoXForCausalLM.from_pretrained(place, dtype=torch.float64)
    prompts = [[5, 6, 7, 8, 9], [3, 4]]
    made = zip(*generate(ours, prompts, 8, Sampling(temperature=0)))
    for prompt, row in zip(prompts, made):
        expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=None)
        assert list(row) == expected[0, len(prompt) :].tolist()
    assert config.kind == "gpt_neox" and trained_length(place) == 48


def test_shapes_are_those_of_the_model(folder):
    config = to_model_config({"model_type": "gpt_neox", **TINY})
    assert shapes(config) == expected_shapes(config)
    assert to_model_config(to_public(config)) == config


def edit(place, change):
    weights = load_file(place / "model.safetensors")
    change(weights)
    save_file(weights, str(place / "model.safetensors"), metadata={"format": "pt"})


def test_constants_are_passed_over_and_either_name_of_the_head_will_do(folder, tmp_path):
    place = folder()
    name, other = "embed_out.weight", "lm_head.weight"
    edit(place, lambda w: w.update(CONSTANTS))
    edit(place, lambda w: w.update({other: w.pop(name)}))
    step = import_hf(place, tmp_path / "imported")
    ours, _ = load_model(step)
    assert torch.equal(ours.lm_head.weight, load_file(place / "model.safetensors")[other])
    edit(place, lambda w: w.update({name: w[other].clone()}))
    with pytest.raises(UserError, match=r"0 tensors are missing and 1 are unknown, first of no use: lm_head\.weight"):
        import_hf(place, tmp_path / "again")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda w: w.pop("gpt_neox.layers.1.mlp.dense_4h_to_h.bias"),
            r"missing: gpt_neox\.layers\.1\.mlp\.dense_4h_to",
        ),
        (lambda w: w.update({"transformer.wte.weight": torch.ones(1)}), r"of no use: transformer\.wte\.weight"),
        (
            lambda w: w.update({"gpt_neox.layers.0.attention.dense.weight": torch.ones(3, 4)}),
            r"gpt_neox\.layers\.0\.attention\.dense\.weight has shape \[3, 4\].* describes \[16, 16\]",
        ),
    ],
)
def test_every_tensor_is_used_exactly_once(folder, tmp_path, change, message):
    place = folder()
    edit(place, change)
    with pytest.raises(UserError, match=message):
        import_hf(place, tmp_path / "imported")
    assert not (tmp_path / "imported").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tie_word_embeddings": True}, "tie_word_embeddings=True is not supported, only False"),
        ({"attention_bias": False}, "attention_bias=False"),
        ({"attention_dropout": 0.1}, r"attention_dropout=0\.1"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_type='linear'"),
        ({"hidden_act": "mish"}, "activation_function.*'mish'"),
        ({"num_attention_heads": 3}, "divisible"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"rotary_pct": 0.4}, "channels turn in pairs"),
        ({"eos_token_id": [0, 1]}, "eos_token_id"),
    ],
)
def test_what_is_not_implemented_is_refused(folder, tmp_path, changes, message):
    place = folder()
    tree = json.loads((place / "config.json").read_text())
    tree.pop("rope_parameters")
    (place / "config.json").write_text(json.dumps(tree | changes))
    with pytest.raises(UserError, match=message):
        import_hf(place, tmp_path / "imported")


def test_what_cannot_be_exported(folder, tmp_path):
    step = import_hf(folder(), tmp_path / "imported")
    with pytest.raises(UserError, match="a GPT-NeoX has none"):
        export_hf(step, tmp_path / "exported", buffers=True)
    config = to_model_config({"model_type": "gpt_neox", **TINY})
    with pytest.raises(UserError, match=r"embd_pdrop=0.0 and resid_pdrop=0.1"):
        to_public(config.model_copy(update={"resid_pdrop": 0.1}))
    assert {path.name for path in tmp_path.iterdir()} == {"pythia", "imported"}

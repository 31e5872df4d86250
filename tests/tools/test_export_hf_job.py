"""`megamf export-hf`: what is printed and written, the check, and mistakes."""

import json

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import megamf.hf  # noqa: F401  (registers the model type)
from megamf.cli import run
from megamf.config import ModelConfig
from megamf.data.tokenizer import load_tokenizer, train_sentencepiece
from megamf.model import ModuleFormer, initialise
from megamf.tools.export_hf import main


@pytest.fixture
def checkpoint(tmp_path, save_model):
    def make(**changes):
        sizes = {"vocab_size": 290, "n_layer": 1, "n_embd": 16, "att_hidden": 16, "ffd_hidden": 16}
        experts = {"n_att_experts": 2, "n_mlp_experts": 2, "k_att": 1, "k_mlp": 1, "gating_size": 4}
        config = ModelConfig(**{**sizes, **({} if changes.get("kind") == "dense" else experts), **changes})
        model = ModuleFormer(config)
        initialise(model, config, 0)
        return str(save_model(tmp_path / "run" / f"{config.kind}-{config.vocab_size}", model))

    return make


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("export") / "t.model"
    train_sentencepiece(["def f(x):\n    return x + 1\n" * 20], path, 290)
    return str(path)


def test_export_with_tokenizer_and_check(checkpoint, tokenizer, tmp_path, capsys):
    out, record = tmp_path / "out", tmp_path / "record.json"
    arguments = [checkpoint(), str(out), "--tokenizer", tokenizer, "--check", "--json", str(record)]
    assert main(arguments) == 0
    printed, tree = capsys.readouterr().out, json.loads(record.read_text())
    assert tree["hf_max_abs_diff"] < 1e-4 and "largest difference of logits" in printed
    assert tree["tokenizer"]["differing"] == 0 and "ids equal on 2000 fuzzed texts" in printed
    assert tree["folder"] == str(out)
    text = "def f(x):\n    return 世"
    theirs = AutoTokenizer.from_pretrained(out)
    assert theirs(text)["input_ids"] == load_tokenizer(tokenizer).encode(text)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.eos_token_id == theirs.eos_token_id == model.generation_config.eos_token_id == 2
    answer = model.generate(
        **theirs(["def", "return x"], return_tensors="pt", padding=True, padding_side="left"), max_new_tokens=4
    )
    assert len(theirs.batch_decode(answer)) == 2


def test_options(checkpoint, tmp_path):
    step = checkpoint()
    assert main([step, str(tmp_path / "out"), "--dtype", "bfloat16", "--include-buffers", "--max-shard-mb", "1"]) == 0
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file()
    assert main([step, str(tmp_path / "out"), "--overwrite"]) == 0
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()


def test_mistakes(checkpoint, tokenizer, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("kept")
    cases = [
        ([str(tmp_path / "none"), "X"], "none"),
        ([checkpoint(), str(tmp_path / "out")], "exists already"),
        ([checkpoint(kind="dense"), "X"], "kind=dense"),
        ([checkpoint(vocab_size=200), "X", "--tokenizer", tokenizer], "290 ids, the model's vocabulary 200"),
        ([checkpoint(), "X", "--json", str(tmp_path / "no" / "file")], "does not exist"),
    ]
    for arguments, message in cases:
        arguments = [str(tmp_path / "fresh") if word == "X" else word for word in arguments]
        assert run(main, arguments) == 2
        assert message in capsys.readouterr().err
        assert {path.name for path in tmp_path.iterdir()} <= {"run", "out"}
    assert (tmp_path / "out" / "file").read_text() == "kept"

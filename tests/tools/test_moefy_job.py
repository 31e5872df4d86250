"""`megamf moefy`: from folder and text to a converted model, and mistakes that write nothing."""

import json

import pytest
import torch
import transformers as hf

from megamf.cli import run
from megamf.config import ModelConfig
from megamf.evaluate.load import load_model
from megamf.model import ModuleFormer, initialise
from megamf.tools.moefy import main

WORDS = [f"word{i}" for i in range(40)]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Documents that count words, one a line."""
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    lines = [json.dumps({"text": " ".join(WORDS[(s + i) % 40] for i in range(25))}) for s in range(60)]
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random Llama-like model with ReLU and a tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    path = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1} | {w: i + 2 for i, w in enumerate(WORDS)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(path)
    config = hf.LlamaConfig(
        vocab_size=42, hidden_size=16, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        hidden_act="silu", bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    hf.LlamaForCausalLM(config).save_pretrained(path)
    return path


SMALL = ["--expert-size", "16", "--tokens", "256", "--seq-len", "16", "--epochs", "2", "--batch", "8"]


@pytest.mark.parametrize("calibration", [["out", "--calibrate-steps", "3"], ["layer"]])
def test_from_swiglu_to_experts(folder, text, tmp_path, capsys, calibration):
    out, report = tmp_path / "out", tmp_path / "report.json"
    given = [
        str(folder),
        str(out),
        "--data",
        str(text),
        *SMALL,
        "--share",
        "0.5",
        "--relufy-steps",
        "8",
        "--lr",
        "3e-3",
    ]
    assert main([*given, "--lr", "3e-3", "--calibrate", *calibration, "--json", str(report)]) == 0
    tree = json.loads(report.read_text())
    assert tree["relufied"] < tree["dense"] and tree["settings"]["activation"] == "relu"
    assert tree["settings"]["num_selected"] == 2 and len(tree["layers"]) == 2
    assert {"config.json", "modeling_moefied.py", "sparse_ffn.py", "tokenizer.json", "model.safetensors"} <= {
        path.name for path in out.iterdir()
    }
    assert f"{tree['calibrated']:.4f}" in capsys.readouterr().out


def test_a_megamf_checkpoint(folder, text, tmp_path, save_model):
    config = ModelConfig(
        kind="dense", vocab_size=64, n_layer=2, n_embd=16, n_head=2, att_hidden=16, ffd_hidden=64,
        activation_function="relu",
    )  # fmt: skip
    model = ModuleFormer(config)
    initialise(model, config, 0)
    step = save_model(tmp_path / "dense", model)
    given = [str(step), str(tmp_path / "out"), "--data", str(text), "--tokenizer", str(folder), *SMALL]
    assert run(main, given) == 2
    assert not (tmp_path / "out").exists()
    assert main([*given, "--format", "checkpoint", "--split", "clustering"]) == 0
    again, found = load_model(tmp_path / "out")
    assert (found.k_mlp, found.n_mlp_experts, found.gate_type) == (1, 4, "tanh")
    assert again.logits(again(torch.arange(8)[None]).hidden_BTD).isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "use silu, whose neurons are never zero"),
        (["--by-magnitude", "--expert-size", "24"], "sizes that divide: 1, 2, 4, 8, 16, 32"),
        (["--by-magnitude", "--share", "0.1"], "leaves 0 for a token"),
        (["--by-magnitude", "--format", "checkpoint"], "is no megamf checkpoint"),
        (["--by-magnitude", "--tokenizer", "nowhere"], "no tokenizer"),
        (["--by-magnitude", "--valid", "nowhere.jsonl"], "no input at nowhere.jsonl"),
    ],
)
def test_mistakes(folder, text, tmp_path, capsys, options, message):
    assert run(main, [str(folder), str(tmp_path / "out"), "--data", str(text), *SMALL, *options]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert list(tmp_path.iterdir()) == []


def test_too_little_text_and_a_place_that_is_taken(folder, tmp_path, capsys):
    (tmp_path / "one.jsonl").write_text('{"text": "word1 word2"}\n')
    given = ["--data", str(tmp_path / "one.jsonl"), *SMALL, "--by-magnitude"]
    assert run(main, [str(folder), str(tmp_path / "out"), *given]) == 2
    assert "holds 1 usable document" in capsys.readouterr().err
    assert run(main, [str(folder), str(tmp_path), *given]) == 2
    assert "exists already" in capsys.readouterr().err
    assert run(main, [str(tmp_path / "none"), str(tmp_path / "out"), *given]) == 2
    assert "no model at" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["one.jsonl"]

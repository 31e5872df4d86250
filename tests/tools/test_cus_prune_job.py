"""`megamf cus-prune`: what it writes and says, and what it refuses before anything is written."""

import json

import pytest
import torch
from compress_models import llama, molm
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from megamf.cli import run
from megamf.compress.folder import load_causal_lm
from megamf.tools.cus_prune import main

WORDS = [f"w{i}" for i in range(38)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Folders of a tiny Llama, ModuleFormer and BERT with a tokenizer, and document sets."""
    root = tmp_path_factory.mktemp("cus_prune")
    fast = Tokenizer(models.WordLevel({"<unk>": 0, "<eos>": 1, **{w: i + 2 for i, w in enumerate(WORDS)}}, "<unk>"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=fast, unk_token="<unk>", eos_token="<eos>")
    bert = BertModel(
        BertConfig(vocab_size=40, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    )
    for name, model in {"llama": llama(), "molm": molm(), "bert": bert}.items():
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    generator = torch.Generator().manual_seed(0)
    for name, count in {"french": 4, "manuals": 3, "one": 1, "none": 0}.items():
        rows = [" ".join(WORDS[i] for i in torch.randint(38, (12,), generator=generator)) for _ in range(count)]
        (root / f"{name}.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return root


def test_an_expert_is_written_with_tokenizer_report_and_card(place, tmp_path, capsys):
    out = tmp_path / "expert"
    arguments = [str(place / "llama"), str(out), "--language", str(place / "french.jsonl"), "--domain"]
    arguments += [str(place / "manuals.jsonl"), "--ratio", "0.3", "--budget", "layer", "--attention", "none"]
    arguments += ["--multiple", "2", "--loss", str(place / "manuals.jsonl"), "--json", str(tmp_path / "report.json")]
    assert run(main, arguments) == 0
    said = capsys.readouterr().out
    report = json.loads((out / "pruning.json").read_text())
    assert report == json.loads((tmp_path / "report.json").read_text())
    assert report["documents"] == {"language": {"count": 4, "tokens": 48}, "domain": {"count": 3, "tokens": 36}}
    assert report["parameters"] - report["parameters_left"] == report["removed_parameters"] > 0
    (loss,) = report["loss"].values()
    assert loss["before"] != loss["after"]
    assert "a plain folder" in said and f"{report['parameters_left']:,} of {report['parameters']:,}" in said
    model, tokenizer = load_causal_lm(out)
    assert model.config.model_type == "llama" and model.config.intermediate_size % 2 == 0
    assert model.num_parameters() == report["parameters_left"]
    assert tokenizer("w3 w4")["input_ids"] == [5, 6]
    card = (out / "README.md").read_text()
    assert "language (4 documents), domain (3 documents)" in card and "trust_remote_code" not in card


@pytest.mark.parametrize("method", ["random", "layers", "slicing"])
def test_other_methods_write_folders_too(method, place, tmp_path, capsys):
    out = tmp_path / method
    arguments = [str(place / "llama"), str(out), "--task", str(place / "french.jsonl"), "--method", method]
    assert run(main, [*arguments, "--ratio", "0.5", "--length", "12"]) == 0
    report = json.loads((out / "pruning.json").read_text())
    assert report["method"] == method and report["parameters_left"] < report["parameters"]
    assert ("modelling file" in capsys.readouterr().out) == (method != "layers")


def test_modules_of_a_moduleformer(place, tmp_path):
    out = tmp_path / "few"
    arguments = [str(place / "molm"), str(out), "--task", str(place / "french.jsonl"), "--experts", "modules"]
    assert run(main, arguments) == 0
    model, _ = load_causal_lm(out)
    assert sum(len(block.mlpf.experts.weight) for block in model.transformer.h) < 8


def refused(arguments, capsys) -> str:
    assert run(main, [str(argument) for argument in arguments]) == 2
    return capsys.readouterr().err


def test_bad_input_ends_with_code_2_and_nothing_written(place, tmp_path, capsys):
    out, french = tmp_path / "out", place / "french.jsonl"
    start = [place / "llama", out]
    assert "at least one of --language, --domain, --task" in refused(start, capsys)
    assert "holds 1 usable document" in refused([*start, "--task", place / "one.jsonl"], capsys)
    assert "holds 0 usable documents" in refused([*start, "--task", place / "none.jsonl"], capsys)
    assert "no input at" in refused([*start, "--task", place / "missing.jsonl"], capsys)
    full = [*start, "--task", french]
    assert "leaves nothing" in refused([*full, "--ratio", "0.99"], capsys)
    assert "ratio=1.5 is outside" in refused([*full, "--ratio", "1.5"], capsys)
    assert "--seed changes nothing for --method cus-prune" in refused([*full, "--seed", "3"], capsys)
    message = refused([*full, "--method", "layers", "--relative", "token"], capsys)
    assert "--relative changes nothing for --method layers" in message
    message = refused([place / "bert", out, "--task", french], capsys)
    assert "bert" in message and "llama" in message
    assert "no config.json" in refused([place, out, "--task", french], capsys)
    assert not list(tmp_path.iterdir())
    out.mkdir()
    (out / "mine").touch()
    assert "exists already" in refused(full, capsys)
    assert [path.name for path in out.iterdir()] == ["mine"]

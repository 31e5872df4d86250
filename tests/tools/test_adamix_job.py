"""`megamf adamix`: what it writes, that it repeats, that saved copies are scored alike, and mistakes."""

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from megamf.cli import run
from megamf.tools.adamix import main

SMALL = {
    "vocab_size": 12, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 64, "initializer_range": 0.3, "pad_token_id": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the models bert and llama, and examples."""
    folder = tmp_path_factory.mktemp("job")
    torch.manual_seed(0)
    BertModel(BertConfig(**SMALL)).save_pretrained(folder / "bert")
    LlamaForCausalLM(LlamaConfig(**SMALL, eos_token_id=1, bos_token_id=1)).save_pretrained(folder / "llama")
    words = {word: i for i, word in enumerate(["<pad>", "<eos>", *"abcdefghij"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    for name in ("bert", "llama"):
        fast.save_pretrained(folder / name)
    texts = ["a b", "c d e", "a f", "c b g", "a a", "c c", "a j", "c h"]
    examples = {
        "kinds": [{"text": text, "label": text[0]} for text in texts],
        "numbers": [{"text": text, "label": len(text)} for text in texts],
        "texts": [{"prompt": text, "target": text[-1]} for text in texts],
    }
    for name, rows in examples.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "empty").write_text("")
    return folder


def words(place, out, model="bert", kind="classification", data="kinds", *options, train=True):
    files = [*(["--train", f"{place / data}"] if train else []), "--valid", f"{place / data}"]
    return [f"{place / model}", f"{out}", "--task", kind, *files, "--batch-size", "4", "--rank", "2", *options]


def test_classification_then_scoring_of_the_saved_copies(place, tmp_path, capsys):
    arguments = ("bert", "classification", "kinds", "--epochs", "12", "--lr", "0.03", "--modules", "2")
    assert main(words(place, tmp_path / "one", *arguments)) == 0
    out = capsys.readouterr().out
    assert "lora x 2" in out and "fixed 1" in out
    files = {path.name for path in (tmp_path / "one").iterdir()}
    assert files == {"adamix.json", "adapter_config.json", "adapter_model.safetensors", "copies.safetensors"}
    record = json.loads((tmp_path / "one" / "adamix.json").read_text())
    assert record["labels"] == ["a", "c"] and len(record["history"]) == 24
    assert record["scores"]["merged"]["accuracy"] == 1.0
    assert record["history"][-1]["loss"] < record["history"][0]["loss"]

    assert main(words(place, tmp_path / "two", *arguments)) == 0
    again = json.loads((tmp_path / "two" / "adamix.json").read_text())
    assert again["scores"] == record["scores"] and again["history"] == record["history"]

    scored = ["--epochs", "0", "--adapters", f"{tmp_path / 'one'}"]
    line = words(place, tmp_path / "three", "bert", "classification", "kinds", *scored, train=False)
    line = [word for word in line if word not in ("--rank", "2")]
    assert main(line) == 0
    assert json.loads((tmp_path / "three" / "adamix.json").read_text())["scores"] == record["scores"]


def test_generation_and_full_fine_tuning(place, tmp_path):
    options = ("--method", "adapter", "--generate", "3", "--max-new-tokens", "2", "--epochs", "1")
    assert main(words(place, tmp_path / "one", "llama", "generation", "texts", *options)) == 0
    record = json.loads((tmp_path / "one" / "adamix.json").read_text())
    assert {"merged", "random", "fixed", "generated"} == set(record["scores"]) and len(record["samples"]) == 3
    line = words(place, tmp_path / "two", "llama", "regression", "numbers", "--method", "full", "--epochs", "1")
    assert main([word for word in line if word not in ("--rank", "2")]) == 0
    record = json.loads((tmp_path / "two" / "adamix.json").read_text())
    assert list(record["scores"]) == ["merged"] and (tmp_path / "two" / "model.safetensors").exists()


def test_mistakes_leave_nothing(place, tmp_path, capsys):
    saved = tmp_path / "saved"
    assert main(words(place, saved, "bert", "classification", "kinds", "--epochs", "1")) == 0
    out = tmp_path / "out"
    usual = words(place, out)
    without_rank = [word for word in usual if word not in ("--rank", "2")]
    mistakes = {
        "modules=0": [*usual, "--modules", "0"],
        "no column 'theme'": [*usual, "--label-column", "theme"],
        "holds no example": words(place, out, data="empty"),
        "is not a file": words(place, out, data="none"),
        "not a Hugging Face model folder": words(place, out, model="kinds"),
        "cannot be loaded for generation": words(place, out, "bert", "generation", "texts"),
        "exists already": words(place, saved),
        "--epochs 0": [*usual, "--epochs", "0"],
        "needs examples": words(place, out, train=False),
        "no effect with --task": [*usual, "--generate", "2"],
        "'best' is not one of": [*usual, "--modes", "merged,best"],
        "places are those of adapters": [*usual, "--places", "mlp"],
        "--rank 2 has no effect": [*usual, "--method", "full"],
        "would lose small updates": [*without_rank, "--method", "full", "--dtype", "bfloat16"],
        "warmup=2.0": [*usual, "--warmup", "2"],
        "was trained for classification": [
            *[word if word != "classification" else "regression" for word in without_rank], "--adapters", f"{saved}",
        ],
        "--rank has no effect": [*usual, "--adapters", f"{saved}"],
        "belong to": [*words(place, out, "llama")[:-2], "--adapters", f"{saved}"],
        "not written by": [*without_rank, "--adapters", f"{place}"],
    }  # fmt: skip
    before = {path: path.read_bytes() for path in saved.iterdir()}
    for words_of_it, line in mistakes.items():
        assert run(main, line) == 2, line
        assert words_of_it in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in saved.iterdir()}
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    with pytest.raises(SystemExit) as end:
        main([*usual, "--task", "translation"])
    assert end.value.code == 2

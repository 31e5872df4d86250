"""`megamf evaluate`: its JSON against the function behind it, and mistakes."""

import json

import numpy as np
import pytest
import torch

from megamf.cli import run
from megamf.config import ModelConfig
from megamf.data.indexed import IndexedWriter, Metadata
from megamf.evaluate import load_model
from megamf.evaluate.perplexity import measure
from megamf.model import ModuleFormer, initialise
from megamf.tools.evaluate import main


@pytest.fixture
def checkpoint(tmp_path, save_model):
    config = ModelConfig(
        vocab_size=64, n_layer=1, n_embd=16, att_hidden=16, ffd_hidden=16, n_att_experts=2, n_mlp_experts=2,
        k_att=1, k_mlp=1, gating_size=4, block_size=8, history_length=8,
    )  # fmt: skip
    model = ModuleFormer(config)
    initialise(model, config, 0)
    return save_model(tmp_path / "run", model)


@pytest.fixture
def data(tmp_path):
    def make(name, seed, vocab=64):
        rng = np.random.default_rng(seed)
        docs = [rng.integers(0, vocab, size=size) for size in (30, 7, 19)]
        with IndexedWriter(tmp_path / name, vocab) as writer:
            for document in docs:
                writer.add_document(document)
            writer.commit(Metadata("words", "abc", vocab, 0, True, 3, 56, 150))
        return str(tmp_path / name)

    return make


def test_two_datasets(checkpoint, data, tmp_path, capsys):
    prefixes = [data("one", 0), data("two", 1)]
    out = tmp_path / "result.json"
    assert main([str(checkpoint), "--data", *prefixes, "--batch", "2", "--json", str(out)]) == 0
    tree = json.loads(out.read_text())
    model, _ = load_model(checkpoint)
    singles = [measure(model, prefix, seq_len=16, batch=2) for prefix in prefixes]
    assert [part["loss"] for part in tree["data"]] == pytest.approx([single.loss for single in singles])
    assert tree["loss"] == pytest.approx(sum(single.loss for single in singles) / 2)
    assert tree["seq_len"] == 16 and tree["tokens"] == 2 * 53
    assert tree["bits_per_byte"] > 0 and tree["tokens_per_second"] > 0
    shown = capsys.readouterr().out
    assert "bits per byte" in shown and f"{tree['loss']:.4f}" in shown and "all" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{ck}", "--data", "{tmp}/missing"], "no file"),
        (["{tmp}/nowhere", "--data", "{one}"], "nowhere"),
        (["{ck}", "--data", "{large}"], "vocabulary of 99 (tokenizer words), the model has 64"),
        (["{ck}", "--data", "{one}", "--json", "{tmp}/no/folder.json"], "folder of"),
        (["{ck}", "--data", "{one}", "--device", "quantum"], "--device quantum"),
        (["{ck}", "--data", "{one}", "--tokenizer", "{tmp}/none.model"], "no tokenizer"),
        (["{ck}"], "nothing to evaluate"),
        (["{ck}", "--text", "{tmp}/a.txt"], "need --tokenizer"),
        (["{ck}", "--data", "{one}", "--execute-generated-code"], "belong to --humaneval"),
        (["{ck}", "--humaneval"], "only with --execute-generated-code"),
        (["{ck}", "--humaneval", "--execute-generated-code", "--k", "10"], "--samples is 1"),
        (["{ck}", "--tasks", "x", "--include-path", "{tmp}/none"], "is no folder"),
    ],
)
def test_mistakes(checkpoint, data, tmp_path, capsys, arguments, message):
    places = {"ck": checkpoint, "tmp": tmp_path, "one": data("one", 0), "large": data("large", 0, vocab=99)}
    assert run(main, [argument.format(**places) for argument in arguments]) == 2
    assert message in capsys.readouterr().err


def test_sizes_must_be_positive(checkpoint, data):
    with pytest.raises(SystemExit):
        main([str(checkpoint), "--data", data("one", 0), "--batch", "0"])


def test_a_damaged_checkpoint_is_named(checkpoint, data, capsys):
    file = next(checkpoint.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert run(main, [str(checkpoint), "--data", data("one", 0)]) == 2
    assert file.name in capsys.readouterr().err


def test_dtype(checkpoint, data, tmp_path):
    results = []
    for dtype in ("float64", "float32"):
        out = tmp_path / f"{dtype}.json"
        assert main([str(checkpoint), "--data", data(dtype, 0), "--dtype", dtype, "--json", str(out)]) == 0
        results.append(json.loads(out.read_text())["loss"])
    assert results[0] == pytest.approx(results[1], rel=1e-5) and results[0] != results[1]
    assert torch.get_default_dtype() == torch.float32


@pytest.fixture
def tokenizer(tmp_path):
    """Letters and blanks as tokens: 64 ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    signs = ["<|endoftext|>", *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ():_,.=+", "Ġ", "Ċ", "?"]
    made = Tokenizer(models.BPE({sign: i for i, sign in enumerate(dict.fromkeys(signs))}, [], unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<|endoftext|>"])
    made.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def test_texts_and_code(checkpoint, tokenizer, tmp_path, capsys):
    text, problems, out = tmp_path / "a.txt", tmp_path / "problems.jsonl", tmp_path / "result.json"
    text.write_text("some words of text and more")
    lines = [
        {"task_id": f"T/{i}", "prompt": "def f(a):", "entry_point": "f", "test": "def check(f): assert f"}
        for i in range(3)
    ]
    problems.write_text("\n".join(map(json.dumps, lines)))
    arguments = [str(checkpoint), "--tokenizer", str(tokenizer), "--json", str(out), "--max-new-tokens", "4"]
    written = tmp_path / "completions.jsonl"
    code = ["--humaneval", str(problems), "--samples", "2", "--k", "1", "2", "--limit", "2"]
    code += ["--completions", str(written)]
    assert main([*arguments, "--text", str(text), *code]) == 0
    assert "humaneval" not in json.loads(out.read_text())
    items = [json.loads(line) for line in written.read_text().splitlines()]
    assert [item["task_id"] for item in items] == ["T/0", "T/0", "T/1", "T/1"]
    assert all(item["outcome"] is None for item in items)

    assert run(main, [*arguments, "--text", str(text), *code, "--execute-generated-code"]) == 0
    tree = json.loads(out.read_text())
    assert tree["text"][0]["words"] == 6 and tree["text"][0]["word_perplexity"] > 1
    assert tree["humaneval"]["problems"] == 2 and 0 <= tree["humaneval"]["pass@1"] <= tree["humaneval"]["pass@2"] <= 1
    outcomes = [json.loads(line)["outcome"] for line in written.read_text().splitlines()]
    assert tree["humaneval"]["pass@1"] == sum(outcome["passed"] for outcome in outcomes) / 4
    shown = capsys.readouterr().out
    assert "bits" in shown and "pass@2" in shown

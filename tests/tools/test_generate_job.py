"""`megamf generate`: the three sources of a prompt, streaming, JSON, mistakes."""

import io
import json

import pytest

from megamf.cli import run
from megamf.config import ModelConfig
from megamf.data.tokenizer import load_tokenizer, train_sentencepiece
from megamf.model import ModuleFormer, initialise
from megamf.tools.generate import main


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("generate") / "t.model"
    train_sentencepiece(["def f(x):\n    return x + 1\n" * 20], path, 290)
    return path


@pytest.fixture(scope="module")
def make_checkpoint(tmp_path_factory, save_model):
    def make(vocab):
        config = ModelConfig(
            vocab_size=vocab, n_layer=1, n_embd=16, att_hidden=16, ffd_hidden=16, n_att_experts=2, n_mlp_experts=2,
            k_att=1, k_mlp=1, gating_size=4, initializer_range=0.5,
        )  # fmt: skip
        model = ModuleFormer(config)
        initialise(model, config, 0)
        return save_model(tmp_path_factory.mktemp("run"), model)

    return make


@pytest.fixture(scope="module")
def checkpoint(make_checkpoint):
    return make_checkpoint(290)


def call(capsys, checkpoint, tokenizer, *options):
    assert main([str(checkpoint), "--tokenizer", str(tokenizer), "--max-new-tokens", "8", *options]) == 0
    return capsys.readouterr().out


def test_prompt_sources_and_streaming_agree(checkpoint, tokenizer, tmp_path, capsys, monkeypatch):
    prompt = "def été(x):\n"
    (tmp_path / "prompt.txt").write_text(prompt, encoding="utf-8")
    given = call(capsys, checkpoint, tokenizer, "--prompt", prompt)
    assert given.startswith(prompt) and given.endswith("\n")
    assert call(capsys, checkpoint, tokenizer, "--prompt-file", str(tmp_path / "prompt.txt")) == given
    monkeypatch.setattr("sys.stdin", io.StringIO(prompt))
    assert call(capsys, checkpoint, tokenizer) == given
    assert call(capsys, checkpoint, tokenizer, "--prompt", prompt, "--no-stream") == given


def test_json(checkpoint, tokenizer, capsys):
    tree = json.loads(call(capsys, checkpoint, tokenizer, "--prompt", "def ", "--json"))
    loaded = load_tokenizer(tokenizer)
    assert tree["text"] == loaded.decode(tree["tokens"]) and tree["prompt"] == "def "
    assert tree["prompt_tokens"] == len(loaded.encode("def "))
    assert tree["finished"] == (len(tree["tokens"]) < 8)


def test_seed_and_temperature(checkpoint, tokenizer, capsys):
    def tokens(*options):
        return json.loads(call(capsys, checkpoint, tokenizer, "--prompt", "x", "--json", *options))["tokens"]

    hot = ["--temperature", "3", "--top-p", "1"]
    assert tokens(*hot, "--seed", "1") == tokens(*hot, "--seed", "1") != tokens(*hot, "--seed", "2")
    assert tokens("--temperature", "0", "--seed", "1") == tokens("--temperature", "0") == tokens("--top-k", "1")


def test_an_empty_prompt_begins_a_document(checkpoint, tokenizer, capsys):
    assert json.loads(call(capsys, checkpoint, tokenizer, "--prompt", "", "--json"))["prompt_tokens"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "x", "--temperature", "-1"], "temperature=-1.0"),
        (["--prompt", "x", "--top-p", "0"], "top_p=0.0"),
        (["--prompt-file", "/nonexistent"], "/nonexistent cannot be read"),
        (["--prompt", "x", "--tokenizer", "/nonexistent.model"], "no tokenizer at /nonexistent.model"),
    ],
)
def test_mistakes(checkpoint, tokenizer, capsys, arguments, message):
    assert run(main, [str(checkpoint), "--tokenizer", str(tokenizer), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_another_tokenizer(make_checkpoint, tokenizer, capsys):
    assert run(main, [str(make_checkpoint(280)), "--tokenizer", str(tokenizer), "--prompt", "x"]) == 2
    assert "has 290 ids, the model's vocabulary 280" in capsys.readouterr().err

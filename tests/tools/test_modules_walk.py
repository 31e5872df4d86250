"""The five commands of docs/modules.md, read out of the page, on a miniature of what the quickstart leaves behind."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megamf import cli
from megamf.config import ModelConfig
from megamf.config.load import load_config
from megamf.data.tokenizer import load_tokenizer
from megamf.evaluate.load import load_model
from megamf.model import ModuleFormer
from megamf.train import model_from, parse

pytest.importorskip("matplotlib")

PAGE = Path(__file__).parents[2] / "docs" / "modules.md"


def commands() -> list[list[str]]:
    """Every command of the page, as words."""
    blocks = re.findall(r"^```\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    found = [shlex.split(block.replace("\\\n", " ")) for block in blocks]
    assert all(words[0] == "megamf" for words in found)
    return [words[1:] for words in found]


def test_the_readme_walks_the_same_five_commands():
    readme = (PAGE.parents[1] / "README.md").read_text(encoding="utf-8")
    block = readme.partition("cd runs/quickstart\n")[2].partition("```")[0]
    shown = [shlex.split(line, comments=True)[1:] for line in block.splitlines()]
    assert shown == [[word.removeprefix("runs/quickstart/") for word in words] for words in commands()[:5]]


@pytest.fixture
def quickstart(tmp_path, monkeypatch, save_model):
    """runs/quickstart with a tokenizer, data and the checkpoint of a tiny model, in the current directory."""
    monkeypatch.chdir(tmp_path)
    text = tmp_path / "text"
    text.mkdir()
    for n in range(40):
        (text / f"{n}.py").write_text(f"def f{n}(value, other):\n    return value + other * {n}\n" * 5)
    root = tmp_path / "runs" / "quickstart"
    (root / "data").mkdir(parents=True)
    tokenizer = str(root / "tokenizer.model")
    assert cli.main(["tokenizer", "--input", str(text), "--vocab-size", "290", "--output", tokenizer]) == 0
    words = ["--input", str(text), "--tokenizer", tokenizer, "--output", str(root / "data" / "stdlib")]
    assert cli.main(["prepare", *words, "--valid-fraction", "0.2"]) == 0
    tokens = load_tokenizer(tokenizer)
    model = ModuleFormer(
        ModelConfig(
            vocab_size=tokens.vocab_size, n_layer=2, n_embd=16, att_hidden=16, ffd_hidden=64, n_att_experts=4,
            n_mlp_experts=6, k_att=1, k_mlp=2, gating_size=8, block_size=16, history_length=16,
            bos_token_id=tokens.bos_id, eos_token_id=tokens.eod_id,
        )
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    save_model(root / "run" / "checkpoints", model, 7, {"step": 7, "config": {"train": {"seq_len": 256}}})
    return root


def test_the_walk(quickstart, capsys):
    show, curve, prune, export, evaluate = commands()[:5]
    before = {path: path.read_bytes() for path in quickstart.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert cli.main(show) == 0
    assert "stdlib-valid" in capsys.readouterr().out
    points = quickstart / "points.json"
    assert cli.main([*curve, "--json", str(points)]) == 0
    printed = capsys.readouterr().out
    assert "…" not in printed and "FLOPs/token" in printed
    assert cli.main(prune) == 0
    printed = capsys.readouterr().out
    assert "% pruned" in printed and "modules" in printed
    assert cli.main(export) == 0
    assert cli.main([*evaluate, "--json", str(quickstart / "evaluation.json")]) == 0

    share = float(prune[prune.index("--share") + 1])
    point = next(item for item in json.loads(points.read_text())["points"] if item["setting"] == share)
    evaluation = json.loads((quickstart / "evaluation.json").read_text())
    assert evaluation["loss"] == pytest.approx(point["loss"], abs=1e-5)
    model, config = load_model(quickstart / "pruned-hf")
    assert sum(parameter.numel() for parameter in model.parameters()) == point["parameters"]
    assert config.n_att_experts_per_layer or config.n_mlp_experts_per_layer
    theirs = AutoModelForCausalLM.from_pretrained(quickstart / "pruned-hf", trust_remote_code=True)
    ids = torch.randint(config.vocab_size, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, model.logits(model(ids).hidden_BTD), atol=1e-5, rtol=1e-5)
    for name in ("use.png", "curve.png"):
        picture = (quickstart / name).read_bytes()
        assert picture.startswith(b"\x89PNG") and len(picture) > 5000
    assert all(path.read_bytes() == content for path, content in before.items())


def test_the_training_command_is_a_valid_one(quickstart):
    """As far as a configuration goes: the miniature is no `nano`."""
    job, *words = commands()[5]
    assert job == "train"
    arguments = parse([word.replace("runs/quickstart/pruned", "runs/quickstart/run") for word in words])
    model = model_from(arguments.model_from)
    config = load_config(overrides=arguments.overrides, model=model)
    assert (config.losses.balance, config.losses.concentration) == ("none", 0.001)
    assert config.checkpoint.init_from == Path("runs/quickstart/run") and config.model == model

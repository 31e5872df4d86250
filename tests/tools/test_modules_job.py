"""`megamf modules`: from a checkpoint to tables, pictures and a pruned checkpoint; mistakes leave nothing."""

import json

import numpy as np
import pytest
import torch

from megamf.checkpoint import Checkpoint, verify
from megamf.cli import run
from megamf.config import ModelConfig
from megamf.data.indexed import IndexedWriter, Metadata
from megamf.evaluate.perplexity import measure
from megamf.model import ModuleFormer
from megamf.tools.modules import main

pytest.importorskip("matplotlib")


@pytest.fixture
def checkpoint(tmp_path, save_model):
    config = ModelConfig(
        vocab_size=64, n_layer=2, n_embd=16, att_hidden=16, ffd_hidden=16, n_att_experts=4, n_mlp_experts=6,
        k_att=1, k_mlp=2, gating_size=4, block_size=8, history_length=8,
    )  # fmt: skip
    model = ModuleFormer(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    return save_model(tmp_path / "run", model)


@pytest.fixture
def data(tmp_path):
    def make(name, low, high):
        rng = np.random.default_rng(low)
        with IndexedWriter(tmp_path / name, 64) as writer:
            for size in (30, 7, 19):
                writer.add_document(rng.integers(low, high, size=size))
            writer.commit(Metadata("words", "abc", 64, 0, True, 3, 56, 150))
        return str(tmp_path / name)

    return make


def test_show_then_prune(checkpoint, data, tmp_path, capsys):
    prefixes = [data("prose", 0, 30), data("code", 30, 64)]
    out, picture = tmp_path / "use.json", tmp_path / "use.png"
    arguments = ["--json", str(out), "--picture", str(picture), "--duplicates", "0.5"]
    assert main(["show", str(checkpoint), "--data", *prefixes, *arguments]) == 0
    tree = json.loads(out.read_text())
    assert [item["data"] for item in tree["statistics"]] == prefixes and "duplicates" in tree
    assert len(tree["statistics"][0]["modules"]) == 2 * (4 + 6)
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000
    assert "55 tokens" in capsys.readouterr().out

    main(["show", str(checkpoint), "--data", prefixes[0], "--json", str(out)])
    curve = tmp_path / "curve.json"
    shown = ["--tau", "0", "0.3", "0.9", "--statistics", str(out), "--dry-run", "--json", str(curve)]
    shown += ["--data", prefixes[0], "--picture", str(tmp_path / "curve.png")]
    assert main(["prune", str(checkpoint), *shown]) == 0
    points = json.loads(curve.read_text())["points"]
    assert points[0]["pruned_share"] == 0 < points[1]["pruned_share"] < points[2]["pruned_share"]
    assert (tmp_path / "curve.png").stat().st_size > 5000
    capsys.readouterr()

    pruned = tmp_path / "pruned"
    assert main(["prune", str(checkpoint), str(pruned), "--tau", "0.9", "--statistics", str(out)]) == 0
    with Checkpoint(pruned) as small:
        assert not verify(small.path)
        assert len(small.modules) == points[2]["attention"] + points[2]["mlp"]
        assert small.state["origin"]["edit"]["rule"] == "tau"
        from megamf.evaluate import load_model

        model, _ = load_model(small.path)
    assert measure(model, prefixes[0], seq_len=16, batch=8).loss == pytest.approx(points[2]["loss"], rel=1e-6)
    assert f"({points[2]['pruned_share']:.1%} pruned)" in capsys.readouterr().out


@pytest.mark.parametrize("by", ["norm", "random"])
def test_baselines_and_names(checkpoint, tmp_path, by):
    out = tmp_path / "out"
    assert main(["prune", str(checkpoint), str(out), "--share", "0.2", "--by", by]) == 0
    with Checkpoint(out) as small:
        name = small.modules[-1].id
        count = len(small.modules)
        edit = small.state["origin"]["edit"]
        assert edit["by"] == by and 0.1 < edit["pruned_share"] <= 0.2
    assert main(["prune", str(out), str(tmp_path / "again"), "--modules", name]) == 0
    with Checkpoint(tmp_path / "again") as smaller:
        assert len(smaller.modules) == count - 1 and name not in [row.id for row in smaller.modules]
        assert smaller.state["origin"]["before"]["edit"]["by"] == by


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tau", "1.5", "--by", "norm"], "tau=1.5 is outside"),
        (["--share", "0.95", "--by", "norm"], "at most"),
        (["--modules", "L09.mlp.000"], "no module L09.mlp.000"),
        (["--tau", "0.1"], "needs --data, or --statistics"),
        (["--tau", "0.1", "0.2", "--by", "norm"], "needs --dry-run"),
        (["--modules", *(f"L00.mlp.{i:03d}" for i in range(5))], "layer 0, mlp: 1 modules would be left"),
        (["--tau", "0.1", "--statistics", "{tmp}/none.json"], "cannot be read"),
        (["--tau", "0.1", "--by", "norm", "--picture", "{tmp}/x.png"], "belong to --dry-run"),
    ],
)
def test_mistakes(checkpoint, tmp_path, capsys, arguments, message):
    arguments = [argument.format(tmp=tmp_path) for argument in arguments]
    before = sorted(path.name for path in tmp_path.iterdir())
    assert run(main, ["prune", str(checkpoint), str(tmp_path / "out"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == before

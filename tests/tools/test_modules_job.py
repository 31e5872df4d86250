"""`megamf modules`: from a checkpoint to tables, pictures and a pruned checkpoint; mistakes leave nothing."""

import json
import multiprocessing
import resource

import numpy as np
import pytest
import torch

from megamf.checkpoint import Checkpoint, verify
from megamf.cli import run
from megamf.config import ModelConfig
from megamf.data.indexed import IndexedWriter, Metadata
from megamf.evaluate.load import load_model
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


@pytest.fixture
def untouched(tmp_path):
    """Afterwards every file that was there is as it was, and no other is."""

    def contents():
        return {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()}

    before = contents()
    yield
    assert contents() == before


def test_gates_of_one_do_not_grow_and_are_not_rescaled(data, tmp_path, save_model, capsys):
    config = ModelConfig(
        vocab_size=64, n_layer=1, n_embd=16, att_hidden=16, ffd_hidden=16, n_att_experts=4, n_mlp_experts=6,
        k_att=1, k_mlp=2, gate_type="tanh", gating_size=4, block_size=8, history_length=8,
    )  # fmt: skip
    model = ModuleFormer(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    path = save_model(tmp_path / "tanh", model)
    words = ["prune", str(path), str(tmp_path / "out"), "--share", "0.1", "--data", data("d", 0, 64)]
    assert run(main, [*words, "--rescale"]) == 2
    assert "gate_type=tanh" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert run(main, words) == 0


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
        (["--tau", "0.1", "--by", "norm", "--dry-run"], "--dry-run writes nothing: leave"),
        (["--tau", "0.1", "--by", "norm", "--data", "{tmp}/x"], "--data has no effect here"),
        (["--tau", "0.1", "--by", "norm", "--statistics", "{tmp}/x"], "they belong to --by use"),
        (["--tau", "0.1", "--by", "norm", "--rescale"], "--rescale needs the routers"),
    ],
)
def test_mistakes(checkpoint, tmp_path, capsys, untouched, arguments, message):
    arguments = [argument.format(tmp=tmp_path) for argument in arguments]
    assert run(main, ["prune", str(checkpoint), str(tmp_path / "out"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_statistics_of_another_checkpoint(checkpoint, data, tmp_path, save_model, capsys):
    """Also of one with the same numbers of modules: both are named."""
    prefix, use = data("prose", 0, 64), tmp_path / "use.json"
    other = save_model(tmp_path / "other", load_model(checkpoint)[0], step=1)
    assert main(["show", str(other), "--data", prefix, "--json", str(use)]) == 0
    for words in (["prune", "--tau", "0.1"], ["insert", "--mlp", "1", "--copy"]):
        action, *rest = words
        arguments = [action, str(checkpoint), str(tmp_path / "out"), *rest, "--statistics", str(use)]
        assert run(main, arguments) == 2
        printed = " ".join(capsys.readouterr().err.split())
        assert f"statistics of another checkpoint: {other} with manifest" in printed and str(checkpoint) in printed
    assert not (tmp_path / "out").exists()
    assert main(["prune", str(other), str(tmp_path / "out"), "--tau", "0.1", "--statistics", str(use)]) == 0


def test_a_transplant_of_other_widths(checkpoint, tmp_path, save_model, capsys, request):
    config = load_model(checkpoint)[1]
    wider = ModuleFormer(ModelConfig.model_validate(config.model_dump() | {"ffd_hidden": 24}))
    donor = save_model(tmp_path / "donor", wider)
    request.getfixturevalue("untouched")
    words = ["insert", str(checkpoint), str(tmp_path / "out"), "--mlp", "1", "--transplant", str(donor)]
    assert run(main, words) == 2
    assert "ffd_hidden is 24 there and 16 here" in " ".join(capsys.readouterr().err.split())


def with_small_file_limit(words, reply):
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    reply.send(run(main, words))


@pytest.mark.parametrize(
    "words", [["prune", "--share", "0.01", "--by", "norm"], ["insert", "--mlp", "1"], ["merge", "--with", "{ck}"]]
)
def test_a_full_disk_leaves_nothing(checkpoint, tmp_path, capfd, untouched, words):
    action, *rest = (word.format(ck=checkpoint) for word in words)
    fork = multiprocessing.get_context("fork")
    answer, reply = fork.Pipe(duplex=False)
    arguments = ([action, str(checkpoint), str(tmp_path / "out"), *rest], reply)
    child = fork.Process(target=with_small_file_limit, args=arguments, daemon=True)
    child.start()
    assert answer.poll(60) and answer.recv() == 2
    child.join()
    assert "File too large" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_insert_and_merge(checkpoint, data, tmp_path, capsys):
    prefix, use = data("prose", 0, 64), tmp_path / "use.json"
    assert main(["show", str(checkpoint), "--data", prefix, "--json", str(use)]) == 0
    grown = tmp_path / "grown"
    words = ["--mlp", "2", "--copy", "--noise", "0", "--rows", "copy", "--statistics", str(use)]
    assert main(["insert", str(checkpoint), str(grown), *words]) == 0
    with Checkpoint(grown) as large:
        assert large.model["n_mlp_experts"] == 8 and large.model["n_att_experts"] == 4
        assert sum(row.provenance == "inserted" for row in large.modules) == 4
    # The copies are duplicates, found again and made one.
    back = tmp_path / "back"
    assert main(["merge", str(grown), str(back), "--duplicates", "0.99999", "--data", prefix]) == 0
    with Checkpoint(back) as small, Checkpoint(checkpoint) as first:
        assert small.model["n_mlp_experts"] == 6
        assert sum(row.provenance == "merged" for row in small.modules) == 4
        key = "transformer.h.0.mlpf.experts.weight"
        assert torch.allclose(small.full(key), first.full(key), atol=1e-6)
    transplanted = tmp_path / "transplanted"
    words = ["--attention", "1", "--transplant", str(grown), "--statistics", str(use)]
    assert run(main, ["insert", str(checkpoint), str(transplanted), *words]) == 2
    assert "statistics of another checkpoint" in capsys.readouterr().err
    # Modules of another history do not average; a checkpoint with itself does.
    average = tmp_path / "average"
    assert run(main, ["merge", str(checkpoint), str(average), "--with", str(back)]) == 2
    assert "do not have the same modules" in capsys.readouterr().err
    assert main(["merge", str(checkpoint), str(average), "--with", str(checkpoint), "--weights", "3", "1"]) == 0
    with Checkpoint(average) as same, Checkpoint(checkpoint) as first:
        assert all(torch.equal(same.full(key), first.full(key)) for key in first.logical_shapes())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["insert"], "nothing to insert"),
        (["insert", "--mlp", "1", "--copy"], "does not say how often"),
        (["insert", "--mlp", "1", "--noise", "0.1"], "belongs to --copy"),
        (["insert", "--mlp", "1", "--rows", "quiet"], "needs --data"),
        (["insert", "--mlp", "1", "--rows", "copy"], "give --copy"),
        (["insert", "--mlp", "1", "--transplant", "{tmp}/nowhere"], "nowhere"),
        (["insert", "--mlp", "1", "--device", "cpu"], "--device has no effect without --data"),
        (["merge", "--with", "{ck}", "--batch", "4"], "--batch has no effect without --data"),
        (["merge"], "give either --with"),
        (["merge", "--duplicates", "0.9"], "give --data"),
        (["merge", "--with", "{ck}", "--weights", "1"], "1 values for 2 checkpoints"),
        (["merge", "--with", "{ck}", "--tasks", "1", "2", "3"], "1 tuned checkpoints and 3 scales"),
    ],
)
def test_mistakes_of_insert_and_merge(checkpoint, tmp_path, capsys, untouched, arguments, message):
    action, *rest = (argument.format(tmp=tmp_path, ck=checkpoint) for argument in arguments)
    assert run(main, [action, str(checkpoint), str(tmp_path / "out"), *rest]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

"""`megamf prepare --shard` and `megamf merge-data` from the command line."""

import json

import pytest

from megamf.cli import run
from megamf.data.tokenizer import train_sentencepiece
from megamf.tools import merge_data, prepare

TEXTS = [f"record {n}: " + "value = other " * (n % 7) for n in range(50)]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("merge-job")
    train_sentencepiece(TEXTS, folder / "t.model", 290)
    for n in range(5):
        (folder / f"{n}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[n::5]))
    return ["--input", *(str(folder / f"{n}.jsonl") for n in range(5)), "--tokenizer", str(folder / "t.model")]


def test_shards_and_merge(inputs, tmp_path, capsys):
    assert run(prepare.main, [*inputs, "--output", str(tmp_path / "whole"), "--valid-fraction", "0.1"]) == 0
    printed = capsys.readouterr().out
    for shard in ("0", "1", "2"):
        options = ["--output", str(tmp_path / "out"), "--shard", shard, "--num_shards", "3"]
        assert run(prepare.main, [*inputs, *options]) == 0
    assert "00002-of-00003: 10 documents" in capsys.readouterr().out
    options = ["--output", str(tmp_path / "out"), "--num-shards", "3", "--valid-fraction", "0.1"]
    assert run(merge_data.main, options) == 0
    assert capsys.readouterr().out == printed.replace("whole", "out")
    for name in ("-train.bin", "-train.idx", "-train.json", "-valid.bin", "-valid.idx", "-valid.json"):
        assert (tmp_path / f"out{name}").read_bytes() == (tmp_path / f"whole{name}").read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shard", "0"], "--shard 0 and --num-shards None: give both or neither"),
        (["--num-shards", "2"], "--shard None and --num-shards 2: give both or neither"),
        (["--shard", "2", "--num-shards", "2"], "no shard 2 of 2"),
        (["--shard", "0", "--num-shards", "2", "--valid-fraction", "0.1"], "give it to megamf merge-data"),
        (["--shard", "0", "--num-shards", "2", "--workers", "0"], "--workers 0"),
    ],
)
def test_mistakes(inputs, tmp_path, capsys, options, message):
    assert run(prepare.main, [*inputs, "--output", str(tmp_path / "out"), *options]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_nothing_to_merge(tmp_path, capsys):
    assert run(merge_data.main, ["--output", str(tmp_path / "out"), "--num-shards", "2"]) == 2
    assert "lacks 00000-of-00002, 00001-of-00002" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []

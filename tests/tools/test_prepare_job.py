"""`megamf prepare` from the command line, and as a program of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import megamf.tools.prepare
from megamf.cli import run
from megamf.data.indexed import IndexedDataset
from megamf.data.tokenizer import load_tokenizer, train_sentencepiece
from megamf.tools.prepare import main

TEXTS = [f"record {n}: " + "value = other " * (n % 7) for n in range(50)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepare-job")
    train_sentencepiece(TEXTS, folder / "t.model", 290)
    (folder / "rows.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in TEXTS))
    return folder


def arguments(folder, output, *more):
    rows = str(folder / "rows.jsonl")
    tokenizer = str(folder / "t.model")
    return ["--input", rows, "--tokenizer", tokenizer, "--output", str(output), "--text-field", "body", *more]


def test_prepares(folder, tmp_path, capsys):
    assert run(main, arguments(folder, tmp_path / "out", "--valid_fraction=0.1", "--no-append-eod")) == 0
    printed = capsys.readouterr().out
    assert "out-train: 45 documents" in printed
    assert "out-valid: 5 documents" in printed
    assert "bytes per token" in printed
    assert "0 bad documents" in printed
    dataset, tokenizer = IndexedDataset(tmp_path / "out-valid"), load_tokenizer(folder / "t.model")
    assert [tokenizer.decode(dataset.document(i).tolist()) for i in range(5)] == TEXTS[9::10]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--text-field", "none"], "no good document: 50 bad documents skipped (50 malformed, first: "),
        (["--input", "nowhere"], "no input at nowhere"),
        (["--tokenizer", "nowhere"], "no tokenizer at nowhere"),
        (["--valid-fraction", "2"], "valid fraction 2.0"),
    ],
)
def test_mistakes(folder, tmp_path, capsys, options, message):
    assert run(main, arguments(folder, tmp_path / "out", *options)) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_as_a_program_with_workers(folder, tmp_path):
    program = Path(megamf.tools.prepare.__file__)
    command = [sys.executable, str(program), *arguments(folder, tmp_path / "out", "--workers", "2")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "0 bad documents"), done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.bin", "out.idx", "out.json"]
    assert subprocess.run(command, capture_output=True, text=True, timeout=120).returncode == 2

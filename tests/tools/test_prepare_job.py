"""`megamf prepare` from the command line, and as a program of its own."""

import json
import os
import signal
import subprocess
import sys
import time
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


def alive(group):
    """Processes of a process group that are not zombies."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, of_group = stat.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(of_group) == group and state != "Z":
            found.append(int(stat.parent.name))
    return found


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc to look for processes")
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL])
def test_no_process_outlives_the_job(folder, tmp_path, stop):
    many = tmp_path / "many.jsonl"
    many.write_text((json.dumps({"body": "record value " * 500}) + "\n") * 3000)
    command = [
        sys.executable, megamf.tools.prepare.__file__, *arguments(folder, tmp_path / "out" / "x", "--workers", "2"),
        "--input", *[str(many)] * 40,
    ]  # fmt: skip
    # A shell that starts this suite in the background has its children ignore SIGINT.
    job = subprocess.Popen(
        command,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 60
    try:
        while not (any(tmp_path.glob("out/.x.*/bin")) and len(alive(job.pid)) >= 3):
            assert job.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.killpg(job.pid, stop) if stop == signal.SIGINT else job.send_signal(stop)
        code = job.wait(60)
        while alive(job.pid):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        if alive(job.pid):
            os.killpg(job.pid, signal.SIGKILL)
    if stop == signal.SIGINT:
        assert code == 130
        assert sorted(path.name for path in tmp_path.iterdir()) == ["many.jsonl"]

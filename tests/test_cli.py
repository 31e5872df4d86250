"""The `megamf` command: listing, dispatch, option spelling, exit codes."""

import importlib
import subprocess
import sys

import pytest

from megamf import __version__
from megamf.cli import jobs, main, normalise, run
from megamf.errors import UserError


def test_every_job_has_a_summary_and_a_main():
    found = jobs()
    assert {"plan", "bench", "report"} <= found.keys()
    for name, summary in found.items():
        assert summary.endswith("."), name
        assert callable(importlib.import_module(f"megamf.tools.{name}").main)


def test_help_lists_the_jobs(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for name in jobs():
        assert f"  {name.replace('_', '-')} " in text


def test_without_a_job_the_usage_is_wrong(capsys):
    assert main([]) == 2
    assert "usage" in capsys.readouterr().out


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == __version__


def test_an_unknown_job_is_named_with_the_known_ones(capsys):
    assert main(["plant"]) == 2
    error = capsys.readouterr().err
    assert "'plant'" in error
    assert "plan" in error.split("jobs:")[1]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--num_ranks", "a_b"], ["--num-ranks", "a_b"]),
        (["--out_dir=x_y"], ["--out-dir=x_y"]),
        (["train.seq_len=3"], ["train.seq_len=3"]),
        (["-o", "--", "--a_b"], ["-o", "--", "--a_b"]),
    ],
)
def test_dashes_and_underscores_are_the_same_in_option_names(given, expected):
    assert normalise(given) == expected


def test_outcomes_become_exit_codes(capsys):
    def fails(error):
        def job(argv):
            raise error

        return job

    assert run(lambda argv: 0, []) == 0
    assert run(lambda argv: 75, []) == 75
    assert run(fails(UserError("seven is not eight")), []) == 2
    assert "seven is not eight" in capsys.readouterr().err
    assert run(fails(KeyboardInterrupt()), []) == 130
    with pytest.raises(RuntimeError):
        run(fails(RuntimeError("a defect")), [])


def test_a_job_runs_as_module_and_outside_the_checkout(tmp_path):
    command = [sys.executable, "-m", "megamf.cli", "plan", "--preset", "nano", "--gpus-per-node", "3", "parallel.ep=2"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert "world size 3 is not divisible by parallel.ep=2" in result.stderr
    assert "Traceback" not in result.stderr

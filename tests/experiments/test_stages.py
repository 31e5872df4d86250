"""A stage runs once, again when it changed, and says what went wrong."""

import pytest

from megamf.errors import UserError
from megamf.experiments.pages import table
from megamf.experiments.stages import Study


def test_computed_stages_are_kept_until_their_arguments_change(tmp_path):
    calls = []

    def square(x):
        calls.append(x)
        return x * x

    assert [Study(tmp_path).compute("a", square, x=x) for x in (3, 3, 4, 4)] == [9, 9, 16, 16]
    assert calls == [3, 4]
    assert Study(tmp_path).compute("named", lambda name: name.upper(), name="its own name") == "ITS OWN NAME"


def test_commands_run_here_and_once(tmp_path):
    study = Study(tmp_path)
    record = study.command("help", "megamf report --help")
    assert record["command"] == "megamf report --help" and "usage" in study.path("logs/help.log").read_text()
    study.path("logs/help.log").unlink()
    assert study.command("help", "megamf report --help") == record
    assert not study.path("logs/help.log").exists()
    with pytest.raises(UserError, match=r"stage bad ended with 2.*nowhere"):
        study.commands({"bad": "megamf report nowhere"}, at_once=2)
    assert not study.path("stages/bad.json").exists()
    with pytest.raises(ValueError, match="rm"):
        study.command("rm", "rm -r x")


def test_a_table_is_markdown():
    assert table(["a", "b"], [["x", 1]]) == "| a | b |\n| --- | ---: |\n| x | 1 |"

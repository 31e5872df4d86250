"""`megamf plan` from its command line."""

import json

import pytest

from megamf.cli import run
from megamf.tools import plan


def test_json_has_counts_flops_layouts_and_a_recommendation(capsys):
    assert run(plan.main, ["--preset", "molm-700m-8b", "--ranks", "64", "--device", "h100", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"]["total"] == 8_182_046_720
    assert found["recommended"]["ep"] == 1
    assert found["train_flops"] == found["train_flops_per_token"] * found["tokens"]
    for row in found["layouts"]:
        sizes = dict(row["bytes_per_rank"])
        assert sizes.pop("total") == sum(sizes.values())


def test_table_names_the_layout_to_take(capsys):
    assert run(plan.main, ["--preset", "nano", "--ranks", "2", "--device", "cpu", "--memory-gib", "4"]) == 0
    text = capsys.readouterr().out
    assert "7,576,448" in text
    assert "parallel.ep=1 deepspeed=zero1" in text


def test_a_device_too_small_is_a_failure_that_says_what_to_do(capsys):
    assert run(plan.main, ["--preset", "molm-700m-8b", "--ranks", "8", "--memory-gib", "2"]) == 1
    assert "no layout fits" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--preset", "nano", "--ranks", "0"], "--ranks 0"),
        (["--preset", "nano", "--ranks", "2", "--device", "cpu"], "--memory-gib"),
        (["--preset", "nano", "--ranks", "2", "--imbalance", "0.2"], "--imbalance 0.2"),
        (["--preset", "nano", "--ranks", "6", "--ep", "4"], "world size 6"),
        (["--preset", "none", "--ranks", "1"], "no preset 'none'"),
    ],
)
def test_mistakes_exit_with_two(argv, message, capsys):
    assert run(plan.main, argv) == 2
    assert message in capsys.readouterr().err

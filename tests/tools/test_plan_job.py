"""`megamf plan` from its command line."""

import json

import pytest

from megamf.cli import run
from megamf.tools import plan

BIG = ["--preset", "molm-700m-8b", "--nodes", "8", "--gpus-per-node", "8", "--gpu", "h100"]


def test_json_has_counts_memory_traffic_time_and_assumptions(capsys):
    assert run(plan.main, [*BIG, "parallel.ep=8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["predicted"] is True
    assert found["parameters"]["total"] == 8_182_046_720
    assert found["train_flops"] == found["train_flops_per_token"] * found["tokens"]
    assert found["layout"]["ep"] == 8 and found["fits"]
    assert {item["kind"] for item in found["collectives"]} == {"all_to_all", "all_reduce", "all_gather"}
    assert found["cluster"]["assumptions"]["--inter-node-gbs"] == {"value": 50, "unit": "GB/s"}


def test_the_tables_name_everything(capsys):
    assert run(plan.main, ["--preset", "nano", "--gpus-per-node", "2", "--gpu", "cpu", "--memory-gib", "8",
                           "--peak-tflops", "0.1", "parallel.ep=2"]) == 0  # fmt: skip
    text = capsys.readouterr().out
    for words in ("7,576,448", "parallel.ep=2 deepspeed=zero1", "(predicted)", "MLP experts: rows", "gather_weights",
                  "300B tokens", "checkpoint", "--network-efficiency"):  # fmt: skip
        assert words in text


def test_search_ranks_and_names_the_fastest(capsys):
    assert run(plan.main, [*BIG, "--search", "--top", "3"]) == 0
    text = capsys.readouterr().out
    assert "fastest          parallel.ep=1 deepspeed=zero" in text
    assert run(plan.main, [*BIG, "--search", "--json"]) == 0
    ranked = json.loads(capsys.readouterr().out)["layouts"]
    assert ranked[0]["seconds"]["step"] <= ranked[-1]["seconds"]["step"]


def test_markdown_says_that_it_is_predicted(capsys):
    assert run(plan.main, [*BIG, "--markdown", "--search", "--top", "2"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("Predicted by `megamf plan --preset molm-700m-8b")
    assert "not measured" in text and "| MFU |" in text and "| 300B tokens |" in text


def test_a_device_too_small_is_a_failure_that_says_what_to_do(capsys):
    assert run(plan.main, ["--preset", "molm-700m-8b", "--memory-gib", "2"]) == 1
    assert "does not fit" in capsys.readouterr().out
    assert run(plan.main, ["--preset", "molm-700m-8b", "--memory-gib", "2", "--search"]) == 1
    assert "no layout fits" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--preset", "nano", "--nodes", "0"], "--nodes 0"),
        (["--preset", "nano", "--gpu", "cpu"], "--gpu cpu needs --memory-gib"),
        (["--preset", "nano", "--imbalance", "0.2"], "--imbalance 0.2"),
        (["--preset", "nano", "--gpus-per-node", "6", "parallel.ep=4"], "world size 6"),
        (["--preset", "none"], "no preset 'none'"),
    ],
)
def test_mistakes_exit_with_two(argv, message, capsys):
    assert run(plan.main, argv) == 2
    assert message in capsys.readouterr().err

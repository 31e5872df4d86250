"""Timing in turns, limits, and the JSON of a result."""

import json

import pytest

from megamf.bench import Figure, Result, interleaved, machine, suite


def test_cases_take_turns_and_medians_leave_the_warmup_out(monkeypatch):
    clock = [0.0]
    costs = {"a": iter([9.0, 1.0, 5.0, 2.0]), "b": iter([9.0, 3.0, 4.0, 8.0])}
    order = []

    def case(name):
        def work():
            order.append(name)
            clock[0] += next(costs[name])

        return work

    monkeypatch.setattr(suite.time, "perf_counter", lambda: clock[0])
    assert interleaved({"a": case("a"), "b": case("b")}, repeats=3, warmup=1) == {"a": 2.0, "b": 4.0}
    assert order == ["a", "b"] * 4


@pytest.mark.parametrize(
    ("limits", "kept"),
    [
        ({}, None),
        ({"at_most": 2.0}, True),
        ({"at_most": 1.9}, False),
        ({"at_least": 2.0}, True),
        ({"at_least": 3}, False),
    ],
)
def test_limits(limits, kept):
    assert Figure("x", 2.0, "a figure", **limits).kept is kept


def test_a_result_is_flat_json_with_its_machine_and_date():
    tree = json.loads(json.dumps(Result("cpu", [Figure("a_ms", 1.23456789, "what a is")], machine()).tree()))
    assert tree["a_ms"] == 1.2346
    assert tree["meaning"] == {"a_ms": "what a is"}
    assert {"cpu", "cores", "threads", "torch"} <= tree["machine"].keys()
    assert tree["date"][:2] == "20"

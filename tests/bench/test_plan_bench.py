"""The figures of the `plan` suite from given numbers; no step is run here."""

from types import SimpleNamespace

import pytest

from megamf.bench.plan import layouts, order_kept, rank_correlation


def predicted(**times):
    return {name: SimpleNamespace(time=SimpleNamespace(total=total)) for name, total in times.items()}


def test_only_clear_differences_are_ordered():
    guess = predicted(a=1.0, b=1.1, c=2.0)
    assert order_kept(guess, {"a": 3.0, "b": 2.0, "c": 4.0}) == 1.0  # a and b are too close to count
    assert order_kept(guess, {"a": 3.0, "b": 2.0, "c": 2.5}) == 0.5


def test_rank_correlation():
    guess = predicted(a=1.0, b=2.0, c=3.0)
    assert rank_correlation(guess, {"a": 5.0, "b": 6.0, "c": 7.0}) == 1.0
    assert rank_correlation(guess, {"a": 7.0, "b": 6.0, "c": 5.0}) == -1.0
    assert rank_correlation(guess, {"a": 6.0, "b": 5.0, "c": 7.0}) == pytest.approx(0.5)


def test_layouts_are_those_that_the_ranks_allow():
    assert len(layouts(2)) == 2 * 3 * 2 and len(layouts(4)) == 3 * 3 * 2

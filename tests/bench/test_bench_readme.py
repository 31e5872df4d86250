"""The README's numbers are exactly the committed results."""

from pathlib import Path

import pytest

from megamf.bench import Figure, Result
from megamf.bench.readme import BEGIN, END, committed, render, update, whole
from megamf.errors import UserError

ROOT = Path(__file__).parents[2]


def test_the_block_is_replaced_and_nothing_else():
    where = {"cpu": "A CPU", "threads": 2, "torch": "2", "load_before": 0.1}
    result = Result(
        "cpu", [Figure("train_mfu", 1.5, "what a is"), Figure("b_ms", 2.0, "b")], where, date="2026-01-02 03:04"
    ).tree()
    text = update(f"before\n{BEGIN}\nold\n{END}\nafter\n", [result])
    assert text.startswith(f"before\n{BEGIN}\n")
    assert text.endswith(f"{END}\nafter\n")
    assert "| `train_mfu` | 1.5 | what a is |" in text
    assert "b_ms" not in text and "| `b_ms` | 2 | b |" in whole([result])
    assert "2026-01-02, A CPU" in text
    assert "old" not in text
    assert update(text, [result]) == text


def test_a_gpu_is_named_instead_of_the_processor():
    where = {"cpu": "A CPU", "threads": 2, "torch": "2", "load_before": 0.1, "gpu": "A GPU"}
    text = render(Result("gpu", [], where).tree())
    assert "A GPU" in text and "A CPU" not in text


def test_missing_markers_are_an_error():
    with pytest.raises(UserError, match="benchmarks: begin"):
        update("no block here", [])


def test_readme_shows_the_committed_numbers():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    results = committed(ROOT / "docs" / "benchmarks")
    assert update(readme, results) == readme
    assert (ROOT / "docs" / "benchmarks" / "README.md").read_text(encoding="utf-8") == whole(results)

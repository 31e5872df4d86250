"""The tables of `megamf evaluate`."""

from typing import Any

from rich.console import Console
from rich.table import Table

from megamf.evaluate.perplexity import Perplexity
from megamf.evaluate.words import WordPerplexity


def _table(*columns: str) -> Table:
    table = Table()
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place else "left")
    return table


def _print(table: Table) -> None:
    Console(soft_wrap=True).print(table)


def show_perplexity(results: list[Perplexity]) -> None:
    """A row a dataset."""
    table = _table("data", "loss", "perplexity", "bits per byte", "tokens", "tokens/s")
    for result in results:
        bits = "unknown" if result.bits_per_byte is None else f"{result.bits_per_byte:.4f}"
        table.add_row(
            result.name,
            f"{result.loss:.4f}",
            f"{result.perplexity:.2f}",
            bits,
            f"{result.tokens:,}",
            f"{result.tokens_per_second:,.0f}",
        )
    _print(table)


def show_words(results: list[WordPerplexity]) -> None:
    """A row a file."""
    table = _table("text", "word perplexity", "byte perplexity", "bits per byte", "words", "documents")
    for result in results:
        table.add_row(
            result.name,
            f"{result.word_perplexity:.2f}",
            f"{result.byte_perplexity:.4f}",
            f"{result.bits_per_byte:.4f}",
            f"{result.words:,}",
            f"{result.documents:,}",
        )
    _print(table)


def show_tasks(found: dict[str, Any]) -> None:
    """A row a task and metric, with lm-eval's standard error."""
    table = _table("task", "metric", "value", "standard error", "examples")
    for task, metrics in found["results"].items():
        examples = found.get("n-samples", {}).get(task, {}).get("effective", "")
        for key, value in metrics.items():
            name, _, kind = key.partition(",")
            if name.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = metrics.get(f"{name}_stderr,{kind}")
            shown = f"{error:.4f}" if isinstance(error, int | float) else ""
            table.add_row(task, name, f"{value:.4f}", shown, str(examples))
    _print(table)


def show_pass_at_k(passed: dict[int, float], problems: int, samples: int) -> None:
    """A row a k."""
    table = _table("metric", "value", "problems", "samples a problem")
    for k, value in passed.items():
        table.add_row(f"pass@{k}", f"{value:.4f}", str(problems), str(samples))
    _print(table)

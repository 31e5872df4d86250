"""Measures this installation on the CPU or a GPU: operations, training; compiles the GPU kernels without a GPU."""

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from megamf.bench import Result
from megamf.bench.readme import committed, update, whole
from megamf.cli import run
from megamf.errors import UserError

SUITES = ("cpu", "gpu", "compile", "comm", "plan")


def main(argv: list[str] | None = None) -> int:
    """Run a suite, print its table; exit code 1 with --check where a limit is not kept."""
    args = _parser().parse_args(argv)
    for name in ("threads", "repeats"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: at least 1")
    if args.threads:
        torch.set_num_threads(args.threads)
    with _progress() as progress:
        result = import_module(f"megamf.bench.{args.suite}").run(progress, repeats=args.repeats)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result.tree(), indent=2) + "\n", encoding="utf-8")
    if args.readme:
        folder = args.readme.parent / "docs" / "benchmarks"
        results = committed(folder)
        args.readme.write_text(update(args.readme.read_text(encoding="utf-8"), results), encoding="utf-8")
        (folder / "README.md").write_text(whole(results), encoding="utf-8")
    _show(result)
    return 1 if args.check and any(figure.kept is False for figure in result.figures) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="megamf bench", description=__doc__)
    parser.add_argument("--suite", choices=SUITES, required=True)
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures here")
    parser.add_argument("--readme", type=Path, help="renew the numbers in this README and in docs/benchmarks beside it")
    parser.add_argument("--repeats", type=int, default=15, help="turns of the short cases; medians are reported (15)")
    parser.add_argument("--threads", type=int, help="threads to compute with (default: torch's)")
    parser.add_argument("--check", action="store_true", help="fail where a figure misses its limit")
    return parser


@contextmanager
def _progress() -> Iterator[Callable[[str], Callable[[], None]]]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:

        def begin(what: str) -> Callable[[], None]:
            task = bar.add_task(what, total=None)
            return lambda: bar.advance(task)

        yield begin


def _show(result: Result) -> None:
    console = Console(soft_wrap=True)
    console.print(", ".join(f"{key} {value}" for key, value in result.machine.items()), highlight=False)
    table = Table(title=f"suite {result.suite}, {result.date} UTC")
    for name in ("figure", "value", "limit", "kept", "what"):
        table.add_column(name, justify="right" if name == "value" else "left")
    if result.rows:
        console.print(_rows(result))
    for figure in result.figures:
        bounds = [
            f"<= {figure.at_most:g}" if figure.at_most is not None else "",
            f">= {figure.at_least:g}" if figure.at_least is not None else "",
        ]
        kept = {None: "", True: "yes", False: "NO"}[figure.kept]
        value = "not measured" if figure.value is None else f"{figure.value:.4g}"
        table.add_row(figure.name, value, "".join(bounds), kept, figure.meaning)
    console.print(table)


def _rows(result: Result) -> Table:
    """The details of a suite that has any; the columns are all the names that its rows know."""
    names = list(dict.fromkeys(name for row in result.rows for name in row))
    table = Table(title=f"suite {result.suite}, in detail")
    for name in names:
        numeric = all(isinstance(row.get(name, 0), int | float) for row in result.rows)
        table.add_column(name, justify="right" if numeric else "left")
    for row in result.rows:
        table.add_row(*(str(row.get(name, "")) for name in names))
    return table


if __name__ == "__main__":
    raise SystemExit(run(main))

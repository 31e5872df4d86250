"""What the data jobs share: the options about inputs, and the progress bar."""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from megamf.data.sources import Options


def add_input_options(parser: argparse.ArgumentParser) -> None:
    """--input, --text-field, --blank-lines, --extensions, --on-bad, --overwrite."""
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help=".txt and other text or source files (one document each), .jsonl, .jsonl.gz, .jsonl.zst, .parquet, "
        "folders of such files (hidden ones, __pycache__, site-packages, dist-packages and node_modules are skipped); "
        "the word stdlib is the source and help text of this Python's standard library, "
        "stdlib-with-tests also its tests",
    )
    parser.add_argument(
        "--text-field", default="text", metavar="NAME", help="JSON field or Parquet column with the text (text)"
    )
    parser.add_argument("--blank-lines", action="store_true", help="split .txt files into documents at blank lines")
    parser.add_argument(
        "--extensions",
        nargs="+",
        metavar="EXT",
        help="take only these from folders, for instance py md jsonl.gz; unknown ones are read as text",
    )
    parser.add_argument(
        "--on-bad",
        choices=("skip", "fail"),
        default="skip",
        help="what to do on empty, non-UTF-8 and malformed documents: count and skip them, or fail (skip)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace existing output files")


def input_options(args: argparse.Namespace) -> Options:
    """Reading options out of parsed arguments."""
    return Options(
        text_field=args.text_field,
        blank_lines=args.blank_lines,
        extensions=tuple(args.extensions) if args.extensions else None,
    )


@contextmanager
def byte_progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr with bytes, speed and time left; yields the function that advances it."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(file=sys.stderr)) as progress:
        task = progress.add_task(title, total=total)
        yield lambda read: progress.advance(task, read)
        progress.update(task, completed=total)

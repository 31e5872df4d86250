"""What the jobs on finished models share: their common options, and the progress bar."""

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from megamf.errors import UserError
from megamf.evaluate.load import DTYPES


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """CKPT, --device, --dtype."""
    parser.add_argument(
        "checkpoint",
        type=Path,
        metavar="CKPT",
        help="step, checkpoints or run directory, or a Hugging Face folder in the public layout",
    )
    parser.add_argument("--device", help="where the model runs (cuda where there is one, else cpu)")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32", help="of the weights (float32)")


def device_of(args: argparse.Namespace) -> torch.device:
    """The device asked for, or the best there is. Raises UserError for one that is unknown or missing."""
    name = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from None
    return device


def positive(text: str) -> int:
    """A whole number above zero, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not above zero")
    return value


def refuse_unwritable(path: Path | None) -> None:
    """Raise UserError before any work where the folder of an output file does not exist."""
    if path is not None and not path.absolute().parent.is_dir():
        raise UserError(f"the folder of {path} does not exist")


def write_json(path: Path | None, tree: dict[str, Any]) -> None:
    """One indented JSON object, where a path is given."""
    if path is not None:
        path.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")


@contextmanager
def progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr with the time left; yields `advance(done, total)`."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)

"""What the actions of `megamf modules` share."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from megamf.checkpoint import Checkpoint
from megamf.data.tokenizer import load_tokenizer
from megamf.errors import UserError
from megamf.evaluate import load
from megamf.evaluate.load import DTYPES
from megamf.evaluate.weights import open_weights, trained_length
from megamf.model import ModuleFormer
from megamf.modularity.statistics import Statistics, collect, read_statistics
from megamf.modularity.streamed import StreamedModel
from megamf.tools._models import device_of, positive, progress

BATCH = 8
TABLE_WIDTH = 116


def data_options(parser: argparse.ArgumentParser, *, required: bool, nargs: str | None, windows: bool = True) -> None:
    """Which data the model runs on; `windows`: and how much of it at one time."""
    parser.add_argument(
        "--data", nargs=nargs, required=required, metavar="PREFIX", help="made by `megamf prepare`, without .bin"
    )
    parser.add_argument("--tokenizer", metavar="PATH", help="checked against the model")
    parser.add_argument("--seq-len", type=positive, metavar="N", help="tokens of a window (as in training)")
    if not windows:
        return
    parser.add_argument("--batch", type=positive, metavar="N", help="windows computed at one time (8)")
    parser.add_argument(
        "--max-batches", type=positive, metavar="N", help="at most so many batches, spread evenly over each dataset"
    )


@contextmanager
def opened(args: argparse.Namespace) -> Iterator[tuple[StreamedModel, int]]:
    """The model, one block at a time in memory, and the length of windows."""
    device = device_of(args)
    with open_weights(args.checkpoint, DTYPES[args.dtype]) as weights:
        check_tokenizer(args)
        model = StreamedModel(weights, DTYPES[args.dtype], device)
        yield model, args.seq_len or trained_length(args.checkpoint)


def check_tokenizer(args: argparse.Namespace) -> None:
    """Raise UserError where --tokenizer is given and is not that of the model."""
    if args.tokenizer is not None:
        load.check_tokenizer(load_tokenizer(args.tokenizer), args.checkpoint)


def watch(args: argparse.Namespace, model: ModuleFormer, seq_len: int, prefix: str) -> Statistics:
    with progress(f"watching modules on {Path(prefix).name}") as advance:
        return collect(
            model, prefix, seq_len=seq_len, batch=args.batch or BATCH, max_batches=args.max_batches, on_batch=advance
        )


def wide_console() -> Console:
    """Of a width in which the tables of these jobs lose no digit, whatever the terminal's."""
    console = Console(soft_wrap=True)
    console.width = max(console.width, TABLE_WIDTH)
    return console


def refuse_without_data(args: argparse.Namespace, *more: str) -> None:
    """Raise UserError for options about running the model where no data are given to run it on."""
    if args.data:
        return
    for name in ("tokenizer", "device", "batch", "max_batches", *more):
        if getattr(args, name, None) is not None:
            raise UserError(f"--{name.replace('_', '-')} has no effect without --data")


def one_dataset(path: Path, checkpoint: Checkpoint) -> Statistics:
    """The statistics in a file of `modules show --json`. Raises UserError unless of one dataset and `checkpoint`."""
    found = read_statistics(path)
    found.check(path, checkpoint)
    if len(found.statistics) != 1:
        raise UserError(
            f"{path} holds {len(found.statistics)} datasets, one is needed: `megamf modules show --data` with that one"
        )
    return found.statistics[0]

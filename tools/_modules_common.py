"""What the actions of `megamf modules` share."""

import argparse
from pathlib import Path

from rich.console import Console

from megamf.checkpoint import Checkpoint
from megamf.data.tokenizer import load_tokenizer
from megamf.errors import UserError
from megamf.evaluate.load import DTYPES, check_vocabulary, load_model
from megamf.evaluate.weights import trained_length
from megamf.modularity.statistics import Statistics, collect, read_statistics
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


def load(args: argparse.Namespace):
    device = device_of(args)
    tokenizer = None if args.tokenizer is None else load_tokenizer(args.tokenizer)
    model, config = load_model(args.checkpoint, DTYPES[args.dtype], device)
    if tokenizer is not None:
        check_vocabulary(tokenizer, config.vocab_size)
    return model, args.seq_len or trained_length(args.checkpoint)


def watch(args: argparse.Namespace, model, seq_len: int, prefix: str) -> Statistics:
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

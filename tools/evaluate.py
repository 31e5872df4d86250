"""Loss, perplexity and bits per byte of a model on tokenised data.

Every token of the data is predicted once, from at most --seq-len tokens before it and never from another document.
The first token of a document is not predicted, as in training.
"""

import argparse
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megamf.cli import run
from megamf.data.tokenizer import load_tokenizer
from megamf.evaluate.load import DTYPES, check_vocabulary, load_model
from megamf.evaluate.perplexity import Perplexity, measure, together
from megamf.evaluate.weights import trained_length
from megamf.tools._models import add_model_options, device_of, positive, progress, refuse_unwritable, write_json


def main(argv: list[str] | None = None) -> int:
    """Evaluate each dataset, print a table, and write JSON where asked."""
    args = _parser().parse_args(argv)
    refuse_unwritable(args.json)
    device = device_of(args)
    tokenizer = None if args.tokenizer is None else load_tokenizer(args.tokenizer)
    model, config = load_model(args.checkpoint, DTYPES[args.dtype], device)
    if tokenizer is not None:
        check_vocabulary(tokenizer, config.vocab_size)
    seq_len = args.seq_len or trained_length(args.checkpoint)
    results = []
    for prefix in args.data:
        with progress(f"evaluating {Path(prefix).name}") as advance:
            result = measure(
                model,
                prefix,
                seq_len=seq_len,
                batch=args.batch,
                max_batches=args.max_batches,
                tokenizer=tokenizer,
                on_batch=advance,
            )
        results.append(result)
    whole = together(results)
    _show(results if len(results) == 1 else [*results, whole])
    tree = asdict(whole) | {"name": str(args.checkpoint), "seq_len": seq_len, "data": [asdict(r) for r in results]}
    write_json(args.json, tree)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="megamf evaluate", description=__doc__)
    add_model_options(parser)
    parser.add_argument(
        "--data", nargs="+", required=True, metavar="PREFIX", help="datasets made by `megamf prepare`, without .bin"
    )
    parser.add_argument(
        "--tokenizer", metavar="PATH", help="checked against the data; measures the bytes of data without a .json"
    )
    parser.add_argument(
        "--seq-len",
        type=positive,
        metavar="N",
        help="tokens of a window (as in training, else block_size + history_length)",
    )
    parser.add_argument("--batch", type=positive, default=8, metavar="N", help="windows computed at one time (8)")
    parser.add_argument(
        "--max-batches", type=positive, metavar="N", help="at most so many batches, spread evenly over each dataset"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    return parser


def _show(results: list[Perplexity]) -> None:
    table = Table()
    for column in ("data", "loss", "perplexity", "bits per byte", "tokens", "tokens/s"):
        table.add_column(column, justify="left" if column == "data" else "right")
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
    Console(soft_wrap=True).print(table)


if __name__ == "__main__":
    raise SystemExit(run(main))

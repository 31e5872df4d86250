"""Merge the shards that `megamf prepare --shard` wrote into one indexed dataset.

Writes the bytes that one process would have written for all inputs: OUTPUT.bin, OUTPUT.idx and OUTPUT.json, or
OUTPUT-train and OUTPUT-valid with --valid-fraction. They appear when everything is done, and the shards are removed.
"""

import argparse

from megamf.cli import run
from megamf.data.shards import merge_shards


def parser() -> argparse.ArgumentParser:
    """The options of this job."""
    parser = argparse.ArgumentParser(prog="megamf merge-data", description=__doc__)
    parser.add_argument("--output", required=True, metavar="PREFIX", help="the --output of megamf prepare")
    parser.add_argument("--num-shards", type=int, required=True, metavar="N", help="how many shards there are")
    parser.add_argument(
        "--valid-fraction",
        type=float,
        default=0.0,
        metavar="F",
        help="share of the documents, evenly spread, to write to PREFIX-valid; the others go to PREFIX-train (0)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace existing output files")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Merge, and say what came out."""
    args = parser().parse_args(argv)
    fraction = args.valid_fraction
    print(merge_shards(args.output, args.num_shards, valid_fraction=fraction, overwrite=args.overwrite))
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))

"""Tokenise text into indexed datasets (Megatron .bin/.idx) for training.

Writes OUTPUT.bin, OUTPUT.idx and OUTPUT.json; with --valid-fraction, OUTPUT-train and OUTPUT-valid instead. The files
appear when everything is done. The result depends on the inputs and options, not on the number of workers.

Large corpora: --num-shards N lets N tasks, on machines that share the folder, do one --shard each; every task is given
all inputs. `megamf merge-data` then makes the same files of the shards. slurm/prepare_data.sh does both.
"""

import argparse

from megamf.cli import run
from megamf.data.prepare import prepare
from megamf.data.shards import parts_of_shard, prepare_shard
from megamf.data.sources import find_parts
from megamf.errors import UserError
from megamf.tools._inputs import add_input_options, byte_progress, input_options


def parser() -> argparse.ArgumentParser:
    """The options of this job."""
    parser = argparse.ArgumentParser(prog="megamf prepare", description=__doc__)
    add_input_options(parser)
    parser.add_argument(
        "--tokenizer", required=True, metavar="PATH", help="sentencepiece .model, tokenizer.json, or their folder"
    )
    parser.add_argument("--output", required=True, metavar="PREFIX", help="path of the files without .bin and .idx")
    parser.add_argument("--workers", type=int, metavar="N", help="tokenising processes (one a core)")
    parser.add_argument("--eod-token", metavar="TOKEN", help="the token that ends documents (the tokenizer's own)")
    parser.add_argument(
        "--append-eod",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="end every document with the document end token (on)",
    )
    parser.add_argument(
        "--valid-fraction",
        type=float,
        default=0.0,
        metavar="F",
        help="share of the documents, evenly spread, to write to PREFIX-valid; the others go to PREFIX-train (0)",
    )
    parser.add_argument("--num-shards", type=int, metavar="N", help="share the input files out among N tasks")
    parser.add_argument("--shard", type=int, metavar="I", help="which of the shards, from 0 to N-1, this task writes")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Tokenise, write, and say what came out."""
    args = parser().parse_args(argv)
    if (args.shard is None) != (args.num_shards is None):
        raise UserError(f"--shard {args.shard} and --num-shards {args.num_shards}: give both or neither")
    if args.shard is not None and args.valid_fraction:
        raise UserError("the valid fraction is taken of all shards together: give it to megamf merge-data")
    options = input_options(args)
    parts = find_parts(args.input, options)
    mine = parts if args.shard is None else parts_of_shard(parts, args.shard, args.num_shards)
    with byte_progress("tokenising", sum(part.size for part in mine)) as advance:
        common = {
            "options": options,
            "eod_token": args.eod_token,
            "workers": args.workers,
            "append_eod": args.append_eod,
            "on_bad": args.on_bad,
            "overwrite": args.overwrite,
            "on_progress": advance,
        }
        if args.shard is None:
            prepared = prepare(parts, args.tokenizer, args.output, valid_fraction=args.valid_fraction, **common)
        else:
            prepared = prepare_shard(parts, args.tokenizer, args.output, args.shard, args.num_shards, **common)
    print(prepared)
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))

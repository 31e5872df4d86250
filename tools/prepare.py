"""Tokenise text into indexed datasets (Megatron .bin/.idx) for training.

Writes OUTPUT.bin, OUTPUT.idx and OUTPUT.json; with --valid-fraction, OUTPUT-train and OUTPUT-valid instead. The files
appear when everything is done. The result depends on the inputs and options, not on the number of workers.
"""

import argparse

from megamf.cli import run
from megamf.data.prepare import prepare
from megamf.data.sources import find_parts
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
    return parser


def main(argv: list[str] | None = None) -> int:
    """Tokenise, write, and say what came out."""
    args = parser().parse_args(argv)
    options = input_options(args)
    parts = find_parts(args.input, options)
    with byte_progress("tokenising", sum(part.size for part in parts)) as advance:
        prepared = prepare(
            parts,
            args.tokenizer,
            args.output,
            options=options,
            eod_token=args.eod_token,
            workers=args.workers,
            append_eod=args.append_eod,
            valid_fraction=args.valid_fraction,
            on_bad=args.on_bad,
            overwrite=args.overwrite,
            on_progress=advance,
        )
    print(prepared)
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))

"""Train a sentencepiece tokenizer (BPE or unigram, lossless) on text.

The pieces suit source code: runs of spaces and line ends are pieces, digits stand alone, and bytes are the fallback,
so that decoding gives back every text unchanged. A Hugging Face tokenizer.json needs no training here: give it to
`megamf prepare` as it is.
"""

import argparse
import sys
from collections.abc import Iterator

from megamf.cli import run
from megamf.data.prepare import BadDocuments, good_texts
from megamf.data.sources import find_parts, read_documents
from megamf.data.tokenizer import train_sentencepiece
from megamf.errors import UserError
from megamf.tools._inputs import add_input_options, byte_progress, input_options


def parser() -> argparse.ArgumentParser:
    """The options of this job."""
    parser = argparse.ArgumentParser(prog="megamf tokenizer", description=__doc__)
    add_input_options(parser)
    parser.add_argument("--vocab-size", type=int, required=True, metavar="N", help="pieces, special ones included")
    parser.add_argument("--type", choices=("bpe", "unigram"), default="bpe", help="kind of model (bpe)")
    parser.add_argument("--output", required=True, metavar="PATH.model", help="file to write")
    parser.add_argument("--keep-digits-together", action="store_true", help="let numbers become pieces")
    parser.add_argument(
        "--max-megabytes", type=int, default=256, metavar="N", help="train on at most this much, evenly spread (256)"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Read the inputs, train, write, and say what came out."""
    args = parser().parse_args(argv)
    if args.max_megabytes < 1:
        raise UserError(f"--max-megabytes {args.max_megabytes} must be at least 1")
    options = input_options(args)
    parts = find_parts(args.input, options)
    bad = BadDocuments()
    with byte_progress("reading", sum(part.size for part in parts)) as advance:
        tokenizer = train_sentencepiece(
            _announced(good_texts(read_documents(parts, options), bad, args.on_bad, advance)),
            args.output,
            args.vocab_size,
            kind=args.type,
            split_digits=not args.keep_digits_together,
            max_bytes=args.max_megabytes * 2**20,
            overwrite=args.overwrite,
        )
    print(f"{args.output}: {args.type}, {tokenizer.vocab_size} pieces, document end {tokenizer.eod_id}; {bad}")
    return 0


def _announced(texts: Iterator[str]) -> Iterator[str]:
    yield from texts
    print("everything is read; training", file=sys.stderr)


if __name__ == "__main__":
    raise SystemExit(run(main))

"""Continue a text with a model.

The prompt comes from --prompt, --prompt-file or standard input; the continuation goes to standard output as it is made.
It ends at the token that ends documents, or after --max-new-tokens. An empty prompt begins a new document.
"""

import argparse
import json
import sys
import time
from pathlib import Path

from megamf.cli import run
from megamf.data.tokenizer import Tokenizer, load_tokenizer
from megamf.errors import UserError
from megamf.evaluate.generation import Sampling, generate, stream_text
from megamf.evaluate.load import DTYPES, check_tokenizer, load_model
from megamf.tools._models import add_model_options, device_of, positive


def main(argv: list[str] | None = None) -> int:
    """Load, sample, print."""
    args = _parser().parse_args(argv)
    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.seed)
    device = device_of(args)
    tokenizer = load_tokenizer(args.tokenizer)
    check_tokenizer(tokenizer, args.checkpoint)
    prompt = _prompt(args)
    model, _ = load_model(args.checkpoint, DTYPES[args.dtype], device)
    prompt_ids = tokenizer.encode(prompt) or [tokenizer.eod_id]

    began = time.perf_counter()
    made: list[int] = []
    steps = generate(model, [prompt_ids], args.max_new_tokens, sampling, tokenizer.eod_id)
    pieces = []
    if args.stream and not args.json:
        sys.stdout.write(prompt)
    for piece in stream_text(tokenizer, _noted(steps, made)):
        pieces.append(piece)
        if args.stream and not args.json:
            sys.stdout.write(piece)
            sys.stdout.flush()
    seconds = time.perf_counter() - began
    if args.json:
        print(json.dumps(_record(prompt, "".join(pieces), len(prompt_ids), made, tokenizer, args, seconds)))
    else:
        print("" if args.stream else prompt + "".join(pieces))
    return 0


def _noted(steps, made: list[int]):
    """The tokens of the only row, kept in `made` on their way."""
    for (token,) in steps:
        made.append(token)
        yield token


def _record(
    prompt: str,
    text: str,
    prompt_tokens: int,
    made: list[int],
    tokenizer: Tokenizer,
    args: argparse.Namespace,
    seconds: float,
) -> dict:
    return {
        "prompt": prompt,
        "text": text,
        "prompt_tokens": prompt_tokens,
        "tokens": made,
        "finished": len(made) < args.max_new_tokens,
        "tokenizer": tokenizer.name,
        "seconds": seconds,
        "tokens_per_second": len(made) / seconds,
    }


def _prompt(args: argparse.Namespace) -> str:
    if args.prompt is not None:
        return args.prompt
    if args.prompt_file is None:
        return sys.stdin.read()
    try:
        return args.prompt_file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompt-file {args.prompt_file} cannot be read as UTF-8 text: {error}") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="megamf generate", description=__doc__)
    add_model_options(parser)
    parser.add_argument("--tokenizer", required=True, metavar="PATH", help="the one that the model was trained with")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", metavar="TEXT", help="the text to continue")
    source.add_argument("--prompt-file", type=Path, metavar="FILE", help="a file that holds it (default: stdin)")
    parser.add_argument("--max-new-tokens", type=positive, default=128, metavar="N", help="at most so many (128)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the most likely token (0.8)")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="choose among the K most likely (0: all)")
    parser.add_argument(
        "--top-p", type=float, default=0.95, metavar="P", help="choose among the most likely that hold P (0.95)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random draws (0)")
    parser.add_argument("--stream", action=argparse.BooleanOptionalAction, default=True, help="print as it is made")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    return parser


if __name__ == "__main__":
    raise SystemExit(run(main))

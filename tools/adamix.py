"""Adapt a Hugging Face model to a task with a mixture of adapters or LoRAs, merged into one.

MODEL is frozen; in every layer M copies of an adapter or of a LoRA are trained, a random one of which serves a batch,
and then averaged. With --modules 1 it is the plain adapter or LoRA, with --method full ordinary fine-tuning.
Examples are JSON Lines: text and label (--task classification, regression) or prompt and target (generation).
OUT receives the merged module (LoRA: in PEFT's format), all copies, and adamix.json with settings and scores.
"""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from megamf.cli import run
from megamf.errors import UserError
from megamf.evaluate.load import DTYPES
from megamf.tools._models import device_of, positive, progress


def main(argv: list[str] | None = None) -> int:
    """Train, score and save."""
    args = _parser().parse_args(argv)
    _require_packages()
    from megamf.adapt import adamix, finetune, folders, loading
    from megamf.adapt.scores import generate, text_scores

    _quieten_transformers()
    _refuse_without_effect(args)
    folders.check_out(args.out)
    device = device_of(args)
    earlier = folders.read_record(args.adapters) if args.adapters else None
    config = earlier["config"] if earlier else _config(args)
    recipe = _recipe(args, config)
    task, examples, valid = _data(args, loading.load_tokenizer(args.model), earlier)

    torch.manual_seed(args.seed)
    base = loading.load_base(args.model, task, DTYPES[args.dtype], device)
    head = adamix.head_names(base, args.task)
    record: dict[str, Any] = {
        "base": {
            "name": str(args.model),
            "model_type": base.config.model_type,
            "fingerprint": folders.fingerprint(base, head),
        },
        "labels": task.labels,
        "recipe": asdict(recipe),
        "examples": {"train": len(examples), "valid": len(valid)},
    }
    if earlier:
        model = folders.load_adapted(base, args.adapters)
    else:
        model = adamix.prepare(base, config, args.task)
    record["parameters"] = adamix.count(model)
    print(_counts(config, record["parameters"]))

    with progress("training") as advance:
        history = finetune.train(model, task, examples, recipe, lambda done, of, _: advance(done, of))
    with progress("evaluating"):
        modes = args.modes.split(",")
        record["scores"] = finetune.scores_by_mode(model, task, valid, args.batch_size, modes, args.seed)
        if args.generate:
            chosen = valid[: args.generate]
            texts = generate(model, task, chosen, args.batch_size, args.max_new_tokens)
            record["scores"]["generated"] = text_scores(texts, [example.reference for example in chosen])
            record["samples"] = [{"text": t, "reference": e.reference} for t, e in list(zip(texts, chosen))[:10]]
    record["history"] = history
    folders.save(args.out, model, config, args.task, record, task.tokenizer)
    for line in _lines(record["scores"]):
        print(line)
    print(args.out)
    return 0


def _require_packages() -> None:
    try:
        import peft  # noqa: F401
        import transformers  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError(f"adaptation needs {error.name}: pip install 'megamf[adapt]'") from None


def _quieten_transformers() -> None:
    """The task head is new by design, and the job has a progress bar of its own."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _refuse_without_effect(args: argparse.Namespace) -> None:
    from megamf.adapt.mixture import MODES

    unknown = [mode for mode in args.modes.split(",") if mode not in MODES]
    if unknown:
        raise UserError(f"--modes {args.modes}: {unknown[0]!r} is not one of {', '.join(MODES)}")
    if args.epochs and args.train is None:
        raise UserError(f"--epochs {args.epochs} needs examples: --train F")
    if args.generate and args.task != "generation":
        raise UserError(f"--generate {args.generate} has no effect with --task {args.task}")
    if args.method == "full" and args.dtype in ("bfloat16", "float16"):
        raise UserError(f"--method full with --dtype {args.dtype} would lose small updates to rounding: use float32")
    if args.pair_column and args.task == "generation":
        raise UserError(f"--pair-column {args.pair_column} has no effect with --task generation")
    if args.adapters:
        shaping = ("method", "modules", "rank", "alpha", "dropout", "share", "start", "targets", "places")
        given = [name for name in (*shaping, "target_parameters") if getattr(args, name) is not None]
        if given:
            raise UserError(f"--{given[0].replace('_', '-')} has no effect with --adapters: the saved ones keep theirs")
        if args.epochs == 0 and args.train:
            raise UserError(f"--train {args.train} has no effect with --epochs 0: leave it out")
    elif args.epochs == 0:
        raise UserError("--epochs 0 trains nothing: it is for scoring saved adapters (--adapters FOLDER)")


def _config(args: argparse.Namespace) -> Any:
    from megamf.adapt.adamix import AdamixConfig

    names = ("method", "modules", "rank", "alpha", "dropout", "share", "start", "places")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    for name in ("targets", "target_parameters"):
        if getattr(args, name) is not None:
            given[name] = tuple(part for part in getattr(args, name).split(",") if part)
    if given.get("method") == "full":
        for name in ("rank", "share"):
            if name in given:
                raise UserError(f"--{name} {given[name]} has no effect with --method full: leave it out")
        given.setdefault("modules", 1)
    return AdamixConfig(**given)


def _recipe(args: argparse.Namespace, config: Any) -> Any:
    from megamf.adapt.finetune import Recipe

    consistency = args.consistency
    if consistency is None:
        consistency = 1.0 if config.modules > 1 else 0.0
    names = ("epochs", "batch_size", "lr", "warmup", "weight_decay", "seed")
    return Recipe(consistency=consistency, **{name: getattr(args, name) for name in names})


def _data(args: argparse.Namespace, tokenizer: Any, earlier: dict[str, Any] | None) -> tuple[Any, list, list]:
    """The task, and the examples to train and to score on."""
    from megamf.adapt.tasks import Columns, Task, label_names, read_rows

    if earlier and earlier["task"] != args.task:
        raise UserError(f"{args.adapters} was trained for {earlier['task']}, not for --task {args.task}")
    columns = Columns(args.text_column, args.pair_column, args.label_column, args.prompt_column, args.target_column)
    train_rows = read_rows(args.train, args.task, columns) if args.epochs else []
    valid_rows = read_rows(args.valid, args.task, columns)
    labels: list[str] = []
    if args.task == "classification":
        labels = earlier["labels"] if earlier else label_names(train_rows, columns.label, args.train)
    task = Task(args.task, tokenizer, args.max_length, columns, labels)
    return task, task.encode(train_rows, args.train), task.encode(valid_rows, args.valid)


def _counts(config: Any, numbers: dict[str, int]) -> str:
    if config.method == "full":
        return f"full fine-tuning: {numbers['trained']:,} parameters trained"
    return (
        f"{config.method} x {config.modules}: {numbers['trained']:,} parameters trained, {numbers['head']:,} of them "
        f"the task head; {numbers['merged']:,} in the merged module"
    )


def _lines(scores: dict[str, Any]) -> list[str]:
    lines = []
    for mode, values in scores.items():
        for index, one in enumerate(values if isinstance(values, list) else [values]):
            name = f"{mode} {index}" if isinstance(values, list) else mode
            lines.append(f"{name:<10} " + "  ".join(f"{key} {value:.4f}" for key, value in one.items()))
    return lines


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megamf adamix", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, metavar="MODEL", help="Hugging Face folder (safetensors, tokenizer)")
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to write; must not exist")
    parser.add_argument("--task", required=True, choices=["classification", "regression", "generation"])
    parser.add_argument("--train", type=Path, metavar="F", help="JSON Lines to learn from (not with --epochs 0)")
    parser.add_argument("--valid", type=Path, required=True, metavar="F", help="JSON Lines to score on")
    parser.add_argument("--adapters", type=Path, metavar="FOLDER", help="train on (or score: --epochs 0) saved copies")

    group = parser.add_argument_group("modules")
    group.add_argument("--method", choices=["lora", "adapter", "full"], help="(lora)")
    group.add_argument("--modules", type=int, metavar="M", help="copies in every layer (4; 1 for full)")
    group.add_argument("--rank", type=int, metavar="R", help="width between the two projections (8)")
    group.add_argument("--alpha", type=float, help="LoRA is scaled by alpha / rank (twice the rank)")
    group.add_argument("--dropout", type=float, help="on LoRA's inputs (0)")
    group.add_argument("--share", choices=["up", "down", "none"], help="projection with one copy only (up, LoRA's B)")
    group.add_argument("--start", choices=["same", "own"], help="copies start alike (LoRA) or differ (adapter)")
    group.add_argument("--targets", metavar="A,B", help="linear layers for LoRA, ends of their names (PEFT's choice)")
    group.add_argument("--target-parameters", metavar="A,B", help="expert tensors for LoRA, ends of their names")
    group.add_argument("--places", metavar="REGEX", help="modules behind which adapters stand, end of their names")

    group = parser.add_argument_group("training")
    group.add_argument("--epochs", type=int, default=3, help="(3)")
    group.add_argument("--batch-size", type=positive, default=16, metavar="N", help="examples a step (16)")
    group.add_argument("--lr", type=float, default=3e-4, help="largest learning rate (3e-4)")
    group.add_argument("--warmup", type=float, default=0.06, help="share of the steps (0.06)")
    group.add_argument("--weight-decay", type=float, default=0.1, help="(0.1)")
    group.add_argument(
        "--consistency",
        type=float,
        metavar="W",
        help="weight of the distance of two passes (1; 0 for --modules 1)",
    )
    group.add_argument("--max-length", type=positive, default=128, metavar="N", help="tokens of an example (128)")
    group.add_argument("--seed", type=int, default=0, help="(0)")
    group.add_argument("--device", help="where the model runs (cuda where there is one, else cpu)")
    group.add_argument("--dtype", choices=list(DTYPES), default="float32", help="of the base weights (float32)")

    group = parser.add_argument_group("columns")
    group.add_argument("--text-column", default="text", metavar="NAME", help="(text)")
    group.add_argument("--pair-column", metavar="NAME", help="a second text (none)")
    group.add_argument("--label-column", default="label", metavar="NAME", help="(label)")
    group.add_argument("--prompt-column", default="prompt", metavar="NAME", help="(prompt)")
    group.add_argument("--target-column", default="target", metavar="NAME", help="(target)")

    group = parser.add_argument_group("scores")
    group.add_argument("--modes", default="merged,random,fixed", metavar="A,B", help="ways to use the copies (all)")
    group.add_argument("--generate", type=positive, metavar="N", help="also score texts for the first N examples")
    group.add_argument("--max-new-tokens", type=positive, default=40, metavar="N", help="of a generated text (40)")
    return parser


if __name__ == "__main__":
    raise SystemExit(run(main))

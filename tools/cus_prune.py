"""Prune a model to an expert: neurons that matter for none of its language, domain and task go, without training.

MODEL is a Hugging Face folder (Llama-like, GPT-NeoX or ModuleFormer); the result is a folder of the same architecture
where that can express the sizes (`--budget layer --attention none` or `heads`), else one with its own modelling file.
Documents are .jsonl files with one document a line, .parquet, text files (one document each), or folders of these.
"""

import argparse
from pathlib import Path
from typing import Any

from megamf.cli import run
from megamf.compress import baselines, cus_prune
from megamf.compress.cus_prune import DIMENSIONS, OF, RELATIVE, SCALES, Settings
from megamf.compress.documents import load_documents, mean_loss, token_documents
from megamf.compress.folder import code_of, load_causal_lm, model_card, refuse_existing, save_folder
from megamf.compress.neurons import ATTENTION, EXPERTS
from megamf.compress.relevance import QK_TOKENS
from megamf.compress.remove import remove_neurons
from megamf.errors import UserError
from megamf.evaluate.load import DTYPES
from megamf.tools._models import device_of, positive, progress, refuse_unwritable, write_json

METHOD = "cus-prune"
# Options that only some methods have, by the name of their argument.
OWN = {
    "share": (METHOD,),
    "scale": (METHOD,),
    "relative": (METHOD,),
    "qk_tokens": (METHOD,),
    "budget": (METHOD, *baselines.NEURON_METHODS),
    "attention": (METHOD, *baselines.NEURON_METHODS),
    "experts": (METHOD, *baselines.NEURON_METHODS),
    "multiple": (METHOD, *baselines.NEURON_METHODS, "slicing"),
    "protect": baselines.NEURON_METHODS,
    "seed": ("random",),
}


def main(argv: list[str] | None = None) -> int:
    """Measure, choose, remove, write, and say what went."""
    parser = _parser()
    args = parser.parse_args(argv)
    given = {name: getattr(args, name) for name in DIMENSIONS if getattr(args, name)}
    if not given:
        raise UserError(f"give documents for at least one of {', '.join(f'--{name}' for name in DIMENSIONS)}")
    for name, methods in OWN.items():
        if args.method not in methods and getattr(args, name) != parser.get_default(name):
            option = name.replace("_", "-")
            raise UserError(f"--{option} changes nothing for --method {args.method}, only for {', '.join(methods)}")
    settings = Settings(**{name: getattr(args, name) for name in Settings.__dataclass_fields__})
    settings.check()
    refuse_existing(args.out)
    refuse_unwritable(args.json)
    device = device_of(args)
    texts = {name: load_documents(paths, args.field, args.documents) for name, paths in given.items()}
    measured = {str(path): load_documents(path, args.field, args.loss_documents) for path in args.loss or ()}
    model, tokenizer = load_causal_lm(args.model, dtype=DTYPES.get(args.dtype), device=device)
    tokens = {name: token_documents(rows, tokenizer, args.length) for name, rows in texts.items()}
    probes = {name: token_documents(rows, tokenizer, args.length) for name, rows in measured.items()}
    report: dict[str, Any] = {
        "method": args.method,
        "documents": {name: {"count": len(rows), "tokens": sum(map(len, rows))} for name, rows in tokens.items()},
        "loss": {name: {"before": mean_loss(model, rows)} for name, rows in probes.items()},
    }
    prune = _cus_prune if args.method == METHOD else _baseline
    small, found = prune(args, model, tokens, settings)
    report |= found | {"parameters": model.num_parameters(), "parameters_left": small.num_parameters()}
    for name, rows in probes.items():
        report["loss"][name]["after"] = mean_loss(small, rows)
    plain = not code_of(small)[1]
    base = args.model.resolve().name
    card = model_card(args.out.name, base, _rows(report, settings), _told(report), plain)
    save_folder(small, args.out, source=args.model, card=card, report=report)
    write_json(args.json, report)
    print(_summary(args.out, report, plain))
    return 0


def _cus_prune(args: argparse.Namespace, model, tokens: dict, settings: Settings) -> tuple[Any, dict[str, Any]]:
    """The pruned model, and what went."""
    with progress("measuring neurons") as advance:
        selection = cus_prune.select(model, tokens, settings, on_document=advance)
    return remove_neurons(model, selection.keep), cus_prune.describe(model, selection, settings)


def _baseline(args: argparse.Namespace, model, tokens: dict, settings: Settings) -> tuple[Any, dict[str, Any]]:
    """A model pruned by another method, all documents together being its calibration set."""
    pruned = baselines.prune_baseline(
        args.method,
        model,
        [row for rows in tokens.values() for row in rows],
        settings.ratio,
        seed=args.seed,
        of=settings.of,
        attention=settings.attention,
        experts=settings.experts,
        budget=settings.budget,
        multiple=settings.multiple,
        protect=tuple(args.protect),
        length=args.length,
    )
    return pruned.model, {
        "ratio_asked": settings.ratio,
        "ratio_reached": pruned.reached,
        "of": settings.of,
        "detail": pruned.detail,
    }


def _summary(out: Path, report: dict[str, Any], plain: bool) -> str:
    lines = [
        f"{out}: {report['parameters_left']:,} of {report['parameters']:,} parameters, ratio "
        f"{report['ratio_reached']:.4f} ({report['ratio_asked']:g} asked)",
        "a plain folder" if plain else "with its own modelling file (trust_remote_code)",
    ]
    if "removed_neurons" in report:
        lines.append(f"{report['removed_neurons']:,} of {report['neurons']:,} neurons are gone")
    for name, loss in report["loss"].items():
        lines.append(f"loss on {name}: {loss['before']:.4f} before, {loss['after']:.4f} after")
    return "\n".join(lines)


def _told(report: dict[str, Any]) -> str:
    sets = ", ".join(f"{name} ({row['count']} documents)" for name, row in report["documents"].items())
    if report["method"] == METHOD:
        return (
            "A pruned model: without the neurons that change the output of their layer least on documents of its "
            f"{sets}. Nothing was trained afterwards."
        )
    return f"A model made smaller by the method `{report['method']}` with documents of {sets}, without training."


def _rows(report: dict[str, Any], settings: Settings) -> dict[str, str]:
    rows = {
        "parameters": f"{report['parameters_left']:,} of {report['parameters']:,}",
        "ratio": f"{report['ratio_reached']:.4f} of the {settings.of} parameters",
    }
    if "removed_neurons" in report:
        rows["neurons gone"] = f"{report['removed_neurons']:,} of {report['neurons']:,}"
    for name, loss in report["loss"].items():
        rows[f"loss on {Path(name).name}"] = f"{loss['after']:.4f} (before: {loss['before']:.4f})"
    return rows


def _parser() -> argparse.ArgumentParser:
    defaults = Settings()
    parser = argparse.ArgumentParser(
        prog="megamf cus-prune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, metavar="MODEL", help="a Hugging Face folder with a tokenizer")
    parser.add_argument("out", type=Path, metavar="OUT", help="a new folder")
    for name in DIMENSIONS:
        parser.add_argument(f"--{name}", nargs="+", metavar="DOCS", help=f"documents that hold the {name} fixed")
    parser.add_argument(
        "--ratio", type=float, default=defaults.ratio, help="share of parameters that goes (%(default)s)"
    )
    parser.add_argument(
        "--of", choices=OF, default=defaults.of, help="share of attention and feed-forward matrices, or of everything"
    )
    parser.add_argument(
        "--budget",
        choices=("global", "layer"),
        default=defaults.budget,
        help="one threshold, or the same share everywhere",
    )
    parser.add_argument(
        "--multiple", type=positive, default=1, metavar="N", help="sizes that are cut are multiples of N channels (1)"
    )
    parser.add_argument(
        "--attention", choices=ATTENTION, default=defaults.attention, help="what goes of the attention (%(default)s)"
    )
    parser.add_argument(
        "--experts",
        choices=EXPERTS,
        default=defaults.experts,
        help="of a ModuleFormer: neurons inside, or whole modules",
    )
    parser.add_argument(
        "--share", type=float, default=1.0, metavar="S",
        help="a neuron is irrelevant to a dimension where it is below the threshold on this share of its documents (1)",
    )  # fmt: skip
    parser.add_argument(
        "--scale",
        choices=SCALES,
        default=defaults.scale,
        help="one threshold of the change, or of its rank (%(default)s)",
    )
    parser.add_argument(
        "--relative", choices=RELATIVE, default=defaults.relative,
        help="changes as shares of the norm of the stream that they are made in, over the document or of its median "
        "token, or as they are (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--qk-tokens", type=positive, default=QK_TOKENS, metavar="N",
        help="tokens of a document that queries and keys are measured on; the time grows with the square (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--documents", type=positive, metavar="N", default=32, help="of each dimension, at most (32)")
    parser.add_argument("--length", type=positive, metavar="N", default=256, help="tokens of a document, at most (256)")
    parser.add_argument("--field", default="text", help="of .jsonl and .parquet documents (text)")
    parser.add_argument("--loss", nargs="+", metavar="DOCS", help="measure the loss on these before and after")
    parser.add_argument(
        "--loss-documents", type=positive, metavar="N", default=32, help="of each of them, at most (32)"
    )
    parser.add_argument(
        "--method", choices=(METHOD, *baselines.METHODS), default=METHOD,
        help="cus-prune, or what it is compared with; these calibrate on all documents together (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--protect", type=int, nargs=2, default=[0, 0], metavar=("FIRST", "LAST"),
        help="random, magnitude, gradient: how many of the first and of the last layers lose nothing (0 0)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of --method random (0)")
    parser.add_argument("--dtype", choices=list(DTYPES), help="of the weights, while measured and written (as stored)")
    parser.add_argument("--device", help="where the model runs (cuda where there is one, else cpu)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there too")
    return parser


if __name__ == "__main__":
    raise SystemExit(run(main))

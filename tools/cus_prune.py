"""Prune a model to an expert: neurons that matter for none of its language, domain and task go, without training.

MODEL is a Hugging Face folder (Llama-like, GPT-NeoX or ModuleFormer); the result is a folder of the same architecture
where that can express the sizes (`--budget layer --attention none` or `heads`), else one with its own modelling file.
Documents are .jsonl files with one document a line, .parquet, text files (one document each), or folders of these.
"""

import argparse
from pathlib import Path
from typing import Any

import torch

from megamf.cli import run
from megamf.compress import cus_prune
from megamf.compress.cus_prune import DIMENSIONS, OF, SCALES, Settings
from megamf.compress.documents import load_documents, mean_loss, token_documents
from megamf.compress.folder import load_causal_lm, model_card, refuse_existing, save_folder
from megamf.compress.neurons import ATTENTION, EXPERTS
from megamf.compress.relevance import QK_TOKENS
from megamf.compress.remove import remove_neurons
from megamf.errors import UserError
from megamf.evaluate.load import DTYPES
from megamf.tools._models import device_of, positive, progress, refuse_unwritable, write_json


def main(argv: list[str] | None = None) -> int:
    """Measure, choose, remove, write, and say what went."""
    args = _parser().parse_args(argv)
    given = {name: getattr(args, name) for name in DIMENSIONS if getattr(args, name)}
    if not given:
        raise UserError(f"give documents for at least one of {', '.join(f'--{name}' for name in DIMENSIONS)}")
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
    with progress("measuring neurons") as advance:
        selection = cus_prune.select(model, tokens, settings, on_document=advance)
    report = cus_prune.describe(model, selection, settings)
    report["method"] = "cus-prune"
    report["documents"] = {name: {"count": len(rows), "tokens": sum(map(len, rows))} for name, rows in tokens.items()}
    small = remove_neurons(model, selection.keep)
    report["loss"] = {
        name: {"before": mean_loss(model, rows), "after": mean_loss(small, rows)} for name, rows in probes.items()
    }
    plain = type(small) is type(model)
    card = model_card(args.out.name, args.model.resolve().name, _rows(report), _told(report, given), plain)
    save_folder(small, args.out, source=args.model, card=card, report=report)
    write_json(args.json, report)
    print(_summary(args.out, report, small, plain))
    return 0


def _summary(out: Path, report: dict[str, Any], small: torch.nn.Module, plain: bool) -> str:
    lines = [
        f"{out}: {small.num_parameters():,} of {report['parameters']:,} parameters, {report['removed_neurons']:,} of "
        f"{report['neurons']:,} neurons gone, ratio {report['ratio_reached']:.4f} ({report['ratio_asked']:g} asked)",
        "a plain folder" if plain else "with its own modelling file (trust_remote_code)",
    ]
    for name, loss in report["loss"].items():
        lines.append(f"loss on {name}: {loss['before']:.4f} before, {loss['after']:.4f} after")
    return "\n".join(lines)


def _told(report: dict[str, Any], given: dict[str, Any]) -> str:
    return (
        f"A pruned model: without the neurons that change the output of their layer least on documents of each of "
        f"{', '.join(given)} ({', '.join(str(row['count']) for row in report['documents'].values())} documents). "
        "Nothing was trained afterwards."
    )


def _rows(report: dict[str, Any]) -> dict[str, str]:
    rows = {
        "parameters": f"{report['parameters'] - report['removed_parameters']:,} of {report['parameters']:,}",
        "ratio": f"{report['ratio_reached']:.4f} of the {report['settings']['of']} parameters",
        "neurons gone": f"{report['removed_neurons']:,} of {report['neurons']:,}",
    }
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
    parser.add_argument("--relative", action="store_true", help="changes as shares of the stream that they are made in")
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
    parser.add_argument("--dtype", choices=list(DTYPES), help="of the weights, while measured and written (as stored)")
    parser.add_argument("--device", help="where the model runs (cuda where there is one, else cpu)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there too")
    return parser


if __name__ == "__main__":
    raise SystemExit(run(main))

"""Write a checkpoint as a Hugging Face folder: the public ModuleFormer layout, or GPT-NeoX for a model of that kind.

The folder holds safetensors with the public names, config.json, generation_config.json, tokenizer files, a model card,
and, of a ModuleFormer, two Python files that load it with trust_remote_code. It appears whole or not at all.
"""

import argparse
from dataclasses import asdict
from pathlib import Path

from megamf.adapt.peft_folder import export_adapters
from megamf.cli import run
from megamf.errors import UserError
from megamf.evaluate.load import DTYPES
from megamf.hf.convert import ExportReport, export_hf, max_logit_difference
from megamf.tools._models import positive, progress, refuse_unwritable, write_json

SHARD_MB = 5000


def main(argv: list[str] | None = None) -> int:
    """Export, compare where asked, and say what was written."""
    args = _parser().parse_args(argv)
    refuse_unwritable(args.json)
    if args.adapters:
        return _adapters(args)
    if args.base is not None:
        raise UserError("--base belongs to --adapters")
    with progress("exporting") as advance:
        report = export_hf(
            args.checkpoint,
            args.out,
            tokenizer=args.tokenizer,
            dtype=None if args.dtype is None else DTYPES[args.dtype],
            buffers=args.include_buffers,
            max_shard_bytes=args.max_shard_mb * 10**6,
            overwrite=args.overwrite,
            on_tensor=advance,
        )
    tree = _record(report)
    print(f"{report.folder}: {report.num_tensors} tensors, {report.total_bytes:,} bytes, {report.dtype}")
    if report.tokenizer is not None:
        print(f"tokenizer: {report.tokenizer.kind}, {report.tokenizer.sentence()}")
    if args.check:
        tree["hf_max_abs_diff"] = max_logit_difference(args.checkpoint, report.folder)
        print(f"largest difference of logits to the checkpoint: {tree['hf_max_abs_diff']:.3g}")
    write_json(args.json, tree)
    return 0


def _adapters(args: argparse.Namespace) -> int:
    """The adapters alone."""
    given = {
        "--tokenizer": args.tokenizer,
        "--include-buffers": args.include_buffers,
        "--max-shard-mb": args.max_shard_mb != SHARD_MB,
        "--overwrite": args.overwrite,
        "--check": args.check,
        "--json": args.json,
    }
    for option, value in given.items():
        if value:
            raise UserError(f"{option} is about exported models: it has no effect with --adapters")
    dtype = None if args.dtype is None else DTYPES[args.dtype]
    folder = export_adapters(args.checkpoint, args.out, base=args.base, dtype=dtype)
    print(f"{folder}: adapters in PEFT's format, for peft.PeftModel.from_pretrained")
    return 0


def _record(report: ExportReport) -> dict:
    return asdict(report) | {"folder": str(report.folder)}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="megamf export-hf", description=__doc__)
    parser.add_argument("checkpoint", type=Path, metavar="CKPT", help="step, checkpoints or run directory")
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to write")
    parser.add_argument("--tokenizer", type=Path, metavar="PATH", help="sentencepiece .model or tokenizer.json to add")
    parser.add_argument("--dtype", choices=list(DTYPES), help="of the written weights (as stored)")
    parser.add_argument(
        "--include-buffers",
        action="store_true",
        help="also write the two constant masks of each layer, as in the released files",
    )
    parser.add_argument(
        "--max-shard-mb", type=positive, default=SHARD_MB, metavar="N", help="megabytes of one file (5000)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    parser.add_argument(
        "--check", action="store_true", help="load checkpoint and export and print the largest difference of logits"
    )
    parser.add_argument(
        "--adapters",
        action="store_true",
        help="of a run with tune.strategy=lora: only its adapters, in PEFT's format (without, they are folded in)",
    )
    parser.add_argument("--base", metavar="NAME", help="with --adapters: where the exported base model is, for PEFT")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was done there")
    return parser


if __name__ == "__main__":
    raise SystemExit(run(main))

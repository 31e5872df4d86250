"""Turn a Hugging Face folder, ModuleFormer in the public layout or GPT-NeoX (Pythia), into a checkpoint.

Weights only, as stored: `megamf evaluate` and `megamf generate` read it, `checkpoint.init_from=OUT` starts a training
run from it. Pickled weights (.bin) are read only where --pickled-weights asks for them.
"""

import argparse
from pathlib import Path

from megamf.cli import run
from megamf.hf.convert import import_hf
from megamf.tools._models import progress


def main(argv: list[str] | None = None) -> int:
    """Import and print the directory."""
    args = _parser().parse_args(argv)
    with progress("importing") as advance:
        step = import_hf(args.folder, args.out, pickled=args.pickled_weights, on_tensor=advance)
    print(step)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="megamf import-hf", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="config.json and model.safetensors or its shards")
    parser.add_argument("out", type=Path, metavar="OUT", help="directory that will hold step-00000000 and latest")
    parser.add_argument(
        "--pickled-weights",
        action="store_true",
        help="read pytorch_model.bin or its shards, where there are no safetensors; what is no tensor is refused",
    )
    return parser


if __name__ == "__main__":
    raise SystemExit(run(main))

"""Turn a Hugging Face folder in the public ModuleFormer layout into a checkpoint.

Weights only, as stored: `megamf evaluate` and `megamf generate` read it, `checkpoint.init_from=OUT` starts a training
run from it. Pickled weights (.bin) are never read.
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
        step = import_hf(args.folder, args.out, on_tensor=advance)
    print(step)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="megamf import-hf", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="config.json and model.safetensors or its shards")
    parser.add_argument("out", type=Path, metavar="OUT", help="directory that will hold step-00000000 and latest")
    return parser


if __name__ == "__main__":
    raise SystemExit(run(main))

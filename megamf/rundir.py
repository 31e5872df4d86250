"""The run directory: which configuration lives there, and what may change when a run goes on."""

import os
from pathlib import Path
from typing import Any

import yaml

from megamf.config import ConfigError, RunConfig, dump, to_tree

# What a resumed run may do otherwise: nothing here changes what is learnt, beyond rounding; but the guards, which
# must be told otherwise after they gave up.
FREE = {
    "run.dir",
    "deepspeed",
    "data.tokenizer",
    "data.mmap",
    "train.micro_batch",
    "train.activation_checkpointing",
    "train.eval_every",
    "train.eval_batches",
    "train.loss_chunk",
    "train.hang_timeout",
}
FREE_SECTIONS = {"checkpoint", "guards", "logging", "parallel"}


def claim(config: RunConfig, write: bool = True) -> None:
    """Check that a `config.yaml` there is of the same run, and write ours where `write` (one rank does).

    Raises ConfigError listing both values of every setting that differs.
    """
    path = config.run.dir / "config.yaml"
    if path.exists():
        before = yaml.safe_load(path.read_text(encoding="utf-8"))
        differing = differences(before, to_tree(config))
        if differing:
            lines = "\n".join(f"  {key}: {old!r} there, {new!r} now" for key, old, new in differing)
            raise ConfigError(
                f"{config.run.dir} already holds a run with another configuration:\n{lines}\n"
                "choose another run.dir (checkpoint.resume=PATH or checkpoint.init_from=PATH can start from it)"
            )
    if not write:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(dump(config), encoding="utf-8")
    temporary.replace(path)


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """(key, old, new) of every setting that differs and may not. A setting that `before` does not have, because the
    version that wrote it had none, counts as at its default."""
    new = _flat(now)
    old = {key: value for key, value in _flat(to_tree(RunConfig())).items() if key in new} | _flat(before)
    keys = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    return [
        (key, old.get(key), new.get(key)) for key in keys if key not in FREE and key.split(".")[0] not in FREE_SECTIONS
    ]


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def check_writable(directory: Path) -> None:
    """Raise ConfigError, before any work, where the run directory cannot be written."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"run.dir={directory} cannot be written: {error.strerror}") from None

"""Reading a checkpoint: one tensor at a time, every byte that is read checked against the manifest."""

import json
import threading
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megamf.checkpoint import layout
from megamf.checkpoint.errors import DamagedCheckpoint
from megamf.checkpoint.schema import Manifest, Module, TensorEntry, logical_shapes
from megamf.checkpoint.shard import Shard, ShardError
from megamf.checkpoint.steps import resolve
from megamf.checkpoint.verify import newest_good, quick_problems, read_manifest, read_modules
from megamf.errors import UserError


class Checkpoint:
    """A step directory opened for reading.

    `path` is a step directory, a checkpoints directory (its `latest`) or a run directory. Opening checks the
    manifest, the sizes of all files and the content of the small ones, and reads no tensor. Names are state_dict
    keys, with `.EXPERT` behind them for one module of an expert tensor; `group` is one of `layout.GROUPS`.
    Raises UserError where there is no checkpoint and DamagedCheckpoint, naming the file, where it is not whole.
    Safe to use from several threads.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = resolve(Path(path))
        try:
            self.manifest: Manifest = read_manifest(self.path)
        except DamagedCheckpoint as error:
            raise self._damaged(error.file, error.what) from error
        self.check()
        self.state: dict[str, Any] = json.loads((self.path / layout.STATE).read_bytes())
        self.model: dict[str, Any] = json.loads((self.path / layout.MODEL).read_bytes())
        self.modules: list[Module] = read_modules(self.path)
        self._shards: dict[str, Shard] = {}
        self._lock = threading.Lock()
        self._shapes: dict[str, dict[str, tuple[int, ...]]] = {}

    @property
    def step(self) -> int:
        """Optimizer steps behind this checkpoint."""
        return self.manifest.step

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups that hold tensors, in the order of `layout.GROUPS`."""
        found = {layout.split_name(full)[0] for full in self.manifest.tensors}
        return tuple(group for group in layout.GROUPS if group in found)

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of open files."""
        with self._lock:
            for shard in self._shards.values():
                shard.close()
            self._shards.clear()

    def check(self) -> None:
        """Raise DamagedCheckpoint where a file is missing, has another size, or a small file is altered."""
        problems = quick_problems(self.path, self.manifest)
        if problems:
            raise self._damaged(problems[0].file, problems[0].what)

    def names(self, group: str = layout.WEIGHTS) -> list[str]:
        """Names of the stored tensors of one group, sorted; expert tensors appear module by module."""
        prefix = f"{group}/"
        return sorted(full[len(prefix) :] for full in self.manifest.tensors if full.startswith(prefix))

    def has(self, name: str, group: str = layout.WEIGHTS) -> bool:
        """Whether a tensor of this stored name is there."""
        return f"{group}/{name}" in self.manifest.tensors

    def shape(self, name: str, group: str = layout.WEIGHTS) -> tuple[int, ...]:
        """Shape of a stored tensor."""
        return tuple(self._entry(name, group).shape)

    def dtype(self, name: str, group: str = layout.WEIGHTS) -> torch.dtype:
        """Torch dtype of a stored tensor."""
        return layout.DTYPE_OF_NAME[self._entry(name, group).dtype]

    def logical_shapes(self, group: str = layout.WEIGHTS) -> dict[str, tuple[int, ...]]:
        """State_dict key -> shape in the whole model ([E, in, out] for expert tensors), sorted by key."""
        if group not in self._shapes:
            self._shapes[group] = logical_shapes(self.manifest.tensors, group)
        return self._shapes[group]

    def num_bytes(self, groups: Sequence[str]) -> int:
        """Of all tensors of these groups."""
        stored = self.manifest.tensors.items()
        entries = [entry for full, entry in stored if layout.split_name(full)[0] in groups]
        return sum(prod(entry.shape) * layout.DTYPE_OF_NAME[entry.dtype].itemsize for entry in entries)

    def tensor(self, name: str, group: str = layout.WEIGHTS) -> Tensor:
        """A stored tensor on the CPU, in memory of its own. Raises DamagedCheckpoint where its bytes were altered."""
        entry = self._entry(name, group)
        out = torch.empty(entry.shape, dtype=layout.DTYPE_OF_NAME[entry.dtype])
        self._read_into(name, group, out)
        return out

    def stacked(self, key: str, experts: Sequence[int] | None = None, group: str = layout.WEIGHTS) -> Tensor:
        """Modules of an expert tensor as [L, in, out]: all of them, or those with the global indices `experts`.

        Raises UserError for a key that has no modules or an index outside them.
        """
        shape = self.logical_shapes(group).get(key)
        if shape is None or not self.has(layout.expert_name(key, 0)):
            raise UserError(f"{self.path} has no expert tensor {group}/{key}")
        chosen = range(shape[0]) if experts is None else experts
        outside = [index for index in chosen if not 0 <= index < shape[0]]
        if outside:
            raise UserError(f"{self.path}: {group}/{key} has the modules 0..{shape[0] - 1}, not {outside[:8]}")
        first = layout.expert_name(key, chosen[0] if len(chosen) else 0)
        out = torch.empty((len(chosen), *shape[1:]), dtype=self.dtype(first, group))
        for place, index in enumerate(chosen):
            self._read_into(layout.expert_name(key, index), group, out[place])
        return out

    def full(self, key: str, group: str = layout.WEIGHTS) -> Tensor:
        """The tensor of a state_dict key as the whole model has it, expert tensors stacked to [E, in, out]."""
        return self.tensor(key, group) if self.has(key, group) else self.stacked(key, None, group)

    def _entry(self, name: str, group: str) -> TensorEntry:
        entry = self.manifest.tensors.get(f"{group}/{name}")
        if entry is None:
            hint = " (an expert tensor: see `stacked`)" if self.has(layout.expert_name(name, 0), group) else ""
            raise UserError(f"{self.path} stores no tensor {group}/{name}{hint}")
        return entry

    def _read_into(self, name: str, group: str, out: Tensor) -> None:
        """Fill `out` (contiguous, CPU, of the stored dtype and shape) and check the bytes that were read."""
        entry = self._entry(name, group)
        try:
            crc = self._shard(entry.file).read_into(layout.full_name(name, group), out)
        except ShardError as error:
            raise self._damaged(entry.file, str(error)) from error
        except OSError as error:
            raise self._damaged(entry.file, f"cannot be read: {error.strerror}") from error
        if crc != entry.crc32:
            raise self._damaged(entry.file, f"the content of {group}/{name} does not have its checksum")

    def _shard(self, file: str) -> Shard:
        with self._lock:
            if file not in self._shards:
                shard = Shard(self.path / file)
                attempt = shard.metadata.get("attempt")
                if attempt != self.manifest.attempt:
                    shard.close()
                    raise ShardError(f"was written by {attempt!r}, the manifest is of {self.manifest.attempt!r}")
                self._shards[file] = shard
            return self._shards[file]

    def _damaged(self, file: str, what: str) -> DamagedCheckpoint:
        """The error for a damaged file, with the newest earlier checkpoint that looks whole."""
        step = layout.step_of(self.path.absolute().name)
        earlier = newest_good(self.path.absolute().parent, before=step, full=False) if step is not None else None
        if earlier is None:
            return DamagedCheckpoint(self.path, file, what, "There is no earlier checkpoint beside it")
        return DamagedCheckpoint(
            self.path, file, what, f"The one before is {earlier}: checkpoint.resume={earlier} goes on from there"
        )


def check_model(checkpoint: Checkpoint, expected_shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise UserError, with counts and the first differences, unless the weights have these keys and logical shapes."""
    stored = checkpoint.logical_shapes()
    expected = {key: tuple(shape) for key, shape in expected_shapes.items()}
    differing = sorted(key for key in stored.keys() & expected.keys() if stored[key] != expected[key])
    missing, extra = sorted(expected.keys() - stored.keys()), sorted(stored.keys() - expected.keys())
    if not (differing or missing or extra):
        return
    lines = [
        f"{key}: {list(stored[key])} in the checkpoint, {list(expected[key])} in the model" for key in differing[:4]
    ]
    lines += [f"{key}: only in the model, {list(expected[key])}" for key in missing[:2]]
    lines += [f"{key}: only in the checkpoint, {list(stored[key])}" for key in extra[:2]]
    raise UserError(
        f"{checkpoint.path} is a checkpoint of another model: of {len(stored)} tensors there and {len(expected)} in "
        f"the model, {len(differing)} differ in shape, {len(missing)} are missing and {len(extra)} are unknown. First: "
        + "; ".join(lines)
    )

"""Weights by name, from a megamf checkpoint or from a folder in the public layout, one tensor at a time."""

import json
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from pydantic import ValidationError

from megamf.adapt.fold import FoldingReader, adapters_of
from megamf.checkpoint import MASTER, WEIGHTS, Checkpoint, check_model, expert_name
from megamf.config import ModelConfig
from megamf.errors import UserError
from megamf.model import ModuleFormer

MODEL_TYPES = ("moduleformer", "gpt_neox")


class Weights(Protocol):
    """A model's architecture and its tensors; a context manager that lets go of the files."""

    path: Path
    model: ModelConfig
    tokenizer: dict[str, Any] | None
    """`name` and `sha256` (a list) of what is known to be the model's tokenizer."""

    def dtype(self, name: str) -> torch.dtype:
        """Stored dtype of one tensor."""

    def read(self, name: str) -> torch.Tensor:
        """One tensor, whole ([E, in, out] for expert tensors), on the CPU, in memory of its own."""

    def check(self, expected: dict[str, tuple[int, ...]]) -> None:
        """Raise UserError, naming tensors, unless exactly these are there in these shapes."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


def open_weights(path: Path | str, dtype: torch.dtype | None = None) -> Weights:
    """Open a megamf checkpoint (step, checkpoints or run directory) or a public-layout folder.

    `dtype` is what the weights are wanted in: of a checkpoint in low precision that also holds fp32 masters, these
    are read where `dtype` can hold more than the weights. Raises UserError where there is neither.
    """
    path = Path(path)
    if not is_public_folder(path):
        return CheckpointWeights(path, dtype)
    try:
        from megamf.hf.folder import FolderWeights
    except ModuleNotFoundError as error:
        raise UserError(f"{path} is a Hugging Face folder: {error}") from None
    return FolderWeights(path)


def is_public_folder(path: Path) -> bool:
    """True for a folder with a `config.json` of a ModuleFormer or a GPT-NeoX."""
    try:
        tree = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(tree, dict) and tree.get("model_type") in MODEL_TYPES


def trained_length(path: Path | str) -> int:
    """Tokens of the sequences a model was trained on: of its run where that is known, else segment and history."""
    with open_weights(path) as weights:
        if isinstance(weights, CheckpointWeights):
            seq_len = weights.checkpoint.state.get("config", {}).get("train", {}).get("seq_len")
            if isinstance(seq_len, int) and seq_len > 0:
                return seq_len
        return weights.model.block_size + weights.model.history_length


def expected_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every parameter of a ModuleFormer or a dense baseline."""
    with torch.device("meta"):
        return {name: tuple(value.shape) for name, value in ModuleFormer(model).state_dict().items()}


class CheckpointWeights:
    """The weights of a megamf checkpoint; those that have adapters are read with their adapters folded in."""

    def __init__(self, path: Path, dtype: torch.dtype | None = None) -> None:
        self.checkpoint = Checkpoint(path)
        self.path = self.checkpoint.path
        self.model = _model_of(self.checkpoint.model, self.path)
        self.tokenizer = self.checkpoint.state.get("tokenizer")
        self._wanted = dtype
        self._adapters = adapters_of(self.checkpoint)
        # Of a tensor that was trained in part, the weights are all there is of the whole.
        whole = self.checkpoint.logical_shapes(MASTER).items()
        self._masters = {key for key, shape in whole if self._has_master(key, shape[0])}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.checkpoint.close()

    def _has_master(self, key: str, count: int) -> bool:
        modules = (self.checkpoint.has(expert_name(key, index), MASTER) for index in range(count))
        return self.checkpoint.has(key, MASTER) or all(modules)

    def dtype(self, name: str) -> torch.dtype:
        group = self._group(name)
        stored = name if self.checkpoint.has(name, group) else expert_name(name, 0)
        dtype = self.checkpoint.dtype(stored, group)
        if self._adapters and self._adapters.on(name) and self._wanted and self._wanted.itemsize > dtype.itemsize:
            return torch.promote_types(dtype, torch.float32)
        return dtype

    def read(self, name: str) -> torch.Tensor:
        found = FoldingReader(self.checkpoint, self._adapters).read(name) if self._adapters else None
        return self.checkpoint.full(name, self._group(name)) if found is None else found.to(self.dtype(name))

    def check(self, expected: dict[str, tuple[int, ...]]) -> None:
        check_model(self.checkpoint, expected | (self._adapters.shapes if self._adapters else {}))

    def _group(self, name: str) -> str:
        if self._wanted is None or name not in self._masters:
            return WEIGHTS
        stored = name if self.checkpoint.has(name) else expert_name(name, 0)
        return MASTER if self._wanted.itemsize > self.checkpoint.dtype(stored).itemsize else WEIGHTS


def _model_of(tree: dict[str, Any], path: Path) -> ModelConfig:
    try:
        return ModelConfig.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{path}: model.json is no model configuration: {error.errors()[0]['msg']}") from None

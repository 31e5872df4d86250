"""The weights and the configuration of a Hugging Face folder: the public ModuleFormer layout, or GPT-NeoX."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol, Self

import torch

from megamf.config import ModelConfig
from megamf.errors import UserError
from megamf.hf import gpt_neox
from megamf.hf.configuration import to_model_config
from megamf.hf.layout import BUFFER, public_shapes
from megamf.hf.pickled import PickledTensors
from megamf.hf.portable.configuration_moduleformer import ModuleFormerConfig
from megamf.hf.streaming import SafeTensors


class Source(Protocol):
    """Tensors by the names they have in the files."""

    def names(self) -> Iterable[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(self, name: str) -> torch.Tensor:
        """On the CPU, in memory of its own."""


class FolderWeights:
    """The weights of a folder under megamf's names. The constant buffers of released files are passed over.

    `pickled`: read `pytorch_model.bin` (or its shards) instead of safetensors, by torch's restricted unpickler.
    """

    def __init__(self, path: Path, *, pickled: bool = False) -> None:
        self.path = Path(path)
        tree = read_tree(self.path)
        neox = tree["model_type"] == gpt_neox.MODEL_TYPE
        try:
            # What says more than the architecture: the auxiliary loss of its training.
            self.config = None if neox else ModuleFormerConfig(**tree)
            self.model: ModelConfig = gpt_neox.to_model_config(tree) if neox else to_model_config(self.config)
        except (ValueError, TypeError) as error:
            raise UserError(f"{self.path}: {error}") from None
        self.tokenizer = tokenizer_record(self.path)
        self.source: Source = PickledTensors(self.path) if pickled else SafeTensors(self.path)
        buffer = gpt_neox.BUFFER if neox else BUFFER
        stored = [name for name in self.source.names() if not buffer.fullmatch(name)]
        own = {gpt_neox.public_name(name) if neox else name: name for name in parameter_shapes(self.model)}
        if neox and gpt_neox.public_name(gpt_neox.OTHER_HEAD) not in stored:
            own[gpt_neox.OTHER_HEAD] = gpt_neox.OTHER_HEAD
        self.names = {own[name]: name for name in stored if name in own}
        self.unknown = sorted(name for name in stored if name not in own)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Files are open only while a tensor is read."""

    def dtype(self, name: str) -> torch.dtype:
        return self.read(name).dtype

    def read(self, name: str) -> torch.Tensor:
        return self.source.read(self.names[name])

    def check(self, expected: dict[str, tuple[int, ...]]) -> None:
        missing, extra = sorted(expected.keys() - self.names.keys()), self.unknown
        if missing or extra:
            neox = self.model.kind == "gpt_neox"
            lost = [gpt_neox.public_name(name) if neox else name for name in missing]
            first = f"missing: {lost[0]}" if lost else f"of no use: {extra[0]}"
            raise UserError(
                f"{self.path}: its weights do not belong to its config.json: {len(missing)} tensors are missing and "
                f"{len(extra)} are unknown, first {first}"
            )
        for name, shape in expected.items():
            if (stored := self.source.shape(self.names[name])) != shape:
                raise UserError(
                    f"{self.path}: {self.names[name]} has shape {list(stored)}, its config.json describes {list(shape)}"
                )


def parameter_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """megamf's name -> shape of every parameter, in the order of the files. Raises UserError for kind=dense."""
    if model.kind == "gpt_neox":
        return gpt_neox.shapes(model)
    if not model.sparse:
        raise UserError(f"a model of kind={model.kind} has no public layout; moduleformer and gpt_neox have one")
    return public_shapes(model)


def tokenizer_record(folder: Path) -> dict[str, Any] | None:
    """`name` and `sha256` (of each file that says the same) of the tokenizer in a folder; None where there is none."""
    files = [folder / "tokenizer.json", *sorted(folder.glob("*.model"))]
    found = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.is_file()]
    return {"name": folder.resolve().name, "sha256": found} if found else None


def read_tree(folder: Path) -> dict[str, Any]:
    """The `config.json` of a folder as plain values. Raises UserError where it is none of a known model."""
    file = Path(folder) / "config.json"
    try:
        tree: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read as a configuration: {error}") from None
    known = (ModuleFormerConfig.model_type, gpt_neox.MODEL_TYPE)
    if not isinstance(tree, dict) or tree.get("model_type") not in known:
        found = tree.get("model_type") if isinstance(tree, dict) else type(tree).__name__
        raise UserError(f"{file} has model_type {found!r}, expected {' or '.join(map(repr, known))}")
    return tree

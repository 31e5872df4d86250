"""The weights and the configuration of a folder in the public layout."""

import json
from pathlib import Path
from typing import Any, Self

import torch

from megamf.errors import UserError
from megamf.hf.configuration import to_model_config
from megamf.hf.layout import BUFFER
from megamf.hf.portable.configuration_moduleformer import ModuleFormerConfig
from megamf.hf.streaming import read_tensor, tensor_files, tensor_shape


class FolderWeights:
    """The weights of a folder in the public layout. The constant masks of released files are passed over."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.config = read_config(self.path)
        self.model = to_model_config(self.config)
        self.files = {name: file for name, file in tensor_files(self.path).items() if not BUFFER.fullmatch(name)}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Files are open only while a tensor is read."""

    def dtype(self, name: str) -> torch.dtype:
        return read_tensor(self.files[name], name).dtype

    def read(self, name: str) -> torch.Tensor:
        return read_tensor(self.files[name], name)

    def check(self, expected: dict[str, tuple[int, ...]]) -> None:
        missing, extra = sorted(expected.keys() - self.files.keys()), sorted(self.files.keys() - expected.keys())
        if missing or extra:
            first = f"missing: {missing[0]}" if missing else f"of no use: {extra[0]}"
            raise UserError(
                f"{self.path}: its weights do not belong to its config.json: {len(missing)} tensors are missing and "
                f"{len(extra)} are unknown, first {first}"
            )
        for name, shape in expected.items():
            if (stored := tensor_shape(self.files[name], name)) != shape:
                raise UserError(
                    f"{self.path}: {name} has shape {list(stored)}, its config.json describes {list(shape)}"
                )


def read_config(folder: Path) -> ModuleFormerConfig:
    """The `config.json` of a public-layout folder. Raises UserError where it is none or contradicts itself."""
    file = Path(folder) / "config.json"
    try:
        tree: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read as a configuration: {error}") from None
    if not isinstance(tree, dict) or tree.get("model_type") != ModuleFormerConfig.model_type:
        found = tree.get("model_type") if isinstance(tree, dict) else type(tree).__name__
        raise UserError(f"{file} has model_type {found!r}, expected {ModuleFormerConfig.model_type!r}")
    try:
        return ModuleFormerConfig(**tree)
    except (ValueError, TypeError) as error:
        raise UserError(f"{file}: {error}") from None

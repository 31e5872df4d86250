"""Pickled weights (`pytorch_model.bin`, whole or in shards): read only where asked for by name, and tensors only.

torch's restricted unpickler builds tensors and plain containers and refuses everything else before it runs.
"""

import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from megamf.checkpoint.layout import DTYPES
from megamf.errors import UserError
from megamf.hf.streaming import INDEX, SINGLE, from_index

PICKLED = "pytorch_model.bin"
PICKLED_INDEX = "pytorch_model.bin.index.json"


class PickledTensors:
    """The tensors of a folder of pickled weights by name. Files in torch's zip format stay on the disk, mapped.

    Raises UserError for a folder without such files or with safetensors as well, an index that disagrees with its
    files, and a file that holds anything but tensors.
    """

    def __init__(self, folder: Path) -> None:
        folder = Path(folder)
        other = [name for name in (SINGLE, INDEX) if (folder / name).is_file()]
        if other:
            raise UserError(f"{folder} holds {other[0]}: pickled weights are not needed, leave --pickled-weights out")
        self._tensors: dict[str, torch.Tensor] = {}
        if (folder / PICKLED_INDEX).is_file():
            from_index(folder / PICKLED_INDEX, ".bin", self._take)
        elif (folder / PICKLED).is_file():
            self._take(folder / PICKLED)
        else:
            raise UserError(f"{folder} holds no {PICKLED} and no {PICKLED_INDEX}")

    def _take(self, file: Path) -> Iterable[str]:
        """Add the tensors of one file and return their names."""
        found = load_tensors(file)
        self._tensors |= found
        return found

    def names(self) -> Iterable[str]:
        return self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def read(self, name: str) -> torch.Tensor:
        return self._tensors[name].clone(memory_format=torch.contiguous_format)


def load_tensors(file: Path) -> dict[str, torch.Tensor]:
    """Name -> tensor of one pickled file; UserError where it holds anything else, which is not run."""
    try:
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # a damaged or hostile pickle may raise anything
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(f"{file} is refused, it is no plain file of tensors: {reason}") from None
    if not isinstance(found, Mapping):
        raise UserError(f"{file} holds {type(found).__name__}, expected tensors by name")
    for name, value in found.items():
        good = isinstance(name, str) and isinstance(value, torch.Tensor)
        if not good or value.layout != torch.strided or value.dtype not in DTYPES or value.is_meta:
            kind = f"{value.dtype} {value.layout}" if isinstance(value, torch.Tensor) else type(value).__name__
            raise UserError(f"{file}: {name!r} is {kind}, expected a tensor of {', '.join(map(str, DTYPES))}")
    return {name: value.detach() for name, value in found.items()}

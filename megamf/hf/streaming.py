"""Safetensors files written and read one tensor at a time, so that the largest tensor bounds the memory."""

import json
import struct
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from megamf.checkpoint.layout import is_plain_file_name
from megamf.errors import UserError
from megamf.hf.layout import Entry, header

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CHUNK = 64 << 20


def write_file(path: Path, entries: Sequence[Entry], get: Callable[[Entry], torch.Tensor]) -> None:
    """Write one safetensors file; `get` is asked for each tensor (CPU, of the entry's shape and dtype) in turn."""
    ordered, table = header(entries)
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for entry in ordered:
            tensor = get(entry)
            assert tuple(tensor.shape) == entry.shape and tensor.dtype == entry.dtype, entry.name
            content = memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
            for start in range(0, len(content), CHUNK):
                file.write(content[start : start + CHUNK])


def tensor_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> safetensors file of a folder: `model.safetensors`, or shards with their index.

    Raises UserError for a folder without safetensors (pickled weights are read by `megamf.hf.pickled` alone), a damaged
    or incomplete index, an index that disagrees with its files, and more weights than one of the two names.
    """
    folder = Path(folder)
    single, index = folder / SINGLE, folder / INDEX
    if single.is_file() and index.is_file():
        raise UserError(f"{folder} holds both {SINGLE} and {INDEX}: remove the one that is not meant")
    if index.is_file():
        found = from_index(index, ".safetensors", _names)
    elif single.is_file():
        found = dict.fromkeys(_names(single), single)
    else:
        raise UserError(_nothing_in(folder))
    unused = sorted({path.name for path in folder.glob("model*.safetensors")} - {path.name for path in found.values()})
    if unused and found:
        raise UserError(f"{folder} holds {unused[0]}, which neither is {SINGLE} nor is named by {INDEX}: remove it")
    return found


def _nothing_in(folder: Path) -> str:
    pickles = sorted(path.name for path in folder.glob("*.bin"))
    if pickles:
        return (
            f"{folder} holds pickled weights only ({', '.join(pickles[:3])}). A pickle can run code when it is opened, "
            "so they are left alone unless asked for by name: megamf import-hf --pickled-weights reads tensors of "
            "them, and refuses whatever else they hold"
        )
    return f"{folder} holds no {SINGLE} and no {INDEX}"


def from_index(index: Path, suffix: str, names_in: Callable[[Path], Iterable[str]]) -> dict[str, Path]:
    """Tensor name -> shard, where the index and what `names_in` finds in each shard agree; UserError where not."""
    try:
        listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = {str(name): str(file) for name, file in listed.items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{index} is not the index of {suffix} shards: {error!r}") from None
    found: dict[str, Path] = {}
    for file in sorted(set(files.values())):
        path = index.parent / file
        if not is_plain_file_name(file) or not file.endswith(suffix):
            raise UserError(f"{index} names the file {file!r}, which is no {suffix} file of this folder")
        if not path.is_file():
            raise UserError(f"{index} names {file}, which is missing")
        names = set(names_in(path))
        said = {name for name, of in files.items() if of == file}
        if names != said:
            raise UserError(f"{index} and {file} disagree, first about {min(names ^ said)}")
        found |= dict.fromkeys(names, path)
    return found


def _names(path: Path) -> list[str]:
    try:
        with safe_open(path, "pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a whole safetensors file: {error}") from None


def read_tensor(path: Path, name: str) -> torch.Tensor:
    """One tensor on the CPU, in memory of its own."""
    with safe_open(path, "pt") as file:
        return file.get_tensor(name)


def tensor_shape(path: Path, name: str) -> tuple[int, ...]:
    """The shape of one tensor, from the header alone."""
    with safe_open(path, "pt") as file:
        return tuple(file.get_slice(name).get_shape())


class SafeTensors:
    """The tensors of a folder of safetensors by name; a file is open only while one of them is read."""

    def __init__(self, folder: Path) -> None:
        self.files = tensor_files(folder)

    def names(self) -> Iterable[str]:
        return self.files

    def shape(self, name: str) -> tuple[int, ...]:
        return tensor_shape(self.files[name], name)

    def read(self, name: str) -> torch.Tensor:
        return read_tensor(self.files[name], name)

"""Safetensors files written and read one tensor at a time, so that the largest tensor bounds the memory."""

import json
import struct
from collections.abc import Callable, Sequence
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
    """Tensor name -> file of a public-layout folder: `model.safetensors`, or shards with their index.

    Raises UserError for a folder without safetensors (pickled weights are never read), a damaged or incomplete
    index, and an index that disagrees with its files.
    """
    folder = Path(folder)
    index = folder / INDEX
    if index.is_file():
        return _from_index(index)
    if (folder / SINGLE).is_file():
        return dict.fromkeys(_names(folder / SINGLE), folder / SINGLE)
    pickles = sorted(path.name for path in folder.glob("*.bin"))
    if pickles:
        raise UserError(
            f"{folder} holds pickled weights only ({', '.join(pickles[:3])}), which can run code when opened and are "
            "never read here. Convert them where you trust them: load with torch.load(FILE, weights_only=True) and "
            "write with safetensors.torch.save_file(TENSORS, 'model.safetensors', {'format': 'pt'})"
        )
    raise UserError(f"{folder} holds no {SINGLE} and no {INDEX}")


def _from_index(index: Path) -> dict[str, Path]:
    try:
        listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = {str(name): str(file) for name, file in listed.items()}
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{index} is not the index of safetensors shards: {error!r}") from None
    found: dict[str, Path] = {}
    for file in sorted(set(files.values())):
        path = index.parent / file
        if not is_plain_file_name(file) or not file.endswith(".safetensors"):
            raise UserError(f"{index} names the file {file!r}, which is no .safetensors file of this folder")
        if not path.is_file():
            raise UserError(f"{index} names {file}, which is missing")
        names = set(_names(path))
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

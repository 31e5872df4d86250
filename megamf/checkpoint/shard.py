"""One safetensors file: written straight from tensor memory and read straight into it, checksums taken on the way.

Layout of the file (https://huggingface.co/docs/safetensors): 8 bytes little-endian header length, a JSON header
padded with blanks, then the tensors without holes. Tensors are ordered by falling element size, which keeps each
of them aligned. Reading goes by `pread` rather than by the library's memory map: a disk that fails raises an error
with the file's name, where a map ends the process with SIGBUS; and what is read is no view of a shared mapping.
"""

import hashlib
import json
import os
import struct
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from megamf.checkpoint import layout
from megamf.checkpoint.schema import FileEntry, TensorEntry
from megamf.heartbeat import beat
from megamf.points import reach

CHUNK = 8 << 20


def num_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor's elements."""
    return tensor.numel() * tensor.element_size()


def write_shard(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> tuple[FileEntry, dict[str, TensorEntry]]:
    """Write and fsync one file; returns its size and sha256, and the entry of every tensor.

    Tensors may lie on any device and have any strides; one at a time is copied where it is not contiguous CPU
    memory. Raises ValueError for a dtype the format does not know, OSError where writing fails.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in layout.DTYPES or tensor.layout != torch.strided:
            raise ValueError(
                f"{name} is {tensor.dtype} {tensor.layout}; known: strided {', '.join(layout.DTYPE_OF_NAME)}"
            )
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header = _header(ordered, metadata)
    digest = hashlib.sha256(header)
    entries: dict[str, TensorEntry] = {}
    size = len(header)
    # Hashing releases the interpreter lock: it runs beside the write of the same bytes.
    with open(path, "wb") as file, ThreadPoolExecutor(1) as hasher:
        file.write(header)
        for name, tensor in ordered:
            reach("save.shard")
            flat = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
            content = memoryview(flat.numpy())
            crc = 0
            for start in range(0, len(content), CHUNK):
                chunk = content[start : start + CHUNK]
                hashed = hasher.submit(digest.update, chunk)
                file.write(chunk)
                beat("save.shard")
                crc = zlib.crc32(chunk, crc)
                hashed.result()
            size += len(content)
            entries[name] = TensorEntry(
                file=path.name, dtype=layout.DTYPES[tensor.dtype][0], shape=list(tensor.shape), crc32=crc
            )
        file.flush()
        os.fsync(file.fileno())
    return FileEntry(size=size, sha256=digest.hexdigest()), entries


def _header(ordered: list[tuple[str, Tensor]], metadata: Mapping[str, str]) -> bytes:
    """Length prefix and JSON header for tensors that follow in this order."""
    table: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, tensor in ordered:
        end = offset + num_bytes(tensor)
        table[name] = {
            "dtype": layout.DTYPES[tensor.dtype][1],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


class ShardError(ValueError):
    """A tensor file that does not hold what it should. The message does not name the file."""


class Shard:
    """A tensor file opened for reading. `metadata` is the header's free text. Safe to use from several threads."""

    def __init__(self, path: Path) -> None:
        """Open the file and read its header. Raises OSError, ShardError for a header that is none."""
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 (closed by `close`)
        try:
            size = os.fstat(self._file.fileno()).st_size
            (length,) = struct.unpack("<Q", self._exactly(8, 0))
            if length > size - 8:
                raise ShardError(f"its header would have {length:,} bytes, the file has {size:,}")
            try:
                self._table = json.loads(self._exactly(length, 8))
                self.metadata: dict[str, str] = dict(self._table.pop("__metadata__", {}))
            except (ValueError, TypeError, AttributeError) as error:
                raise ShardError(f"its header is no table: {error}") from error
            self._start = 8 + length
        except BaseException:
            self._file.close()
            raise

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def read_into(self, name: str, out: Tensor) -> int:
        """Fill the contiguous CPU tensor `out` with a stored tensor and return the crc32 of its bytes.

        Raises ShardError where the file has no such tensor of this dtype and shape, or ends early; OSError.
        """
        said = self._table.get(name)
        reach("load")
        dtype, shape = layout.DTYPES[out.dtype][1], list(out.shape)
        if not isinstance(said, dict) or (said.get("dtype"), said.get("shape")) != (dtype, shape):
            raise ShardError(f"{name} is {said} in it, {dtype} {shape} in the manifest")
        start, end = said.get("data_offsets", (0, -1))
        if start < 0 or end - start != num_bytes(out):
            raise ShardError(f"{name} is {end - start} bytes long, not {num_bytes(out)}")
        content = memoryview(out.reshape(-1).view(torch.uint8).numpy())
        place, crc = 0, 0
        while place < len(content):
            chunk = content[place : place + CHUNK]
            count = os.preadv(self._file.fileno(), [chunk], self._start + start + place)
            if count == 0:
                raise ShardError(f"it ends within {name}")
            crc = zlib.crc32(chunk[:count], crc)
            place += count
        return crc

    def _exactly(self, count: int, offset: int) -> bytes:
        content = os.pread(self._file.fileno(), count, offset)
        if len(content) != count:
            raise ShardError("it ends within its header")
        return content

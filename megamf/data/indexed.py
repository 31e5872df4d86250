"""Tokenised documents on disk in Megatron's format: PREFIX.bin holds the tokens, PREFIX.idx says where each lies.

`.idx`, little endian: the magic, version (uint64, 1), token type code (uint8), number of sequences (uint64),
length of the document table (uint64), then sequence lengths (int32), byte offsets (int64) and the document
table (int64): document d is made of the sequences table[d] to table[d+1]. Files written here have one sequence
a document. PREFIX.json, which other writers lack, carries the metadata of `Metadata`.
"""

import contextlib
import json
import os
import struct
import tempfile
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

import numpy as np

from megamf.data.files import fsync_folder
from megamf.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES: dict[int, np.dtype[Any]] = {
    1: np.dtype(np.uint8),
    2: np.dtype(np.int8),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    8: np.dtype("<u2"),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
SUFFIXES = (".bin", ".idx", ".json")


@dataclass(frozen=True)
class Metadata:
    """What is known of an indexed dataset beside its tokens. `bytes` counts the UTF-8 bytes of the raw text."""

    tokenizer: str
    tokenizer_sha256: str
    vocab_size: int
    eod_id: int
    appended_eod: bool
    documents: int
    tokens: int
    bytes: int


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """uint16 for vocabularies below 65500, else int32, as Megatron chooses."""
    return DTYPES[8] if vocab_size < 65500 else DTYPES[4]


def part_path(prefix: str | Path, suffix: str) -> Path:
    """PREFIX + `.bin`, `.idx` or `.json` (a prefix may itself contain dots)."""
    return Path(f"{prefix}{suffix}")


def read_metadata(prefix: str | Path) -> Metadata | None:
    """The metadata beside an indexed dataset, None where there is none; UserError where it is damaged."""
    path = part_path(prefix, ".json")
    if not path.is_file():
        return None
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        return Metadata(**{field.name: field.type(tree[field.name]) for field in fields(Metadata)})  # type: ignore[operator]
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is not the metadata of an indexed dataset: {error!r}") from None


class IndexedDataset:
    """Read access to PREFIX.bin and PREFIX.idx, checked when opened.

    `lengths` (int32), `document_table` (int64) are as in the file; `document_ends` (int64 [num_documents + 1])
    are token positions in the .bin: document d is the tokens `document_ends[d]` to `document_ends[d+1]`.
    `mmap=False` reads with plain file reads, for file systems that refuse memory maps.
    Raises UserError for files that are missing, truncated, of another format, or not of one pair.
    """

    def __init__(self, prefix: str | Path, mmap: bool = True) -> None:
        self.prefix = Path(prefix)
        self._bin_path, index_path = part_path(prefix, ".bin"), part_path(prefix, ".idx")
        for path in (self._bin_path, index_path):
            if not path.is_file():
                raise UserError(f"no file {path}; an indexed dataset is a pair of .bin and .idx: run `megamf prepare`")
        self.dtype, self.lengths, pointers, self.document_table = _read_index(index_path, mmap)
        ends = np.zeros(len(self.lengths) + 1, dtype=np.int64)
        np.cumsum(self.lengths, dtype=np.int64, out=ends[1:])
        self.num_tokens = int(ends[-1])
        _check_pair(self._bin_path, index_path, self.dtype, ends, pointers, self.document_table)
        self._sequence_ends = ends
        one_each = np.array_equal(self.document_table, np.arange(len(ends)))
        self.document_ends = ends if one_each else ends[self.document_table]
        self._tokens: np.ndarray | None = None
        self._file: int | None = None
        if mmap and self.num_tokens:
            self._tokens = _map(self._bin_path, self.dtype)
        else:
            self._file = os.open(self._bin_path, os.O_RDONLY)

    @property
    def num_documents(self) -> int:
        """How many documents the pair holds."""
        return len(self.document_ends) - 1

    def __len__(self) -> int:
        """How many sequences the pair holds; equal to the documents in files written here."""
        return len(self.lengths)

    def __getitem__(self, index: int) -> np.ndarray:
        """Tokens of one sequence, in the dtype of the file."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        index %= len(self)
        return self.tokens(int(self._sequence_ends[index]), int(self._sequence_ends[index + 1]))

    def document(self, index: int) -> np.ndarray:
        """Tokens of one document, in the dtype of the file."""
        if not 0 <= index < self.num_documents:
            raise IndexError(f"document {index} of {self.num_documents}")
        return self.tokens(int(self.document_ends[index]), int(self.document_ends[index + 1]))

    def tokens(self, begin: int, end: int) -> np.ndarray:
        """Tokens `begin` to `end` (exclusive, positions in the .bin), in the dtype of the file."""
        if self._tokens is not None:
            return self._tokens[begin:end]
        size = self.dtype.itemsize
        assert self._file is not None
        content = b""
        while len(content) < (end - begin) * size:
            block = os.pread(self._file, (end - begin) * size - len(content), begin * size + len(content))
            if not block:
                raise UserError(f"{self._bin_path} ended while tokens {begin} to {end} were read: was it replaced?")
            content += block
        return np.frombuffer(content, dtype=self.dtype)

    def close(self) -> None:
        """Release the files."""
        self._tokens = None
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_file", None) is not None:
            self.close()


def _read_index(path: Path, mmap: bool) -> tuple[np.dtype[Any], np.ndarray, np.ndarray, np.ndarray]:
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(HEADER.size)
    if head[: len(MAGIC)] != MAGIC:
        raise UserError(f"{path} is not a Megatron index: it begins with {head[:9]!r}, expected {MAGIC!r}")
    if len(head) < HEADER.size:
        raise UserError(f"{path} is truncated: {size} bytes, the header alone takes {HEADER.size}")
    _, version, code, num_sequences, table_length = HEADER.unpack(head)
    if version != 1:
        raise UserError(f"{path} has index version {version}; version 1 is supported")
    if code not in DTYPES:
        raise UserError(f"{path} has token type code {code}; supported codes: {sorted(DTYPES)}")
    expected = HEADER.size + num_sequences * 12 + table_length * 8
    modes = num_sequences
    if size not in (expected, expected + modes):
        raise UserError(
            f"{path} has {size} bytes, but its header announces {num_sequences} sequences and a document table of "
            f"{table_length}, which take {expected} bytes: the file is {'truncated' if size < expected else 'damaged'}"
        )
    content = _map(path, np.dtype(np.uint8)) if mmap else np.fromfile(path, dtype=np.uint8)
    cuts = np.cumsum([HEADER.size, num_sequences * 4, num_sequences * 8, table_length * 8])
    lengths = content[cuts[0] : cuts[1]].view("<i4")
    pointers = content[cuts[1] : cuts[2]].view("<i8")
    table = content[cuts[2] : cuts[3]].view("<i8")
    return DTYPES[code], lengths, pointers, table


def _map(path: Path, dtype: np.dtype[Any]) -> np.ndarray:
    try:
        return np.memmap(path, dtype=dtype, mode="r").view(np.ndarray)
    except OSError as error:
        raise UserError(f"{path} cannot be mapped into memory ({error}): set data.mmap=false") from None


def _check_pair(
    bin_path: Path,
    index_path: Path,
    dtype: np.dtype[Any],
    ends: np.ndarray,
    pointers: np.ndarray,
    table: np.ndarray,
) -> None:
    size, expected = bin_path.stat().st_size, int(ends[-1]) * dtype.itemsize
    if size != expected:
        state = "is truncated or not of this index" if size < expected else "is longer than its index says"
        raise UserError(
            f"{bin_path} {state}: {size} bytes, but {index_path} describes {int(ends[-1])} tokens of "
            f"{dtype.itemsize} bytes = {expected} bytes"
        )
    if len(ends) > 1 and (np.diff(ends).min() < 0 or not np.array_equal(pointers, ends[:-1] * dtype.itemsize)):
        raise UserError(f"{index_path} is damaged: its byte offsets do not follow from its sequence lengths")
    if not len(table) or table[0] != 0 or table[-1] != len(ends) - 1 or (np.diff(table) < 0).any():
        raise UserError(
            f"{index_path} is damaged: its document table does not run from 0 to its {len(ends) - 1} sequences"
        )


class IndexedWriter:
    """Writes PREFIX.bin, .idx and, with metadata, .json under temporary names; `commit` makes them visible.

    As a context manager it discards everything unless `commit` was called. Raises UserError at once when an
    output exists and `overwrite` is false.
    """

    def __init__(self, prefix: str | Path, vocab_size: int, *, overwrite: bool = False) -> None:
        self.prefix = Path(prefix)
        self.vocab_size = vocab_size
        self.dtype = token_dtype(vocab_size)
        if not overwrite:
            refuse_existing([self.prefix])
        folder = self.prefix.parent
        self._made = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        self._temporary = Path(tempfile.mkdtemp(prefix=f".{self.prefix.name}.", suffix=".tmp", dir=folder))
        self._bin = (self._temporary / "bin").open("wb")
        self._lengths = array("i")
        self._committed = False
        self.num_tokens = 0

    @property
    def num_documents(self) -> int:
        """Documents added so far."""
        return len(self._lengths)

    def add_document(self, ids: Sequence[int] | np.ndarray) -> None:
        """Append one document; ValueError for a token id outside the vocabulary."""
        self.add_documents(np.asarray(ids, dtype=np.int64), [len(ids)])

    def add_documents(self, ids: np.ndarray, lengths: Sequence[int]) -> None:
        """Append documents given as their joined ids and the length of each."""
        if len(ids):
            low, high = int(ids.min()), int(ids.max())
            if low < 0 or high >= self.vocab_size:
                raise ValueError(
                    f"token id {low if low < 0 else high} in documents {self.num_documents} to "
                    f"{self.num_documents + len(lengths) - 1} is outside the vocabulary of {self.vocab_size}"
                )
        self._lengths.extend(lengths)
        self._bin.write(np.ascontiguousarray(ids, dtype=self.dtype).data)
        self.num_tokens += len(ids)

    def commit(self, metadata: Metadata | None = None) -> None:
        """`finish` and `publish`."""
        self.finish(metadata)
        self.publish()

    def finish(self, metadata: Metadata | None = None) -> None:
        """Everything to disk under temporary names; UserError when there is no document."""
        if not self._lengths:
            raise UserError(f"there is no document to write to {self.prefix}")
        _flush(self._bin)
        with (self._temporary / "idx").open("wb") as file:
            lengths = np.frombuffer(self._lengths, dtype=np.intc)
            pointers = np.zeros(len(lengths), dtype="<i8")
            np.cumsum(lengths[:-1], dtype=np.int64, out=pointers[1:])
            pointers *= self.dtype.itemsize
            table = np.arange(len(lengths) + 1, dtype="<i8")
            file.write(HEADER.pack(MAGIC, 1, CODES[self.dtype], len(lengths), len(table)))
            for column in (lengths.astype("<i4"), pointers, table):
                file.write(column.data)
            _flush(file)
        if metadata is not None:
            with (self._temporary / "json").open("wb") as file:
                file.write(json.dumps(asdict(metadata), indent=2).encode() + b"\n")
                _flush(file)

    def publish(self) -> None:
        """Give the finished files their names, the tokens first."""
        # An old index must not stand beside new tokens, whenever a crash comes.
        for suffix in (".json", ".idx"):
            part_path(self.prefix, suffix).unlink(missing_ok=True)
        for suffix in SUFFIXES:
            if (finished := self._temporary / suffix[1:]).exists():
                os.replace(finished, part_path(self.prefix, suffix))
        self._temporary.rmdir()
        fsync_folder(self.prefix.parent)
        self._committed = True

    def discard(self) -> None:
        """Remove everything that was not committed, folders that were made for it included."""
        with contextlib.suppress(OSError):  # a full disk must not keep the rest from being cleared away
            self._bin.close()
        if self._committed or not self._temporary.exists():
            return
        for path in self._temporary.iterdir():
            path.unlink()
        self._temporary.rmdir()
        with contextlib.suppress(OSError):  # a folder that others have used meanwhile stays
            for folder in self._made:
                folder.rmdir()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.discard()


def refuse_existing(prefixes: Sequence[str | Path]) -> None:
    """UserError when any file of these indexed datasets exists."""
    existing = [str(path) for prefix in prefixes for suffix in SUFFIXES if (path := part_path(prefix, suffix)).exists()]
    if existing:
        raise UserError(f"{', '.join(existing)} exist already; name another output or give --overwrite")


def _flush(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()

"""Documents out of text files, JSON Lines, Parquet, folders of source code, and the standard library of Python.

Every document keeps the line ends and spaces of its file. A document is bad when it is empty (nothing but white
space), not UTF-8, or malformed (a line that is no JSON object with the text field); bad documents are yielded too,
so that the caller can count them or stop.
"""

import json
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megamf.data.stdlib import help_documents, library_files
from megamf.data.tokenizer import require
from megamf.errors import UserError

Kind = Literal["text", "jsonl", "jsonl.gz", "jsonl.zst", "parquet", "help"]
Reason = Literal["empty", "not UTF-8", "malformed"]

CONTAINERS: tuple[Kind, ...] = ("jsonl", "jsonl.gz", "jsonl.zst", "parquet")
_TEXT = """
    txt md rst tex py pyi pyx c h cc cpp cxx hpp hh cu cuh rs go java kt scala js jsx ts tsx sh bash zsh pl pm rb php
    lua r jl hs ml mli ex exs erl clj lisp el scm swift m mm cs fs vb sql html css scss xml yaml yml toml ini cfg cmake
    mk f f90 f95 asm s v vhd vhdl proto
"""
TEXT_EXTENSIONS = frozenset(_TEXT.split())
SKIPPED_FOLDERS = frozenset({"__pycache__", "site-packages", "dist-packages", "node_modules"})
STDLIB = "stdlib"
STDLIB_WITH_TESTS = "stdlib-with-tests"
BLOCK = 2**20


@dataclass(frozen=True)
class Options:
    """How inputs are read.

    `text_field`: the JSON key or Parquet column with the text. `blank_lines`: a .txt file is split into documents
    at blank lines. `extensions`: what is taken from folders, for instance ("py", "jsonl.gz"); None takes
    TEXT_EXTENSIONS and CONTAINERS.
    """

    text_field: str = "text"
    blank_lines: bool = False
    extensions: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Part:
    """One file to read (or the help texts, which have no file), and its size in bytes for the progress bar."""

    kind: Kind
    path: Path
    size: int


@dataclass(frozen=True)
class Document:
    """A good document. `num_bytes` counts its UTF-8; `read` the bytes of the input file used up since the last."""

    text: str
    num_bytes: int
    read: int


@dataclass(frozen=True)
class BadDocument:
    """A document that cannot be used, where it stands and why."""

    reason: Reason
    origin: str
    read: int


def find_parts(inputs: Sequence[str | Path], options: Options) -> list[Part]:
    """The files behind the inputs, in the order given; folders recursively, sorted by path.

    `stdlib` and `stdlib-with-tests` (as plain words) stand for the standard library of the running Python: help
    texts and .py files. In folders, hidden names and SKIPPED_FOLDERS are left out, and links to folders are not
    followed. Raises UserError for an input that is missing, of an unknown kind, or a folder without a match.
    """
    parts: list[Part] = []
    for given in inputs:
        if str(given) in (STDLIB, STDLIB_WITH_TESTS):
            parts += _stdlib_parts(with_tests=str(given) == STDLIB_WITH_TESTS)
            continue
        path = Path(given)
        if path.is_dir():
            found = [part for part in (_part(file, options, True) for file in _walk(path)) if part is not None]
            if not found:
                wanted = ", ".join(options.extensions) if options.extensions else "the known text and data kinds"
                raise UserError(f"folder {path} holds no file with an extension of {wanted}")
            parts += found
            continue
        if not path.is_file():
            raise UserError(f"no input at {path}: expected a file, a folder, {STDLIB} or {STDLIB_WITH_TESTS}")
        part = _part(path, options, False)
        if part is None:
            raise UserError(
                f"{path} is of an unknown kind; known: text and source code (.txt, .md, .py, ...), "
                f"{', '.join('.' + kind for kind in CONTAINERS)}; "
                "name its extension with --extensions to read it as text"
            )
        parts.append(part)
    return parts


def read_documents(parts: Sequence[Part], options: Options) -> Iterator[Document | BadDocument]:
    """Documents of all parts in order. Raises UserError for damaged files and a missing text column."""
    readers: dict[Kind, Callable[[Part, Options], Iterator[Document | BadDocument]]] = {
        "text": _read_text,
        "help": _read_help,
        "parquet": _read_parquet,
        "jsonl": _read_json_lines,
        "jsonl.gz": _read_json_lines,
        "jsonl.zst": _read_json_lines,
    }
    for part in parts:
        yield from readers[part.kind](part, options)


def _walk(folder: Path) -> list[Path]:
    found = []
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in SKIPPED_FOLDERS]
        found += [Path(root, name) for name in files if not name.startswith(".")]
    return sorted((path for path in found if path.is_file()), key=lambda path: path.relative_to(folder).parts)


def _part(path: Path, options: Options, in_folder: bool) -> Part | None:
    name = path.name.lower()
    extensions = options.extensions or ()
    asked = any(name.endswith("." + extension.lower().lstrip(".")) for extension in extensions)
    if in_folder and extensions and not asked:
        return None
    kind: Kind | None = next((kind for kind in CONTAINERS if name.endswith("." + kind)), None)
    if kind is None and (asked or name.rpartition(".")[2] in TEXT_EXTENSIONS):
        kind = "text"
    return None if kind is None else Part(kind, path, path.stat().st_size)


def _stdlib_parts(with_tests: bool) -> list[Part]:
    # Help texts come first, so that the last share of the documents is source code like the rest.
    size = sum(len(text.encode()) for _, text in help_documents())
    files = [Part("text", path, path.stat().st_size) for path in library_files(with_tests)]
    return [Part("help", Path("help"), size), *files]


def _judge(text: str, origin: str, read: int) -> Document | BadDocument:
    if not text or text.isspace():
        return BadDocument("empty", origin, read)
    try:
        num_bytes = len(text.encode())
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair
        return BadDocument("not UTF-8", origin, read)
    return Document(text, num_bytes, read)


def _read_text(part: Part, options: Options) -> Iterator[Document | BadDocument]:
    content = part.path.read_bytes()
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        yield BadDocument("not UTF-8", f"{part.path} at byte {error.start}", part.size)
        return
    if not (options.blank_lines and part.path.suffix.lower() == ".txt"):
        yield _judge(text, str(part.path), part.size)
        return
    paragraphs = [p for p in re.split(r"\r?\n(?:[ \t]*\r?\n)+", text) if p and not p.isspace()]
    for number, paragraph in enumerate(paragraphs):
        last = number == len(paragraphs) - 1
        yield _judge(paragraph, f"{part.path} paragraph {number + 1}", part.size if last else 0)
    if not paragraphs:
        yield BadDocument("empty", str(part.path), part.size)


def _read_help(part: Part, options: Options) -> Iterator[Document | BadDocument]:
    for name, text in help_documents():
        yield _judge(text, f"help on {name}", len(text.encode()))


def _read_json_lines(part: Part, options: Options) -> Iterator[Document | BadDocument]:
    skipped = 0
    for number, (line, size) in enumerate(_lines(part), start=1):
        if not line.strip():
            skipped += size
            continue
        read, skipped = size + skipped, 0
        origin = f"{part.path} line {number}"
        try:
            tree = json.loads(line.decode())
        except UnicodeDecodeError:
            yield BadDocument("not UTF-8", origin, read)
        except (ValueError, RecursionError):
            yield BadDocument("malformed", f"{origin} (no valid JSON)", read)
        else:
            text = tree.get(options.text_field) if isinstance(tree, dict) else None
            if isinstance(text, str):
                yield _judge(text, origin, read)
            else:
                yield BadDocument("malformed", f"{origin} (no text in field {options.text_field!r})", read)


def _lines(part: Part) -> Iterator[tuple[bytes, int]]:
    """Lines without their ends; beside each, the bytes of the (compressed) file that were read to get to it."""
    rest: list[bytes] = []
    read = 0
    for block, size in _blocks(part):
        read += size
        lines = block.split(b"\n")
        if len(lines) > 1:
            yield b"".join([*rest, lines[0]]), read
            read, rest = 0, []
            for line in lines[1:-1]:
                yield line, 0
        rest.append(lines[-1])
    yield b"".join(rest), read


def _blocks(part: Part) -> Iterator[tuple[bytes, int]]:
    if part.kind == "jsonl":
        with part.path.open("rb") as file:
            while block := file.read(BLOCK):
                yield block, len(block)
        return
    if part.kind == "jsonl.gz":
        yield from _decompressed(part.path, lambda: zlib.decompressobj(wbits=31), zlib.error)
    else:
        library = require("zstandard")
        yield from _decompressed(part.path, lambda: library.ZstdDecompressor().decompressobj(), library.ZstdError)


def _decompressed(path: Path, new: Callable[[], Any], failure: type[Exception]) -> Iterator[tuple[bytes, int]]:
    """Blocks of a file of one or more compressed streams. Unlike the library readers it notices a missing end."""
    stream = new()
    with path.open("rb") as file:
        while raw := file.read(BLOCK):
            size = len(raw)
            while raw:
                if stream.eof:
                    raw = raw.lstrip(b"\0")  # padding between streams
                    if not raw:
                        break
                    stream = new()
                try:
                    block = stream.decompress(raw)
                except failure as error:
                    raise UserError(f"{path} is damaged: {error}") from None
                raw = stream.unused_data if stream.eof else b""
                yield block, size
                size = 0
    if not stream.eof:
        raise UserError(f"{path} is truncated: its last compressed stream has no end")


def _read_parquet(part: Part, options: Options) -> Iterator[Document | BadDocument]:
    require("pyarrow")
    parquet = require("pyarrow.parquet")
    types = require("pyarrow").types
    try:
        file = parquet.ParquetFile(part.path)
    except (OSError, ValueError) as error:
        raise UserError(f"{part.path} is not a readable Parquet file: {error}") from None
    with file:
        schema = file.schema_arrow
        if options.text_field not in schema.names:
            raise UserError(
                f"{part.path} has no column {options.text_field!r}; columns: {', '.join(schema.names)}; "
                "choose one with --text-field"
            )
        column_type = schema.field(options.text_field).type
        if not (types.is_string(column_type) or types.is_large_string(column_type)):
            raise UserError(f"column {options.text_field!r} of {part.path} holds {column_type}, expected strings")
        total, row, used = file.metadata.num_rows, 0, 0
        try:
            for batch in file.iter_batches(batch_size=1024, columns=[options.text_field]):
                for value in batch.column(0):
                    row += 1
                    read = part.size * row // total - used
                    used += read
                    yield _judge_cell(value, f"{part.path} row {row}", read)
        except (OSError, ValueError) as error:
            raise UserError(f"{part.path} is damaged after row {row}: {error}") from None


def _judge_cell(value: Any, origin: str, read: int) -> Document | BadDocument:
    try:
        text = value.as_py()
    except UnicodeDecodeError:
        return BadDocument("not UTF-8", origin, read)
    return _judge(text or "", origin, read)

"""Tokenising in independent tasks: each writes a shard, and the merged shards are what one process would have written.

Task i of N takes a run of whole input files, so documents keep their order. A shard is a folder
OUTPUT.shards/IIIII-of-NNNNN with `tokens` (raw, in the dtype of the .bin), `lengths` and `sizes` (int64, one a
document: tokens, UTF-8 bytes) and `shard.json`. It appears when it is complete.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from megamf.data.files import fsync_folder
from megamf.data.indexed import token_dtype
from megamf.data.prepare import (
    BadDocuments,
    Block,
    OnBad,
    Prepared,
    encoded_blocks,
    output_prefixes,
    tokenizer_facts,
    write_datasets,
)
from megamf.data.sources import Options, Part
from megamf.data.tokenizer import load_tokenizer
from megamf.errors import UserError

BLOCK_TOKENS = 2**22
COLUMN = np.dtype("<i8")


def shard_path(output: str | Path, index: int, count: int) -> Path:
    """Where shard `index` (from 0) of `count` lies."""
    return Path(f"{output}.shards") / f"{index:05d}-of-{count:05d}"


def parts_of_shard(parts: list[Part], index: int, count: int) -> list[Part]:
    """The consecutive parts of shard `index` (from 0) of `count`; a part belongs where its first byte falls."""
    if count < 1 or not 0 <= index < count:
        raise UserError(f"there is no shard {index} of {count}: shards count from 0 to their number less one")
    total = max(1, sum(part.size for part in parts))
    chosen, before = [], 0
    for part in parts:
        if min(count - 1, before * count // total) == index:
            chosen.append(part)
        before += part.size
    return chosen


def prepare_shard(
    parts: list[Part],
    tokenizer_path: str | Path,
    output: str | Path,
    index: int,
    count: int,
    *,
    options: Options | None = None,
    eod_token: str | None = None,
    workers: int | None = None,
    append_eod: bool = True,
    on_bad: OnBad = "skip",
    overwrite: bool = False,
    on_progress: Callable[[int], None] = lambda read: None,
) -> str:
    """Tokenise this shard's share of `parts` (all of them are given to every task) and say what came out.

    A shard that is there already and was made of the same inputs in the same way is left as it is, so a task may be
    started again; one that was made otherwise is an error unless `overwrite`. Raises UserError.
    """
    options = options or Options()
    mine = parts_of_shard(parts, index, count)
    tokenizer = load_tokenizer(tokenizer_path, eod_token)
    facts = tokenizer_facts(tokenizer, append_eod)
    described = {"facts": facts, "inputs": _digest(parts, options, on_bad), "num_shards": count}
    path = shard_path(output, index, count)
    if path.exists() and not overwrite:
        if {key: _read(path)[key] for key in described} == described:
            return f"{path} is there already, made of the same inputs"
        raise UserError(f"{path} was made of other inputs or in another way: remove it, or give --overwrite")
    bad = BadDocuments()
    blocks = encoded_blocks(
        mine, tokenizer, tokenizer_path, bad,
        options=options, eod_token=eod_token, workers=workers, append_eod=append_eod, on_bad=on_bad,
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{path.name}.*.tmp"):  # of a task that was killed
        shutil.rmtree(left, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        documents, tokens = _write(temporary, blocks, token_dtype(tokenizer.vocab_size), on_progress)
        described |= {"documents": documents, "tokens": tokens, "bad": {"counts": bad.counts, "first": bad.first}}
        _flush(temporary / "shard.json", (json.dumps(described, indent=2) + "\n").encode())
        fsync_folder(temporary)
        if path.exists():
            shutil.rmtree(path)
        os.replace(temporary, path)
        fsync_folder(path.parent)
    except OSError as error:
        raise UserError(f"writing {path} stopped, it was not made: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # gone already where all went well
        with contextlib.suppress(OSError):  # other shards stay
            path.parent.rmdir()
    return f"{path}: {documents} documents, {tokens} tokens\n{bad}"


def merge_shards(
    output: str | Path,
    count: int,
    *,
    valid_fraction: float = 0.0,
    overwrite: bool = False,
    on_progress: Callable[[int], None] = lambda tokens: None,
) -> Prepared:
    """Write what `prepare` would have written for all inputs, from `count` shards, which are removed afterwards.

    `on_progress` is told tokens. Raises UserError, and writes nothing, where a shard is missing, damaged, or was made
    of other inputs or in another way than the first.
    """
    prefixes = output_prefixes(output, valid_fraction, overwrite)
    paths = [shard_path(output, index, count) for index in range(count)]
    missing = [path.name for path in paths if not path.is_dir()]
    if missing or not paths:
        folder = Path(f"{output}.shards")
        raise UserError(f"{folder} lacks {', '.join(missing) or 'shards'}: prepare every shard before they are merged")
    described = [_read(path) for path in paths]
    for path, found in zip(paths, described):
        for key in ("facts", "inputs", "num_shards"):
            if found[key] != described[0][key]:
                raise UserError(
                    f"{path} and {paths[0]} differ in their {key} ({found[key]} and {described[0][key]}): "
                    "prepare all shards from the same inputs, with the same options"
                )
    dtype = token_dtype(described[0]["facts"]["vocab_size"])
    for path, found in zip(paths, described):
        _check_sizes(path, found, dtype)
    bad = BadDocuments()
    for found in described:
        bad.counts.update(found["bad"]["counts"])
        bad.first = found["bad"]["first"] | bad.first
    blocks = (block for path in paths for block in _blocks(path, dtype))
    facts = described[0]["facts"]
    prepared = write_datasets(blocks, output, prefixes, facts, bad, valid_fraction, overwrite, on_progress)
    for path in paths:
        shutil.rmtree(path)
    with contextlib.suppress(OSError):  # shards of another number stay
        paths[0].parent.rmdir()
    return prepared


def _digest(parts: list[Part], options: Options, on_bad: OnBad) -> str:
    listed = [[part.kind, str(part.path), part.size] for part in parts]
    tree = {"parts": listed, "options": asdict(options), "on_bad": on_bad}
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def _write(
    folder: Path, blocks: Iterator[Block], dtype: np.dtype[Any], on_progress: Callable[[int], None]
) -> tuple[int, int]:
    documents = tokens = 0
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context((folder / name).open("wb")) for name in ("tokens", "lengths", "sizes")]
        for block in blocks:
            columns = (block.ids.astype(dtype), np.array(block.lengths, dtype=COLUMN), block.sizes.astype(COLUMN))
            for file, column in zip(files, columns):
                file.write(column.tobytes())
            documents += len(block.lengths)
            tokens += len(block.ids)
            on_progress(block.read)
        for file in files:
            file.flush()
            os.fsync(file.fileno())
    return documents, tokens


def _flush(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads((path / "shard.json").read_text(encoding="utf-8"))
        counts = (found["documents"], found["tokens"], found["facts"]["vocab_size"], found["num_shards"])
        if not all(type(count) is int for count in counts):
            raise ValueError(f"documents, tokens, vocab_size and num_shards are {counts}")
        return {"bad": {"counts": {}, "first": {}}, **found, "inputs": str(found["inputs"])}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is no complete shard ({error!r}): remove it and prepare it again") from None


def _check_sizes(path: Path, found: dict[str, Any], dtype: np.dtype[Any]) -> None:
    documents = found["documents"] * COLUMN.itemsize
    expected = {"tokens": found["tokens"] * dtype.itemsize, "lengths": documents, "sizes": documents}
    for name, size in expected.items():
        actual = (path / name).stat().st_size if (path / name).is_file() else 0
        if actual != size:
            raise UserError(f"{path / name} has {actual} bytes, expected {size}: remove {path} and prepare it again")
    total = int(np.fromfile(path / "lengths", dtype=COLUMN).sum())
    if total != found["tokens"]:
        raise UserError(f"{path / 'lengths'} adds up to {total} tokens, expected {found['tokens']}: prepare it again")


def _blocks(path: Path, dtype: np.dtype[Any]) -> Iterator[Block]:
    """The documents of a shard in runs of about BLOCK_TOKENS."""
    lengths = np.fromfile(path / "lengths", dtype=COLUMN)
    sizes = np.fromfile(path / "sizes", dtype=COLUMN)
    ends = np.cumsum(lengths)
    with (path / "tokens").open("rb") as file:
        begin = done = 0
        while begin < len(lengths):
            end = max(begin + 1, int(np.searchsorted(ends, done + BLOCK_TOKENS, side="right")))
            count = int(ends[end - 1]) - done
            ids = np.fromfile(file, dtype=dtype, count=count)
            yield Block(ids, lengths[begin:end].tolist(), sizes[begin:end], count)
            begin, done = end, done + count

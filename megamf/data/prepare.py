"""Tokenise documents on all cores into indexed datasets, in the order of the input."""

import multiprocessing
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import chain
from math import floor
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megamf.data.indexed import IndexedWriter, Metadata, refuse_existing, token_dtype
from megamf.data.sources import BadDocument, Document, Options, Part, read_documents
from megamf.data.tokenizer import Tokenizer, load_tokenizer
from megamf.errors import UserError

OnBad = Literal["skip", "fail"]
CHUNK_BYTES = 2**18
BYTES_PER_WORKER = 2**22  # starting a worker takes as long as tokenising about this much


@dataclass
class BadDocuments:
    """How many documents were bad for each reason, and the first of each."""

    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, bad: BadDocument, on_bad: OnBad) -> None:
        """Count it, or raise UserError when `on_bad` is "fail"."""
        if on_bad == "fail":
            raise UserError(f"a bad document ({bad.reason}): {bad.origin}; --on-bad skip passes over such documents")
        self.counts[bad.reason] += 1
        self.first.setdefault(bad.reason, bad.origin)

    def __str__(self) -> str:
        total = sum(self.counts.values())
        if not total:
            return "0 bad documents"
        listed = "; ".join(f"{count} {why}, first: {self.first[why]}" for why, count in self.counts.items())
        return f"{total} bad document{'s' if total > 1 else ''} skipped ({listed})"


@dataclass(frozen=True)
class Prepared:
    """What was written: metadata by prefix, and what was passed over."""

    datasets: dict[Path, Metadata]
    bad: BadDocuments

    def __str__(self) -> str:
        lines = [
            f"{prefix}: {m.documents} documents, {m.tokens} tokens, {m.bytes} bytes, "
            f"{m.bytes / m.tokens:.3f} bytes per token"
            for prefix, m in self.datasets.items()
        ]
        return "\n".join([*lines, str(self.bad)])


@dataclass
class _Chunk:
    documents: list[Document] = field(default_factory=list)
    num_bytes: int = 0
    read: int = 0


@dataclass(frozen=True)
class Block:
    """Documents in order: joined ids, the length of each in tokens and in UTF-8 bytes; `read` as in _Chunk."""

    ids: np.ndarray
    lengths: list[int]
    sizes: np.ndarray
    read: int


@dataclass
class _Output:
    writer: IndexedWriter
    num_bytes: int = 0


def prepare(
    parts: list[Part],
    tokenizer_path: str | Path,
    output: str | Path,
    *,
    options: Options | None = None,
    eod_token: str | None = None,
    workers: int | None = None,
    append_eod: bool = True,
    valid_fraction: float = 0.0,
    on_bad: OnBad = "skip",
    overwrite: bool = False,
    on_progress: Callable[[int], None] = lambda read: None,
) -> Prepared:
    """Write OUTPUT.bin, .idx and .json, or OUTPUT-train and OUTPUT-valid when `valid_fraction` > 0.

    Document n (counting good ones) is for validation where n * valid_fraction passes a whole number: evenly spread,
    the exact share, the same every time. The output does not depend on `workers`. `on_progress` is told the input
    bytes that were dealt with. Files appear when all is done; on any error nothing is left behind. Raises UserError.
    """
    prefixes = output_prefixes(output, valid_fraction, overwrite)
    tokenizer = load_tokenizer(tokenizer_path, eod_token)
    bad = BadDocuments()
    blocks = encoded_blocks(
        parts, tokenizer, tokenizer_path, bad,
        options=options, eod_token=eod_token, workers=workers, append_eod=append_eod, on_bad=on_bad,
    )  # fmt: skip
    facts = tokenizer_facts(tokenizer, append_eod)
    return write_datasets(blocks, output, prefixes, facts, bad, valid_fraction, overwrite, on_progress)


def output_prefixes(output: str | Path, valid_fraction: float, overwrite: bool) -> list[Path]:
    """OUTPUT, or OUTPUT-train and OUTPUT-valid. UserError for a wrong fraction and for files that exist."""
    if not 0 <= valid_fraction < 1:
        raise UserError(f"valid fraction {valid_fraction} must be at least 0 and below 1")
    prefixes = [Path(f"{output}-train"), Path(f"{output}-valid")] if valid_fraction else [Path(output)]
    if not overwrite:
        refuse_existing(prefixes)
    return prefixes


def tokenizer_facts(tokenizer: Tokenizer, append_eod: bool) -> dict[str, Any]:
    """The fields of Metadata that do not depend on the documents."""
    return {
        "tokenizer": tokenizer.name,
        "tokenizer_sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        "eod_id": tokenizer.eod_id,
        "appended_eod": append_eod,
    }


def encoded_blocks(
    parts: list[Part],
    tokenizer: Tokenizer,
    tokenizer_path: str | Path,
    bad: BadDocuments,
    *,
    options: Options | None,
    eod_token: str | None,
    workers: int | None,
    append_eod: bool,
    on_bad: OnBad,
) -> Iterator[Block]:
    """The good documents of `parts`, tokenised, in order; the bad ones are counted in `bad`."""
    if workers is not None and workers < 1:
        raise UserError(f"--workers {workers} must be at least 1")
    count = workers or default_workers(sum(part.size for part in parts))
    chunks = _chunks(read_documents(parts, options or Options()), bad, on_bad)
    return _encode_all(chunks, tokenizer, tokenizer_path, eod_token, append_eod, count)


def write_datasets(
    blocks: Iterator[Block],
    output: str | Path,
    prefixes: list[Path],
    facts: dict[str, Any],
    bad: BadDocuments,
    valid_fraction: float,
    overwrite: bool,
    on_progress: Callable[[int], None] = lambda read: None,
) -> Prepared:
    """Spread the documents over the prefixes and publish them together, or leave nothing behind."""
    share = Fraction(repr(float(valid_fraction)))
    seen = 0
    with ExitStack() as stack:
        try:
            outputs = [
                _Output(stack.enter_context(IndexedWriter(prefix, facts["vocab_size"], overwrite=overwrite)))
                for prefix in prefixes
            ]
            for block in blocks:
                count = len(block.lengths)
                held = [floor((seen + n + 1) * share) > floor((seen + n) * share) for n in range(count)]
                seen += count
                _write(outputs, block, np.array(held, dtype=bool))
                on_progress(block.read)
            _check_outputs(outputs, seen, bad, valid_fraction)
            described = {prefix: _describe(out, facts) for prefix, out in zip(prefixes, outputs)}
            for prefix, out in zip(prefixes, outputs):
                out.writer.finish(described[prefix])
            for out in outputs:
                out.writer.publish()
        except OSError as error:
            raise UserError(f"preparing {output} stopped, nothing was written: {error}") from error
    return Prepared(described, bad)


def default_workers(num_bytes: int) -> int:
    """One worker for each core this process may use, fewer where there is little to read."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, num_bytes // BYTES_PER_WORKER))


def good_texts(
    documents: Iterable[Document | BadDocument],
    bad: BadDocuments,
    on_bad: OnBad,
    on_progress: Callable[[int], None] = lambda read: None,
) -> Iterator[str]:
    """Texts of the good documents; the bad ones are counted."""
    for document in documents:
        on_progress(document.read)
        if isinstance(document, BadDocument):
            bad.add(document, on_bad)
        else:
            yield document.text


def _chunks(documents: Iterable[Document | BadDocument], bad: BadDocuments, on_bad: OnBad) -> Iterator[_Chunk]:
    chunk = _Chunk()
    for document in documents:
        chunk.read += document.read
        if isinstance(document, BadDocument):
            bad.add(document, on_bad)
            continue
        chunk.documents.append(document)
        chunk.num_bytes += document.num_bytes
        if chunk.num_bytes >= CHUNK_BYTES:
            yield chunk
            chunk = _Chunk()
    if chunk.documents or chunk.read:
        yield chunk


def _encode_all(
    chunks: Iterator[_Chunk],
    tokenizer: Tokenizer,
    tokenizer_path: str | Path,
    eod_token: str | None,
    append_eod: bool,
    workers: int,
) -> Iterator[Block]:
    """Chunks with their joined ids and document lengths, in order, at most four chunks a worker ahead."""
    if workers == 1:
        for chunk in chunks:
            yield _block(chunk, *encode(tokenizer, [document.text for document in chunk.documents], append_eod))
        return
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(str(tokenizer_path), eod_token, append_eod),
    )
    try:
        waiting: deque = deque()
        for chunk in chunks:
            waiting.append((chunk, pool.submit(_work, [document.text for document in chunk.documents])))
            if len(waiting) >= 4 * workers:
                done, future = waiting.popleft()
                yield _block(done, *future.result())
        while waiting:
            done, future = waiting.popleft()
            yield _block(done, *future.result())
    except BrokenProcessPool:
        raise UserError(
            f"a tokenising process was ended from outside (out of memory?); try fewer than {workers} --workers"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _block(chunk: _Chunk, ids: np.ndarray, lengths: list[int]) -> Block:
    sizes = np.array([document.num_bytes for document in chunk.documents], dtype=np.int64)
    return Block(ids, lengths, sizes, chunk.read)


def encode(tokenizer: Tokenizer, texts: list[str], append_eod: bool) -> tuple[np.ndarray, list[int]]:
    """Joined ids of the texts, in the dtype of the file, and the length of each in tokens."""
    documents = [tokenizer.encode(text) for text in texts]
    if append_eod:
        for ids in documents:
            ids.append(tokenizer.eod_id)
    joined = np.fromiter(
        chain.from_iterable(documents),
        dtype=token_dtype(tokenizer.vocab_size),
        count=sum(map(len, documents)),
    )
    return joined, [len(ids) for ids in documents]


_worker: tuple[Tokenizer, bool] | None = None


def _start_worker(tokenizer_path: str, eod_token: str | None, append_eod: bool) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    _worker = (load_tokenizer(tokenizer_path, eod_token), append_eod)


def _leave_with_parent() -> None:
    """Workers of a killed parent would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(texts: list[str]) -> tuple[np.ndarray, list[int]]:
    assert _worker is not None
    tokenizer, append_eod = _worker
    return encode(tokenizer, texts, append_eod)


def _write(outputs: list[_Output], block: Block, held: np.ndarray) -> None:
    if not block.lengths:
        return
    held_tokens = np.repeat(held, block.lengths)
    for out, chosen, tokens in ((outputs[0], ~held, ~held_tokens), (outputs[-1], held, held_tokens)):
        if chosen.any():
            out.writer.add_documents(block.ids[tokens], np.array(block.lengths)[chosen].tolist())
            out.num_bytes += int(block.sizes[chosen].sum())


def _check_outputs(outputs: list[_Output], seen: int, bad: BadDocuments, valid_fraction: float) -> None:
    if not seen:
        raise UserError(f"the inputs hold no good document: {bad}")
    if any(out.writer.num_documents == 0 for out in outputs):
        raise UserError(
            f"a valid fraction of {valid_fraction} of {seen} documents leaves one side empty: give more documents, or "
            "split a .txt file with --blank-lines"
        )


def _describe(out: _Output, facts: dict[str, Any]) -> Metadata:
    writer = out.writer
    return Metadata(**facts, documents=writer.num_documents, tokens=writer.num_tokens, bytes=out.num_bytes)

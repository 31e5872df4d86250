"""Writing a checkpoint: every rank its own files, in parallel; one rank makes the whole visible at once.

The ranks meet only in the file system: rank 0 waits for the marks of the others. A directory named `step-XXXXXXXX`
is therefore always complete; everything unfinished is called `.tmp-*` or `.old-*` and is removed by `sweep`.
"""

import hashlib
import json
import os
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import Tensor

import megamf
from megamf.checkpoint import layout
from megamf.checkpoint.files import (
    check_space,
    fsync_directory,
    remove_tree,
    replace_file,
    write_durably,
    write_refused,
)
from megamf.checkpoint.schema import (
    FileEntry,
    Manifest,
    Module,
    RankMarker,
    TensorEntry,
    check_module_counts,
    check_modules,
    check_tensors,
    require_plain,
)
from megamf.checkpoint.shard import num_bytes, write_shard
from megamf.errors import UserError
from megamf.points import reach

MAX_FILE_BYTES = 2 << 30


def begin(root: Path, step: int, nonce: str) -> Path:
    """Create, if need be, the directory that all ranks of one attempt write into, and return it.

    `nonce` is the same on all ranks and new for every attempt. Raises UserError where it cannot be created.
    """
    tmp = Path(root) / layout.temporary_name(step, nonce)
    try:
        reach("save.begin")
        tmp.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_refused(error, tmp, None) from error
    return tmp


def write_rank(
    tmp: Path,
    rank: int,
    tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    *,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Write this rank's tensors, named `GROUP/NAME`, into `tmp`, and lastly the mark that they are on disk.

    An iterable is consumed as files fill up, so that never more than `max_file_bytes` of what it yields are held
    (a yielded tensor must not be overwritten later). On any failure the whole temporary directory is removed.
    Raises UserError where the file system refuses (with bytes needed and free), ValueError for bad names or dtypes.
    """
    tmp = Path(tmp)
    total = sum(map(num_bytes, tensors.values())) if isinstance(tensors, Mapping) else None
    items = tensors.items() if isinstance(tensors, Mapping) else tensors
    written = 0
    try:
        if total is not None:
            check_space(tmp, total)
        for stale in tmp.glob(f"rank-{rank:05d}*"):
            stale.unlink()
        files: dict[str, FileEntry] = {}
        table: dict[str, TensorEntry] = {}
        metadata = {"format": "pt", "attempt": tmp.name, "rank": str(rank)}
        for number, batch in enumerate(_batches(items, max_file_bytes)):
            repeated = table.keys() & batch.keys()
            if repeated:
                raise ValueError(f"rank {rank} was given the tensor {min(repeated)} twice")
            written += sum(map(num_bytes, batch.values()))
            name = layout.shard_name(rank, number)
            files[name], entries = write_shard(tmp / name, batch, metadata)
            table |= entries
            batch.clear()  # its tensors must be gone while the next file's are made
        marker = RankMarker(attempt=tmp.name, rank=rank, files=files, tensors=table)
        replace_file(tmp / layout.marker_name(rank), marker.model_dump_json().encode())
    except FileNotFoundError as error:
        raise _gone(tmp) from error
    except OSError as error:
        abort(tmp)
        raise write_refused(error, tmp, total if total is not None else written) from error
    except BaseException:
        abort(tmp)
        raise


def _batches(items: Iterable[tuple[str, Tensor]], max_file_bytes: int) -> Iterator[dict[str, Tensor]]:
    """Groups of tensors that stay within `max_file_bytes`; a larger tensor gets a file of its own."""
    batch: dict[str, Tensor] = {}
    held = 0
    for name, tensor in items:
        layout.split_name(name)
        if name in batch:
            raise ValueError(f"the tensor {name} was given twice")
        if batch and held + num_bytes(tensor) > max_file_bytes:
            yield batch
            batch, held = {}, 0
        batch[name] = tensor
        held += num_bytes(tensor)
    if batch:
        yield batch


def finish(
    tmp: Path,
    root: Path,
    step: int,
    num_ranks: int,
    state: Mapping[str, Any],
    modules: Sequence[Module | Mapping[str, Any]],
    model: Mapping[str, Any],
    *,
    run_id: str,
    expected: set[str] | None = None,
    timeout_s: float = 1800.0,
    poll: float = 0.1,
) -> Path:
    """Wait for all ranks, check that their tensors make one whole, and make the step visible. Run by rank 0 only.

    `expected` holds the full names (`GROUP/NAME`) that must be there, no more and no less. An existing step of this
    number is replaced; `latest` moves last. On failure the temporary directory is removed and nothing else changes.
    Raises TimeoutError naming the ranks without a mark, ValueError for tensors that are missing, doubled or do not
    fit together or for state that is not plain JSON, UserError where the file system refuses. Returns the directory.
    """
    tmp, root = Path(tmp), Path(root)
    if tmp.parent != root or not tmp.name.startswith(layout.TEMPORARY + layout.step_name(step) + "-"):
        raise ValueError(f"{tmp} is not a temporary directory for step {step} below {root}")
    needed = None
    try:
        table = _modules(modules)
        documents = {
            layout.STATE: _encode(state, "state"),
            layout.MODEL: _encode(model, "model"),
            layout.MODULES: _encode([module.model_dump() for module in table], "modules"),
        }
        files, tensors = _merge(_wait(tmp, num_ranks, timeout_s, poll))
        _check_whole(tmp, num_ranks, files, tensors, table, expected)
        for name, content in documents.items():
            files[name] = FileEntry(size=len(content), sha256=hashlib.sha256(content).hexdigest())
        manifest = Manifest(
            megamf=megamf.__version__,
            run_id=run_id,
            attempt=tmp.name,
            step=step,
            total_bytes=sum(entry.size for entry in files.values()),
            files=dict(sorted(files.items())),
            tensors=dict(sorted(tensors.items())),
        )
        content = manifest.model_dump_json(indent=1).encode()
        documents[layout.MANIFEST] = content
        documents[layout.MANIFEST_SUM] = f"{hashlib.sha256(content).hexdigest()}  {layout.MANIFEST}\n".encode()
        needed = sum(map(len, documents.values()))
        reach("save.manifest")
        for name, content in documents.items():
            write_durably(tmp / name, content)
        for rank in range(num_ranks):
            (tmp / layout.marker_name(rank)).unlink()
        fsync_directory(tmp)
        final = _make_visible(tmp, root, step)
        reach("save.latest")
        replace_file(root / layout.LATEST, f"{final.name}\n".encode())
        return final
    except TimeoutError:
        abort(tmp)
        raise
    except FileNotFoundError as error:
        abort(tmp)
        raise _gone(tmp) from error
    except OSError as error:
        abort(tmp)
        raise write_refused(error, tmp, needed) from error
    except BaseException:
        abort(tmp)
        raise


def abort(tmp: Path) -> None:
    """Remove a temporary directory as far as possible; ranks still writing into it fail at their next file."""
    remove_tree(Path(tmp))


def save(
    root: Path,
    step: int,
    tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    state: Mapping[str, Any],
    modules: Sequence[Module | Mapping[str, Any]],
    model: Mapping[str, Any],
    *,
    run_id: str,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> Path:
    """Write a whole checkpoint from one process: `begin`, `write_rank`, `finish`. Returns its directory."""
    tmp = begin(root, step, uuid.uuid4().hex)
    write_rank(tmp, 0, tensors, max_file_bytes=max_file_bytes)
    return finish(tmp, root, step, 1, state, modules, model, run_id=run_id)


def _gone(tmp: Path) -> UserError:
    return UserError(
        f"{tmp} or a file in it is gone: another rank gave up this checkpoint (its message tells why), "
        "or it was never begun"
    )


def _modules(modules: Sequence[Module | Mapping[str, Any]]) -> list[Module]:
    """The module table, validated."""
    try:
        table = [row if isinstance(row, Module) else Module.model_validate(dict(row)) for row in modules]
    except ValidationError as error:
        raise ValueError(f"module table: {error}") from error
    check_modules(table)
    return table


def _encode(value: Any, where: str) -> bytes:
    require_plain(value, where)
    return json.dumps(value, indent=1).encode()


def _wait(tmp: Path, num_ranks: int, timeout_s: float, poll: float) -> list[RankMarker]:
    """The marks of all ranks, once they are there."""
    deadline = time.monotonic() + timeout_s
    names = {layout.marker_name(rank): rank for rank in range(num_ranks)}
    while True:
        # Listing, unlike asking for one name, is not answered from a network file system's negative cache.
        missing = names.keys() - set(os.listdir(tmp))
        if not missing:
            break
        if time.monotonic() > deadline:
            ranks = sorted(names[name] for name in missing)
            raise TimeoutError(
                f"{tmp}: after {timeout_s:g} s, {len(ranks)} of {num_ranks} ranks have not written their tensors: "
                f"{', '.join(map(str, ranks[:16]))}{', ...' if len(ranks) > 16 else ''}"
            )
        time.sleep(poll)
    markers = []
    for name, rank in names.items():
        marker = RankMarker.model_validate_json((tmp / name).read_bytes())
        if (marker.attempt, marker.rank) != (tmp.name, rank):
            raise ValueError(f"{tmp / name} is the mark of rank {marker.rank} of {marker.attempt}")
        markers.append(marker)
    return markers


def _merge(markers: list[RankMarker]) -> tuple[dict[str, FileEntry], dict[str, TensorEntry]]:
    """One table out of those of the ranks; a tensor that two ranks wrote is an error naming both."""
    files: dict[str, FileEntry] = {}
    tensors: dict[str, TensorEntry] = {}
    for marker in markers:
        files |= marker.files
        twice = tensors.keys() & marker.tensors.keys()
        if twice:
            name = min(twice)
            raise ValueError(
                f"{len(twice)} tensors were written by two ranks, the first being {name}: "
                f"in {tensors[name].file} and in {marker.tensors[name].file}"
            )
        tensors |= marker.tensors
    return files, tensors


def _check_whole(
    tmp: Path,
    num_ranks: int,
    files: Mapping[str, FileEntry],
    tensors: Mapping[str, TensorEntry],
    modules: list[Module],
    expected: set[str] | None,
) -> None:
    """Raise ValueError unless the tensors are those expected, fit together, and their files have their sizes."""
    if expected is not None and expected != tensors.keys():
        missing, extra = sorted(expected - tensors.keys()), sorted(tensors.keys() - expected)
        raise ValueError(
            f"{tmp}: {len(missing)} tensors are missing ({', '.join(missing[:4])}) "
            f"and {len(extra)} unexpected ({', '.join(extra[:4])})"
        )
    check_tensors(tensors)
    check_module_counts(modules, tensors)
    for name, entry in files.items():
        size = (tmp / name).stat().st_size
        if size != entry.size:
            raise ValueError(f"{tmp / name} has {size} bytes, its rank wrote {entry.size}")
    marks = {layout.marker_name(rank) for rank in range(num_ranks)}
    strangers = set(os.listdir(tmp)) - files.keys() - marks
    if strangers:
        raise ValueError(f"{tmp} holds files of no rank of this attempt: {', '.join(sorted(strangers)[:4])}")


def _make_visible(tmp: Path, root: Path, step: int) -> Path:
    """Rename the finished directory to its step name; an older one of that name steps aside and is deleted."""
    final = layout.step_path(root, step)
    aside = None
    if final.exists():
        aside = root / f"{layout.REPLACED}{final.name}-{uuid.uuid4().hex[:8]}"
        os.rename(final, aside)
    try:
        reach("save.rename")
        os.rename(tmp, final)
    except BaseException:
        if aside is not None:
            os.rename(aside, final)
        raise
    fsync_directory(root)
    if aside is not None:
        remove_tree(aside)
    return final

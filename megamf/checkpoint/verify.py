"""Is a checkpoint what was written? Quick (structure, sizes, small files) and full (checksum of every byte)."""

import hashlib
import json
import os
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from pydantic import ValidationError
from safetensors import SafetensorError, safe_open

from megamf.checkpoint import layout
from megamf.checkpoint.errors import DamagedCheckpoint
from megamf.checkpoint.schema import Manifest, Module, check_module_counts, check_modules, check_tensors, module_rows
from megamf.checkpoint.steps import list_steps

BLOCK = 4 << 20


class Problem(NamedTuple):
    """One thing wrong with a checkpoint: the file's name inside it, what, and whether it makes loading unsafe."""

    file: str
    what: str
    fatal: bool = True


def read_manifest(path: Path) -> Manifest:
    """The manifest of a step directory, checked against its checksum file and in itself.

    Raises DamagedCheckpoint naming the file.
    """
    path = Path(path)
    content = _read(path, layout.MANIFEST)
    digest = hashlib.sha256(content).hexdigest()
    if _read(path, layout.MANIFEST_SUM) != f"{digest}  {layout.MANIFEST}\n".encode():
        raise DamagedCheckpoint(path, layout.MANIFEST, f"does not have the checksum in {layout.MANIFEST_SUM}")
    try:
        version = json.loads(content).get("version")
    except (ValueError, AttributeError) as error:
        raise DamagedCheckpoint(path, layout.MANIFEST, f"is no JSON object: {error}") from error
    if version != layout.VERSION:
        what = f"is of format version {version}, this megamf reads version {layout.VERSION}"
        raise DamagedCheckpoint(path, layout.MANIFEST, what)
    try:
        return Manifest.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise DamagedCheckpoint(path, layout.MANIFEST, f"{where + ': ' if where else ''}{first['msg']}") from error


def quick_problems(path: Path, manifest: Manifest) -> list[Problem]:
    """What is wrong with files as far as names, sizes, small files and tables tell; reads no tensor file."""
    path = Path(path)
    problems = []
    for name, entry in manifest.files.items():
        try:
            found = os.lstat(path / name)
        except OSError as error:
            problems.append(Problem(name, "is missing" if isinstance(error, FileNotFoundError) else str(error)))
            continue
        if not stat.S_ISREG(found.st_mode):
            problems.append(Problem(name, "is not a regular file"))
        elif found.st_size != entry.size:
            problems.append(Problem(name, f"has {found.st_size:,} bytes, the manifest says {entry.size:,}"))
        elif name in layout.JSON_FILES and hashlib.sha256((path / name).read_bytes()).hexdigest() != entry.sha256:
            problems.append(Problem(name, "does not have the checksum in the manifest"))
    step = layout.step_of(path.absolute().name)
    if step is not None and step != manifest.step:
        problems.append(Problem(layout.MANIFEST, f"is of step {manifest.step}, the directory of step {step}"))
    try:
        check_tensors(manifest.tensors)
    except ValueError as error:
        problems.append(Problem(layout.MANIFEST, str(error)))
    return problems


def verify(
    path: Path,
    *,
    rank: int = 0,
    num_ranks: int = 1,
    threads: int = 4,
    progress: Callable[[int], object] | None = None,
) -> list[Problem]:
    """Everything wrong with a step directory: checksums, sizes, missing and extra files, tensor and module tables.

    With `num_ranks` > 1 the tensor files are shared out: rank r reads every num_ranks-th one, so that the union
    over the ranks is the whole answer. `progress` is called with bytes read, from several threads.
    """
    path = Path(path)
    try:
        manifest = read_manifest(path)
    except DamagedCheckpoint as error:
        return [Problem(error.file, error.what)]
    problems = quick_problems(path, manifest)
    suspects = {problem.file for problem in problems}
    if layout.MODULES not in suspects:
        problems += _module_problems(path, manifest)
    listed = manifest.files.keys() | {layout.MANIFEST, layout.MANIFEST_SUM}
    problems += [
        Problem(name, "is not in the manifest", fatal=False) for name in sorted(set(os.listdir(path)) - listed)
    ]
    shards = [name for name in manifest.files if name not in layout.JSON_FILES and name not in suspects]
    with ThreadPoolExecutor(max(1, threads)) as pool:
        for found in pool.map(lambda name: _shard_problems(path, name, manifest, progress), shards[rank::num_ranks]):
            problems += found
    return problems


def newest_good(root: Path, before: int | None = None, full: bool = True) -> Path | None:
    """The newest step directory below `root` (older than step `before`) without damage; None where there is none.

    `full` reads and checks every byte; otherwise names, sizes and the small files decide.
    """
    for step in reversed(list_steps(root)):
        path = layout.step_path(root, step)
        if before is not None and step >= before:
            continue
        if not any(problem.fatal for problem in (verify(path) if full else _quick(path))):
            return path
    return None


def _quick(path: Path) -> list[Problem]:
    try:
        return quick_problems(path, read_manifest(path))
    except DamagedCheckpoint as error:
        return [Problem(error.file, error.what)]


def _read(path: Path, name: str) -> bytes:
    try:
        return (path / name).read_bytes()
    except FileNotFoundError as error:
        raise DamagedCheckpoint(path, name, "is missing") from error
    except OSError as error:
        raise DamagedCheckpoint(path, name, f"cannot be read: {error.strerror}") from error


def read_modules(path: Path) -> list[Module]:
    """The module table of a step directory. Raises DamagedCheckpoint."""
    try:
        table = module_rows(_read(path, layout.MODULES))
        check_modules(table)
    except DamagedCheckpoint:
        raise
    except ValueError as error:
        raise DamagedCheckpoint(path, layout.MODULES, f"is no module table: {error}") from error
    return table


def _module_problems(path: Path, manifest: Manifest) -> list[Problem]:
    try:
        check_module_counts(read_modules(path), manifest.tensors)
    except DamagedCheckpoint as error:
        return [Problem(layout.MODULES, error.what)]
    except ValueError as error:
        return [Problem(layout.MODULES, str(error))]
    return []


def _shard_problems(
    path: Path, name: str, manifest: Manifest, progress: Callable[[int], object] | None
) -> list[Problem]:
    """Checksum of one tensor file, then its header against the manifest."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(BLOCK))
    try:
        with open(path / name, "rb", buffering=0) as file:
            while count := file.readinto(buffer):
                digest.update(buffer[:count])
                if progress:
                    progress(count)
    except OSError as error:
        return [Problem(name, f"cannot be read: {error.strerror}")]
    if digest.hexdigest() != manifest.files[name].sha256:
        return [Problem(name, "does not have the checksum in the manifest")]
    try:
        return header_problems(path, name, manifest)
    except (SafetensorError, OSError) as error:
        return [Problem(name, f"is no safetensors file: {error}")]


def header_problems(path: Path, name: str, manifest: Manifest) -> list[Problem]:
    """Differences between a tensor file's own table and the manifest. Raises SafetensorError for a broken header."""
    said = {key: (entry.dtype, tuple(entry.shape)) for key, entry in manifest.tensors.items() if entry.file == name}
    with safe_open(path / name, framework="pt") as shard:
        attempt = (shard.metadata() or {}).get("attempt")
        slices = {key: shard.get_slice(key) for key in shard.keys()}  # noqa: SIM118 (not a mapping)
        found = {
            key: (layout.NAME_OF_CODE.get(item.get_dtype(), item.get_dtype()), tuple(item.get_shape()))
            for key, item in slices.items()
        }
    if attempt != manifest.attempt:
        return [Problem(name, f"was written by {attempt!r}, the manifest is of {manifest.attempt!r}")]
    wrong = sorted(key for key in said.keys() | found.keys() if said.get(key) != found.get(key))
    return [Problem(name, f"{key} is {found.get(key)} in the file, {said.get(key)} in the manifest") for key in wrong]

"""Durable file operations: atomic small files, directory fsync, removal that is never half visible, free space."""

import os
import shutil
import uuid
from pathlib import Path

from megamf.checkpoint import layout
from megamf.errors import UserError


def fsync_directory(path: Path) -> None:
    """Make renames and creations inside a directory durable."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_durably(path: Path, content: bytes) -> None:
    """Write a file and wait until it is on disk."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def replace_file(path: Path, content: bytes) -> None:
    """Replace a small file atomically: readers see the old content or the new one, after a crash too."""
    part = path.with_name(f"{layout.TEMPORARY}{path.name}-{uuid.uuid4().hex}")
    # Opened ahead: once the file has its name, another process may rename the directory.
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        write_durably(part, content)
        os.replace(part, path)
        os.fsync(directory)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    finally:
        os.close(directory)


def remove_tree(path: Path, prefix: str = layout.OLD) -> None:
    """Take a directory out of sight by one rename, then delete it; what cannot be deleted is left to `sweep`.

    Others who still write into it by its path fail at once instead of filling a half-deleted directory.
    """
    hidden = path
    if not path.name.startswith(layout.OLD):
        hidden = path.with_name(f"{prefix}{path.name.lstrip('.')}-{uuid.uuid4().hex[:8]}")
        try:
            os.rename(path, hidden)
        except FileNotFoundError:
            return
        except OSError:
            hidden = path
    shutil.rmtree(hidden, ignore_errors=True)


def free_bytes(path: Path) -> int | None:
    """Free bytes of the file system that holds `path` or its nearest existing parent; None where unknown."""
    for place in (path, *path.parents):
        try:
            return shutil.disk_usage(place).free
        except OSError:
            continue
    return None


def check_space(path: Path, needed_bytes: int) -> None:
    """Raise UserError where `needed_bytes` do not fit into the file system of `path`."""
    free = free_bytes(Path(path))
    if free is not None and free < needed_bytes:
        raise UserError(
            f"no space for a checkpoint in {path}: {needed_bytes:,} bytes needed, {free:,} free. Earlier checkpoints "
            "are untouched. Free some space, or lower checkpoint.keep"
        )


def write_refused(error: OSError, path: Path, needed_bytes: int | None) -> UserError:
    """The message for a checkpoint that could not be written, from the system's error."""
    free = free_bytes(Path(path))
    return UserError(
        f"cannot write the checkpoint into {path}: {error.strerror or error} (errno {error.errno}); "
        f"bytes needed: {'unknown' if needed_bytes is None else f'{needed_bytes:,}'}, "
        f"free: {'unknown' if free is None else f'{free:,}'}. Earlier checkpoints and `{layout.LATEST}` are untouched"
    )

"""Deleting: old checkpoints by the rules of rotation, and what dead attempts left behind."""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from megamf.checkpoint import layout
from megamf.checkpoint.files import fsync_directory, remove_tree
from megamf.checkpoint.steps import latest, list_steps


def steps_to_delete(steps: Iterable[int], keep: int, keep_every: int, current: int | None) -> list[int]:
    """Steps that rotation deletes, rising. The newest `keep` stay (0: all), multiples of `keep_every` (0: none), and
    `current`, the one `latest` names."""
    ordered = sorted(steps)
    if keep == 0:
        return []
    return [step for step in ordered[:-keep] if step != current and not (keep_every > 0 and step % keep_every == 0)]


def rotate(root: Path, keep: int, keep_every: int = 0) -> list[Path]:
    """Delete old complete checkpoints below `root`; returns the directories that are gone.

    Each leaves its name by a rename before anything in it is deleted. Raises ValueError for negative numbers.
    """
    root = Path(root)
    if keep < 0 or keep_every < 0:
        raise ValueError(f"keep={keep} and keep_every={keep_every} must not be negative")
    current = latest(root)
    current_step = layout.step_of(current.name) if current else None
    doomed = [
        layout.step_path(root, step) for step in steps_to_delete(list_steps(root), keep, keep_every, current_step)
    ]
    for path in doomed:
        remove_tree(path, prefix=layout.ROTATED)
    return [path for path in doomed if not path.exists()]


def sweep(root: Path) -> list[str]:
    """Remove what dead attempts left below `root` (`.tmp-*`, `.old-*`); returns the names removed.

    A checkpoint that had stepped aside for a new one of the same step, which then never came, gets its name back.
    Run by one process, at start, while no other writes below `root`.
    """
    root = Path(root)
    if not root.is_dir():
        return []
    removed = []
    for entry in sorted(root.iterdir()):
        if not entry.name.startswith((layout.TEMPORARY, layout.OLD)):
            continue
        if entry.name.startswith(layout.REPLACED):
            final = root / entry.name.removeprefix(layout.REPLACED).rpartition("-")[0]
            if layout.step_of(final.name) is not None and not final.exists() and (entry / layout.MANIFEST).is_file():
                os.rename(entry, final)
                fsync_directory(root)
                continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)
        removed.append(entry.name)
    return removed

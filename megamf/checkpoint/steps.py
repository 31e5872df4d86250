"""Which checkpoints a directory holds, and which of them `latest` names."""

from pathlib import Path

from megamf.checkpoint import layout
from megamf.checkpoint.errors import DamagedCheckpoint
from megamf.errors import UserError


def list_steps(root: Path) -> list[int]:
    """Steps of the complete checkpoints below `root`, rising; empty where there is no such directory."""
    root = Path(root)
    if not root.is_dir():
        return []
    steps = (layout.step_of(entry.name) for entry in root.iterdir() if (entry / layout.MANIFEST).is_file())
    return sorted(step for step in steps if step is not None)


def latest(root: Path) -> Path | None:
    """The step directory that the file `latest` names; without that file the newest complete one; None without any.

    Raises DamagedCheckpoint where `latest` holds no step name or names a directory that is not there, UserError where
    `root` is a file.
    """
    root = Path(root)
    steps = list_steps(root)
    newest = layout.step_path(root, steps[-1]) if steps else None
    advice = f"The newest complete checkpoint is {newest}" if newest else "There is no other checkpoint"
    try:
        name = (root / layout.LATEST).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return newest
    except NotADirectoryError:
        raise UserError(f"{root} is no directory, so it cannot hold checkpoints: remove it or choose another") from None
    except UnicodeDecodeError as error:
        raise DamagedCheckpoint(root, layout.LATEST, "is not text", advice) from error
    step = layout.step_of(name)
    if step is None:
        raise DamagedCheckpoint(root, layout.LATEST, f"holds {name[:40]!r}, which is no step directory", advice)
    if step not in steps:
        raise DamagedCheckpoint(root, layout.LATEST, f"names {name}, which is missing or without a manifest", advice)
    return root / name


def resolve(path: Path) -> Path:
    """The step directory meant by a step directory, a checkpoints directory, its file `latest`, or a run directory.

    Raises UserError where there is none, DamagedCheckpoint where `latest` is wrong.
    """
    path = Path(path)
    if path.name == layout.LATEST and path.is_file():
        path = path.parent
    if not path.is_dir():
        raise UserError(f"there is no checkpoint directory {path}")
    if layout.step_of(path.absolute().name) is not None or (path / layout.MANIFEST).is_file():
        return path
    for root in (path, path / "checkpoints"):
        if found := latest(root):
            return found
    raise UserError(
        f"{path} holds no checkpoint: expected a step directory (step-XXXXXXXX), the directory that holds such, "
        "or a run directory"
    )

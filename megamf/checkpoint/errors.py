"""Errors of the checkpoint format."""

from pathlib import Path

from megamf.errors import UserError


class DamagedCheckpoint(UserError):
    """A checkpoint is incomplete or altered. `path` is its directory, `file` the damaged file's name."""

    def __init__(self, path: Path, file: str, what: str, advice: str = "") -> None:
        self.path, self.file, self.what, self.advice = Path(path), file, what, advice
        super().__init__(f"damaged checkpoint {path}: {file}: {what}.{' ' + advice if advice else ''}")

    def __reduce__(self) -> tuple[type, tuple[Path, str, str, str]]:
        """Errors travel between processes."""
        return type(self), (self.path, self.file, self.what, self.advice)

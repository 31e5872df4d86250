"""Process groups that run the worker scripts of this folder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def launch(launch_ranks) -> Callable[[str, int, Any, Path], None]:
    """launch(script, world, work, out): `launch_ranks` with the name of a script in tests/parity."""

    def run(script: str, world: int, work: Any, out: Path) -> None:
        launch_ranks(Path(__file__).with_name(script), world, work, out)

    return run

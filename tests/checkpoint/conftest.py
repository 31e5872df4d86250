"""How to write a small checkpoint."""

from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoint_samples import MODULES, NUM_LAYERS, training_state

from megamf.checkpoint import save


@pytest.fixture
def write_step(tmp_path: Path) -> Callable[..., Path]:
    """`write_step(step, seed=step)` writes a checkpoint below `tmp_path` in several files and returns its directory."""

    def write(step: int, seed: int | None = None, run_id: str = "run") -> Path:
        return save(
            tmp_path,
            step,
            training_state(step if seed is None else seed),
            {"step": step, "tokens": 1000 * step},
            MODULES,
            {"n_layer": NUM_LAYERS},
            run_id=run_id,
            max_file_bytes=1500,
        )

    return write

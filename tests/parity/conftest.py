"""A small corpus of uneven documents, and process groups that run worker scripts."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megamf.data.indexed import IndexedWriter, Metadata
from megamf.parallel.launch import free_port


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """Documents of 1 to 60 tokens ending in 0, so that rows hold several and some are cut; learnable by counting."""
    prefix = tmp_path_factory.mktemp("corpus") / "text"
    rng = np.random.default_rng(0)
    with IndexedWriter(prefix, vocab_size=61) as writer:
        for _ in range(400):
            body = (np.cumsum(rng.integers(1, 4, rng.integers(1, 60))) % 60 + 1).tolist()
            writer.add_document([*body, 0])
        facts = {"vocab_size": 61, "eod_id": 0, "appended_eod": True, "documents": 400, "bytes": 1}
        writer.commit(Metadata(tokenizer="numbers", tokenizer_sha256="0" * 64, tokens=writer.num_tokens, **facts))
    return prefix


@pytest.fixture(scope="session")
def launch() -> Callable[[str, int, Any, Path], None]:
    """launch(script, world, work, out): `world` ranks of tests/parity/SCRIPT, all of which end well or the test fails.

    The script gets `out` and a JSON file with `work`.
    """

    def run(script: str, world: int, work: Any, out: Path) -> None:
        out.mkdir()
        (out / "work.json").write_text(json.dumps(work))
        environment = os.environ | {
            "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
            "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        command = [sys.executable, str(Path(__file__).with_name(script)), str(out), str(out / "work.json")]
        ranks = []
        for rank in range(world):
            log = (out / f"rank-{rank}.log").open("w")
            own = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            ranks.append(subprocess.Popen(command, env=own, stdout=log, stderr=subprocess.STDOUT))
        try:
            codes = [process.wait(timeout=400) for process in ranks]
        finally:
            for process in ranks:
                process.kill()
                process.wait()
        logs = "\n".join((out / f"rank-{rank}.log").read_text()[-3000:] for rank in range(world))
        assert codes == [0] * world, logs

    return run

"""Process groups that run worker scripts."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megamf.parallel.launch import free_port


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

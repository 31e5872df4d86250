"""An experiment as named stages, each run once: a stage that is done is not repeated when the script starts again.

A study's folder holds `stages/NAME.json` (the command or the arguments, seconds, result) and `logs/NAME.log`. A stage
whose command or arguments have changed is run again.
"""

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from megamf.errors import UserError


class Study:
    """The stages of one experiment in `folder`. Commands are run there, `megamf` being this installation's."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        for part in ("stages", "logs"):
            (self.folder / part).mkdir(parents=True, exist_ok=True)

    def path(self, name: str) -> Path:
        """A path inside the folder."""
        return self.folder / name

    def command(self, name: str, command: str, *, threads: int = 0) -> dict[str, Any]:
        """Run `megamf ...` or `torchrun ...` (one string, as a user would type it) and return its record.

        `threads` of each process (0: all cores). Raises UserError with the end of its output when it fails.
        """
        record = self._record(name)
        if record is not None and record.get("command") == command:
            return record
        print(f"[{name}] {command}", file=sys.stderr, flush=True)
        began = time.perf_counter()
        log = self.folder / "logs" / f"{name}.log"
        with log.open("w") as out:
            done = subprocess.run(
                _executable(command), cwd=self.folder, env=_environment(threads), stdout=out, stderr=subprocess.STDOUT
            )
        if done.returncode:
            tail = "".join(log.read_text(errors="replace").splitlines(keepends=True)[-12:])
            raise UserError(f"stage {name} ended with {done.returncode}: {command}\n{tail}")
        return self._keep(name, {"command": command, "seconds": round(time.perf_counter() - began, 1)})

    def commands(self, stages: dict[str, str], *, at_once: int) -> None:
        """Run independent commands, `at_once` at a time with one thread each."""
        with ThreadPoolExecutor(at_once) as pool:
            for done in [pool.submit(self.command, name, command, threads=1) for name, command in stages.items()]:
                done.result()

    def compute(self, name: str, function: Callable[..., Any], /, **arguments: Any) -> Any:
        """`function(**arguments)`, whose result and arguments JSON can hold."""
        record = self._record(name)
        asked = json.loads(json.dumps(arguments))
        if record is not None and record.get("arguments") == asked:
            return record["result"]
        print(f"[{name}] {json.dumps(asked)}", file=sys.stderr, flush=True)
        began = time.perf_counter()
        result = function(**arguments)
        kept = {"arguments": asked, "seconds": round(time.perf_counter() - began, 1), "result": result}
        return self._keep(name, kept)["result"]

    def json(self, name: str) -> Any:
        """A JSON file that a command wrote."""
        return json.loads(self.path(name).read_text())

    def _record(self, name: str) -> dict[str, Any] | None:
        path = self.folder / "stages" / f"{name}.json"
        return json.loads(path.read_text()) if path.exists() else None

    def _keep(self, name: str, record: dict[str, Any]) -> dict[str, Any]:
        path = self.folder / "stages" / f"{name}.json"
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(record, indent=1) + "\n")
        partial.replace(path)
        return record


def _executable(command: str) -> list[str]:
    words = shlex.split(command)
    if words[0] == "megamf":
        return [sys.executable, "-m", "megamf.cli", *words[1:]]
    if words[0] == "torchrun":
        return [sys.executable, "-m", "torch.distributed.run", *words[1:]]
    raise ValueError(f"a stage's command begins with megamf or torchrun, not {words[0]}")


def _environment(threads: int) -> dict[str, str]:
    count = threads or os.cpu_count() or 1
    return os.environ | {"OMP_NUM_THREADS": str(count), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

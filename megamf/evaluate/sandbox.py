"""Running programs that a model wrote: in a process of their own without network, privileges, children or much memory.

This limits accidents and casual mischief of a language model's code. It is not a wall against an attacker: the
program can read what every user of the machine can read.
"""

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from megamf.errors import UserError

CHILD = Path(__file__).with_name("sandbox_child.py")
BLOCKED = 97
SHOWN = 2000
NOBODY = 65534


@dataclass(frozen=True)
class Limits:
    """Of one program: wall and processor time in seconds, address space and size of a file in bytes."""

    seconds: int = 10
    memory: int = 1 << 30
    file_size: int = 1 << 20


@dataclass(frozen=True)
class Outcome:
    """`passed`: the program ran to its end. `reason`: why not (`timeout`, or the end of what it wrote to stderr)."""

    passed: bool
    reason: str = ""


def execute(program: str, limits: Limits | None = None) -> Outcome:
    """Run a Python program (standard library only). Raises UserError where the sandbox cannot be had on this system.

    Leaving early, by exit code 0 too, is not passing: only the end of the program is.
    """
    limits = limits or Limits()
    place = tempfile.mkdtemp(prefix="megamf-sandbox-")
    try:
        if os.getuid() == 0:
            os.chown(place, NOBODY, NOBODY)
        return _execute(program, limits, Path(place))
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _execute(program: str, limits: Limits, place: Path) -> Outcome:
    word = secrets.token_hex(16)
    read_end, write_end = os.pipe()
    numbers = (limits.seconds, limits.memory, limits.file_size, write_end)
    with os.fdopen(read_end, "rb") as report, tempfile.TemporaryFile() as errors:
        try:
            child = subprocess.Popen(
                [sys.executable, "-I", "-S", "-B", str(CHILD), *map(str, numbers)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                cwd=place,
                env={"PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8"},
                pass_fds=(write_end,),
                start_new_session=True,
            )
        finally:
            os.close(write_end)
        try:
            child.communicate(f"{word}\n{program}".encode("utf-8", "surrogatepass"), timeout=limits.seconds + 2)
        except subprocess.TimeoutExpired:
            return Outcome(False, "timeout")
        finally:
            # The program cannot have children, so the group is the process itself.
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
        said = _end_of(errors)
        if child.returncode == BLOCKED:
            raise UserError(f"generated code cannot be run safely on this system: {said.strip()}")
        if child.returncode == -signal.SIGXCPU:
            return Outcome(False, "timeout")
        if report.read().decode().strip() == word:
            return Outcome(True)
        return Outcome(False, said.strip() or f"ended early with exit code {child.returncode}")


def _end_of(file) -> str:
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - SHOWN))
    return file.read().decode("utf-8", "replace")


def check_sandbox() -> None:
    """Raise UserError, before anything is generated, unless programs run here and are cut off."""
    probe = (
        "import collections, functools, itertools, json, math, re, socket\n"
        "try:\n    socket.create_connection(('127.0.0.1', 9), timeout=1)\n"
        "except OSError as error:\n    assert error.errno == 101, error\n"
        "else:\n    raise AssertionError('the network is reachable')\n"
    )
    outcome = execute(probe)
    if not outcome.passed:
        raise UserError(f"the sandbox for generated code does not work on this system: {outcome.reason}")

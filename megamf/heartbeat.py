"""Signs of life of a rank: what it did last and when, in memory and in a small file that the other ranks can read."""

import ctypes
import json
import os
import signal
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

_libc = ctypes.CDLL(None)


@dataclass
class Pulse:
    """The last sign of life of this process. `at` is on the clock of time.monotonic; `count` grows with every one."""

    count: int = 0
    phase: str = "start"
    step: int = 0
    at: float = 0.0


pulse = Pulse(at=time.monotonic())


def beat(phase: str, step: int | None = None) -> None:
    """This process goes on: it has come to `phase` of the update `step` (that of the beat before, if not told)."""
    pulse.phase = phase
    if step is not None:
        pulse.step = step
    pulse.count += 1
    pulse.at = time.monotonic()


@dataclass(frozen=True)
class Heartbeat:
    """What a rank's file says. `machine` and `started` make `pid` one process and no other; times are Unix times."""

    rank: int
    host: str
    machine: str
    pid: int
    started: int | None
    step: int
    phase: str
    count: int
    beat_at: float
    written_at: float

    @classmethod
    def of_this_process(cls, rank: int) -> Self:
        """What this process would write now."""
        now, pid = time.time(), os.getpid()
        beat_at = now - (time.monotonic() - pulse.at)
        host, machine = socket.gethostname(), machine_id()
        return cls(rank, host, machine, pid, start_time(pid), pulse.step, pulse.phase, pulse.count, beat_at, now)


def file_of(directory: Path, rank: int) -> Path:
    """Where the heartbeat of a rank is."""
    return directory / f"rank-{rank:05d}.json"


def write(directory: Path, heartbeat: Heartbeat) -> None:
    """Replace the rank's file, so that readers see the old one or the new one. Raises OSError."""
    path = file_of(directory, heartbeat.rank)
    part = path.with_name(f".{path.name}-{heartbeat.pid}")
    part.write_text(json.dumps(asdict(heartbeat)), encoding="utf-8")
    part.replace(path)


def read(directory: Path, rank: int) -> Heartbeat | None:
    """The heartbeat of a rank; None where there is none that can be read."""
    try:
        found = Heartbeat(**json.loads(file_of(directory, rank).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    return found if found.rank == rank and isinstance(found.pid, int) and found.pid > 1 else None


def machine_id() -> str:
    """The same for two processes only where a process id means the same process to both."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{socket.gethostname()} {os.getpid()}"


def process_state(pid: int) -> str | None:
    """One letter, as in ps(1): R, S, D, T (stopped), Z (dead) ...; None where there is no such process."""
    fields = _stat(pid)
    return fields[0] if fields else None


def start_time(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None where there is no such process."""
    fields = _stat(pid)
    return int(fields[19]) if fields else None


def _stat(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat from the third on; the second, the name, may hold blanks and brackets."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None


def is_here(heartbeat: Heartbeat) -> bool:
    """Whether the process that wrote this heartbeat is on this machine and lives (stopped, perhaps)."""
    if heartbeat.machine != machine_id() or heartbeat.started is None:
        return False
    return start_time(heartbeat.pid) == heartbeat.started and process_state(heartbeat.pid) not in ("Z", "X")


def send(heartbeat: Heartbeat, *signals: signal.Signals) -> bool:
    """Send signals to the very process that wrote this heartbeat, in order; False, and nothing sent, if it is not here.

    The process is held by a descriptor while it is checked, so that no other can take its id in between. They go to its
    main thread: a stopped process would take them in whichever of its threads comes first.
    """
    try:
        process = os.pidfd_open(heartbeat.pid)
    except OSError:
        return False
    try:
        if not is_here(heartbeat):
            return False
        for number in signals:
            if number in (signal.SIGCONT, signal.SIGSTOP):
                signal.pidfd_send_signal(process, number)
            elif _libc.tgkill(heartbeat.pid, heartbeat.pid, number):
                return False
        return True
    except OSError:
        return False
    finally:
        os.close(process)

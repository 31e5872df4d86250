"""A run that hangs ends itself, and says where it hung.

Every rank has a watchdog. It finds the job hanging when neither its own rank nor any other has given a sign of life
for `train.hang_timeout` seconds (so a rank may wait for another's long save for as long as that one goes on). Then
every rank writes the Python stacks of all its threads to RUN_DIR/stacks and to stderr, names the ranks that are
behind, makes stopped processes of its machine do the same, and exits with code 1; the launcher ends what is left.

All ranks that can run have ended at most 1.2 x hang_timeout + 15 s after the last sign of life of any rank (before the
first step, at least a minute stands for hang_timeout). A stopped process (SIGSTOP) is told to go on once the stack of
its main thread is asked for, and ends on the connections that broke meanwhile; what is told of it is what it wrote
last, which may be 1/20 of hang_timeout (at most 15 s) old. `kill -USR2 PID` writes the stack of a rank's main thread at
any time, and it goes on.

Not noticed: a lone process that hangs inside C code that holds the interpreter lock. A job that was suspended as a
whole (Ctrl-Z, `scontrol suspend`) counts from where it was resumed.
"""

import faulthandler
import os
import signal
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Self

from megamf import heartbeat
from megamf.heartbeat import Heartbeat, pulse

LONGEST_INTERVAL = 15.0
# Imports, the meeting of the ranks, the model, the engine: each gives one sign of life and has at least this long.
START_S = 60.0
NAMED = 8


class Watchdog:
    """Watches this process as rank `rank` of `world` while the block lasts; `timeout` 0 turns it off."""

    def __init__(self, run_dir: Path, rank: int, world: int, timeout: float) -> None:
        self.rank, self.world, self.timeout = rank, world, timeout
        self.interval = min(timeout / 20, LONGEST_INTERVAL)
        self.heartbeats, self.stacks = run_dir / "heartbeats", run_dir / "stacks"
        self.stack_file: IO[str] | None = None
        self.closing = threading.Event()
        self.threads: list[threading.Thread] = []
        self.looked_at = time.monotonic()
        self.observer = Observer()
        self.silence: dict[int, float] = {}

    def __enter__(self) -> Self:
        if not self.timeout:
            return self
        self.heartbeats.mkdir(parents=True, exist_ok=True)
        self.stacks.mkdir(exist_ok=True)
        for old in self.stacks.glob(f"rank-{self.rank:05d}-*.txt"):
            if old.stat().st_size == 0:
                old.unlink(missing_ok=True)
        self.stack_file = self.stack_path(self.rank, os.getpid()).open("w")
        # The main thread alone, which the kernel prefers: without the interpreter's lock the stacks of others move.
        faulthandler.register(signal.SIGUSR2, self.stack_file, all_threads=False)
        heartbeat.beat("start", 0)
        # Daemons: they must not keep a process that is done, and one of them may be stuck in the file system.
        for target in (self.exchange, self.judge):
            self.threads.append(threading.Thread(target=target, name=f"watchdog-{target.__name__}", daemon=True))
            self.threads[-1].start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.stack_file is None:
            return
        self.closing.set()
        for thread in self.threads:
            thread.join(timeout=2.0)
        faulthandler.unregister(signal.SIGUSR2)
        self.stack_file.close()
        path = self.stack_path(self.rank, os.getpid())
        with suppress(OSError):
            heartbeat.file_of(self.heartbeats, self.rank).unlink(missing_ok=True)
            if path.stat().st_size == 0:
                path.unlink()
        # The last rank of a run that ended well leaves nothing.
        for directory in (self.heartbeats, self.stacks):
            with suppress(OSError):
                directory.rmdir()

    def stack_path(self, rank: int, pid: int) -> Path:
        """Where the stacks of a process go."""
        return self.stacks / f"rank-{rank:05d}-{pid}.txt"

    def exchange(self) -> None:
        """Thread: writes this rank's heartbeat; reads the others' once this rank has been silent for a while."""
        while not self.closing.is_set():
            # A full disk must not end a run that goes on: a heartbeat that cannot be written is a silent one.
            with suppress(OSError):
                heartbeat.write(self.heartbeats, Heartbeat.of_this_process(self.rank))
            if time.monotonic() - pulse.at > self.timeout / 2:
                self.silence = self.observer.look(self.read_others(), time.monotonic(), time.time(), self.interval)
            self.looked_at = time.monotonic()
            self.closing.wait(self.interval)

    def read_others(self) -> dict[int, Heartbeat | None]:
        """What every other rank wrote last."""
        return {rank: heartbeat.read(self.heartbeats, rank) for rank in range(self.world) if rank != self.rank}

    def judge(self) -> None:
        """Thread: ends the process once the job hangs. Touches no file before it does."""
        before = time.monotonic()
        while not self.closing.wait(self.interval):
            now = time.monotonic()
            if now - before > self.interval + self.timeout / 2:
                heartbeat.beat(pulse.phase)  # this process was stopped itself
            before = now
            if self.hangs(now):
                self.end()

    def hangs(self, now: float) -> bool:
        """Whether nobody goes on. Where the others' files cannot be reached, twice the time decides alone."""
        silent = now - pulse.at
        timeout = max(self.timeout, START_S) if pulse.step == 0 else self.timeout
        if silent < timeout:
            return False
        if now - self.looked_at > max(4 * self.interval, 5.0):
            return silent > 2 * timeout
        others = [self.silence.get(rank, 0.0) for rank in range(self.world) if rank != self.rank]
        return all(seconds >= timeout for seconds in others)

    def end(self) -> None:
        """Stacks and names to stderr and to the files, then exit code 1."""
        # Should anything below get stuck, this ends the process all the same, without the interpreter's help.
        faulthandler.dump_traceback_later(30, exit=True)
        others = self.read_others() if self.world > 1 else {}
        own = Heartbeat.of_this_process(self.rank)
        report = describe(own, others, self.timeout)
        # Not by way of sys.stderr: a thread that hangs may hold its lock.
        say(report + f"\nmegamf: stacks of rank {self.rank}, pid {own.pid}:\n")
        faulthandler.dump_traceback(2)
        faulthandler.dump_traceback(self.stack_file)
        with suppress(OSError):
            os.write(self.stack_file.fileno(), f"\n{report}".encode())
        # The others come to the same end about now; who ends first would let the launcher kill them on the way.
        time.sleep(min(3 * self.interval, 5.0))
        here = {rank: beat for rank, beat in others.items() if beat is not None and heartbeat.is_here(beat)}
        stopped = {rank for rank, beat in here.items() if heartbeat.process_state(beat.pid) in ("T", "t")}
        if self.rank < min(here.keys() - stopped, default=self.world):
            self.wake(
                {rank: beat for rank, beat in here.items() if rank in stopped or not self.written(rank, beat.pid)}
            )
        os._exit(1)

    def wake(self, mute: Mapping[int, Heartbeat]) -> None:
        """Have processes of this machine that could not write their stacks write them, and show those."""
        asked = [rank for rank, beat in mute.items() if heartbeat.send(beat, signal.SIGUSR2, signal.SIGCONT)]
        deadline = time.monotonic() + 5.0
        for rank in asked:
            while not self.written(rank, mute[rank].pid) and time.monotonic() < deadline:
                time.sleep(0.05)
            time.sleep(0.1)
            with suppress(OSError):
                text = self.stack_path(rank, mute[rank].pid).read_text(encoding="utf-8", errors="replace")
                say(f"megamf: stacks of rank {rank}, pid {mute[rank].pid}, which did not write them itself:\n{text}")

    def written(self, rank: int, pid: int) -> bool:
        """Whether that process wrote stacks."""
        try:
            return self.stack_path(rank, pid).stat().st_size > 0
        except OSError:
            return False


class Observer:
    """How long the other ranks have been silent, without trust in the clocks of other machines."""

    def __init__(self) -> None:
        self.seen: dict[int, tuple[tuple[str, int, int], float]] = {}

    def look(
        self, others: Mapping[int, Heartbeat | None], now: float, wall: float, interval: float
    ) -> dict[int, float]:
        """Seconds of silence by rank, at `now` (monotonic) and `wall` (Unix time); endless without a heartbeat.

        A rank whose count moves goes on, whatever its clock says. The time of its last beat is believed only once the
        count has stood still over more than two of the intervals at which heartbeats are written.
        """
        silence = {}
        for rank, beat in others.items():
            if beat is None:
                silence[rank] = float("inf")
                continue
            mark = (beat.machine, beat.pid, beat.count)
            if rank not in self.seen or self.seen[rank][0] != mark:
                self.seen[rank] = (mark, now)
            still = now - self.seen[rank][1]
            silence[rank] = max(still, wall - beat.beat_at) if still > 2.5 * interval else still
        return silence


def describe(own: Heartbeat, others: Mapping[int, Heartbeat | None], timeout: float) -> str:
    """Which ranks are behind: those of the lowest step, the longest silent first; and what their processes do."""
    wall = own.written_at
    known = sorted([own, *(beat for beat in others.values() if beat is not None)], key=lambda b: (b.step, b.beat_at))
    lines = [
        f"megamf: rank {own.rank}: no rank has gone on for {timeout:g} s (train.hang_timeout); the job ends. "
        f"This rank: step {own.step}, {own.phase}, {wall - own.beat_at:.0f} s ago. The furthest behind first:"
    ]
    missing = [rank for rank, beat in others.items() if beat is None]
    lines += [f"  rank {rank}: no heartbeat, it has ended or never began" for rank in missing[:NAMED]]
    lines += [
        f"  rank {beat.rank}: host {beat.host}, pid {beat.pid}, step {beat.step}, {beat.phase}, "
        f"{wall - beat.beat_at:.0f} s ago; {condition(beat)}"
        for beat in known[:NAMED]
    ]
    left = len(missing[NAMED:]) + len(known[NAMED:])
    return "\n".join(lines) + (f"\n  and {left} more" if left else "") + "\n"


def condition(beat: Heartbeat) -> str:
    """What the process of a heartbeat is doing, as far as it can be told from this machine."""
    if beat.machine != heartbeat.machine_id():
        return "on another machine"
    if not heartbeat.is_here(beat):
        return "the process is gone"
    state = heartbeat.process_state(beat.pid)
    return {"T": "stopped", "t": "stopped by a debugger", "D": "waiting for a disk"}.get(state, "alive, waiting")


def say(text: str) -> None:
    """To the log, whole, whatever the state of sys.stderr."""
    content = text.encode()
    with suppress(OSError):
        while content:
            content = content[os.write(2, content) :]

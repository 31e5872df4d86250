"""What every suite shares: figures with their meaning, interleaved timing, the description of the machine."""

import datetime
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Figure:
    """One measured number; None where it could not be measured, and `meaning` says why.

    `at_most` / `at_least` are the limits it has to keep, where it has any.
    """

    name: str
    value: float | None
    meaning: str
    at_most: float | None = None
    at_least: float | None = None

    @property
    def kept(self) -> bool | None:
        """Whether the limits are kept; None without limits, and for what was not measured."""
        if self.value is None or (self.at_most is None and self.at_least is None):
            return None
        above = self.at_least is None or self.value >= self.at_least
        return above and (self.at_most is None or self.value <= self.at_most)


@dataclass(frozen=True)
class Result:
    """The figures of one suite, in order, with the machine and the date (UTC), and rows of detail where it has them."""

    suite: str
    figures: list[Figure]
    machine: dict[str, Any]
    date: str = field(default_factory=lambda: datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M"))
    rows: list[dict[str, Any]] = field(default_factory=list)

    def tree(self) -> dict[str, Any]:
        """Plain JSON: `suite`, `date`, `machine`, every figure by its name, `meaning` by the same names, and `rows`."""
        head = {"suite": self.suite, "date": self.date, "machine": self.machine}
        values = {figure.name: rounded(figure.value) for figure in self.figures}
        meaning = {"meaning": {figure.name: figure.meaning for figure in self.figures}}
        return head | values | meaning | ({"rows": self.rows} if self.rows else {})


def rounded(value: float | None) -> float | None:
    """Five digits."""
    return None if value is None else float(f"{value:.5g}")


def wall_seconds(case: Callable[[], object]) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    case()
    return time.perf_counter() - start


def interleaved(
    cases: dict[str, Callable[[], object]],
    *,
    repeats: int,
    warmup: int = 2,
    progress: Callable[[], None] = lambda: None,
    clock: Callable[[Callable[[], object]], float] = wall_seconds,
) -> dict[str, float]:
    """Median seconds of each case. The cases take turns, so that a slow moment of the machine meets all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(warmup + repeats):
        for name, case in cases.items():
            elapsed = clock(case)
            if turn >= warmup:
                seconds[name].append(elapsed)
        progress()
    return {name: statistics.median(values) for name, values in seconds.items()}


def machine() -> dict[str, Any]:
    """Processor, cores, threads, versions, and how busy the machine was (load of the last minute)."""
    return {
        "cpu": _cpu_model(_lines("/proc/cpuinfo")),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 2),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _cpu_model(cpuinfo: Iterable[str]) -> str:
    names = (line.partition(":")[2].strip() for line in cpuinfo if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _lines(path: str) -> list[str]:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read().splitlines()
    except FileNotFoundError:
        return []

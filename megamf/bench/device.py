"""Time and description of a CUDA device."""

from collections.abc import Callable
from typing import Any

import torch

from megamf.bench.suite import machine, wall_seconds

FLUSH_BYTES = 256 * 2**20  # more than any cache of a device


def device_seconds(device: str) -> Callable[[Callable[[], object]], float]:
    """A clock for `interleaved`: what the device itself takes, its caches emptied before; on a CPU the wall clock."""
    if torch.device(device).type != "cuda":
        return wall_seconds
    scratch = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)

    def clock(case: Callable[[], object]) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        scratch.zero_()
        begin.record()
        case()
        end.record()
        torch.cuda.synchronize(device)
        return begin.elapsed_time(end) / 1e3

    return clock


def gpu_machine() -> dict[str, Any]:
    """As `machine`, with the device, its memory, and the versions that decide its speed."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return machine() | {
        "gpu": properties.name,
        "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
    }

"""What uneven routing costs where it costs most: rows and memory of the rank that has the most of each."""

import resource
import sys
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from megamf.trainer import Trainer


def hottest_rank(trainer: "Trainer") -> dict[str, int]:
    """Maxima over all ranks since the last call, by one all-reduce; collective.

    `hottest_rank_rows`: routed rows of one micro batch and layer that a rank computed (models with experts).
    `hottest_rank_memory`: bytes that a rank's allocator had given out at once on a GPU; on a CPU the largest resident
    size of a rank's process since it began.
    """
    peaks = torch.tensor([take_peak_rows(trainer), take_peak_memory(trainer.device)], dtype=torch.float64)
    peaks = peaks.to(trainer.device)
    if trainer.mesh.world > 1:
        dist.all_reduce(peaks, op=dist.ReduceOp.MAX)
    rows, memory = (int(peak) for peak in peaks.tolist())
    found = {"hottest_rank_memory": memory}
    return found if not trainer.config.model.sparse else {"hottest_rank_rows": rows} | found


def take_peak_rows(trainer: "Trainer") -> int:
    """The most rows that one plan gave this rank, counted anew from here on."""
    peak = max(dispatcher.peak_rows for dispatcher in trainer.dispatchers)
    for dispatcher in trainer.dispatchers:
        dispatcher.peak_rows = 0
    return peak


def take_peak_memory(device: torch.device) -> int:
    """Bytes; a GPU's peak starts anew, that of a process on a CPU cannot."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024

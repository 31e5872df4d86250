"""How long this rank works by itself: the time of a stretch of code without that spent waiting for other ranks.

In synchronous training all ranks take the same time for a step; the slow one is the one that never waits.
"""

import time
from collections.abc import Callable
from typing import Any, Self

import torch
import torch.distributed as dist

# What starts a collective. With NCCL the call itself occupies the stream; with gloo it returns at once.
CALLS = (
    "allreduce", "allreduce_coalesced", "allgather", "_allgather_base", "allgather_coalesced",
    "allgather_into_tensor_coalesced", "alltoall", "alltoall_base", "barrier", "broadcast", "gather", "reduce",
    "reduce_scatter", "_reduce_scatter_base", "reduce_scatter_tensor_coalesced", "scatter", "recv",
)  # fmt: skip


class Stopwatch:
    """As a context it times every wait for a collective of this process, DeepSpeed's too, wherever it is made.

    `seconds` is what passed between `start` and `stop`, all together, without these waits. On a CPU it is wall time. On
    a GPU it is time of the current stream, so that a host that is too slow to keep it busy counts as work; it lags one
    `stop` behind, because events are read when they are sure to be over and nothing has to be waited for.
    """

    def __init__(self, device: torch.device) -> None:
        self.mark: Callable[[], Any] = _event if device.type == "cuda" else time.perf_counter
        self.seconds = 0.0
        self.began: Any = None
        self.waits: list[tuple[Any, Any]] = []
        self.unread: list[tuple[float, Any, Any]] = []
        self.originals: list[tuple[type, str, Callable]] = []

    def __enter__(self) -> Self:
        for owner, names in ((dist.Work, ("wait",)), (dist.ProcessGroup, CALLS)):
            for name in names:
                # The descriptor, which binds when it is put back; what getattr makes of it would not.
                if name in vars(owner):
                    self.originals.append((owner, name, vars(owner)[name]))
                    setattr(owner, name, self._timed(getattr(owner, name)))
        return self

    def __exit__(self, *_: object) -> None:
        for owner, name, original in self.originals:
            setattr(owner, name, original)
        self.originals.clear()

    def start(self) -> None:
        """The rank's own work begins."""
        self.waits.clear()
        self.began = self.mark()

    def stop(self) -> None:
        """It is over."""
        stretches = [(1.0, self.began, self.mark()), *((-1.0, *wait) for wait in self.waits)]
        self.began = None
        lag = stretches if isinstance(stretches[0][1], torch.cuda.Event) else []
        for sign, first, last in self.unread if lag else stretches:
            self.seconds += sign * _between(first, last)
        self.unread = lag

    def _timed(self, original: Callable) -> Callable:
        def timed(*arguments: Any, **named: Any) -> Any:
            if self.began is None:
                return original(*arguments, **named)
            before = self.mark()
            try:
                return original(*arguments, **named)
            finally:
                self.waits.append((before, self.mark()))

        return timed


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(first: Any, last: Any) -> float:
    return first.elapsed_time(last) / 1e3 if isinstance(first, torch.cuda.Event) else last - first

"""Saving beside training: a copy of the tensors, and one thread that writes it."""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from megamf.heartbeat import pulse

# What is written and hashed beside training gets the time that training leaves, where cores are few.
NICE = 10
# After a failure: how long a save in flight may go without a tensor written before it is left torn.
PATIENCE_S = 20.0


def snapshot(
    tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]], buffers: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Contiguous CPU copies in memory of their own, which training cannot change while they are written.

    With `buffers` that memory is kept in it and used by the next call with it, whose save must come after this one's
    end: memory that the system has given already is filled several times faster. It is pinned for tensors of a GPU.
    """
    copies = {}
    for name, tensor in tensors.items() if isinstance(tensors, Mapping) else tensors:
        copy = None if buffers is None else buffers.get(name)
        if copy is None or (copy.shape, copy.dtype) != (tensor.shape, tensor.dtype):
            pinned = buffers is not None and tensor.is_cuda
            copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
        copies[name] = copy.copy_(tensor.detach())
    if buffers is not None:
        buffers.clear()
        buffers.update(copies)
    return copies


class BackgroundWriter:
    """Runs one save at a time in a thread.

    An error of a save is raised again by the next `submit`, `wait` or `close`, once. Who submits also waits, with
    `close` after training and with `leave` after a failure: the interpreter does not.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def busy(self) -> bool:
        """Whether a save is in flight."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def failed(self) -> bool:
        """Whether a save has ended with an error that nobody has been told."""
        return self._error is not None

    def submit(self, fn: Callable[[], object]) -> None:
        """Start `fn` in the background, after waiting for the save before it. Raises that save's error instead."""
        self.wait()
        # A daemon: a save that waits for the files of a rank that is dead must not keep this process.
        self._thread = threading.Thread(target=self._run, args=(fn,), name="checkpoint-writer", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait for the save in flight, if any, and raise its error."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def close(self) -> None:
        """The same as `wait`; the writer can be used again."""
        self.wait()

    def leave(self, seconds: float = PATIENCE_S) -> None:
        """Wait for the save in flight as long as it goes on, and no more than `seconds` on nothing. Raises nothing."""
        count, deadline = pulse.count, time.monotonic() + seconds
        while self.busy and time.monotonic() < deadline:
            self._thread.join(0.1)
            if pulse.count != count:
                count, deadline = pulse.count, time.monotonic() + seconds

    def __enter__(self) -> "BackgroundWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, fn: Callable[[], object]) -> None:
        if sys.platform == "linux":
            # There a thread has a priority of its own, and those that it starts have it too.
            own = threading.get_native_id()
            os.setpriority(os.PRIO_PROCESS, own, max(NICE, os.getpriority(os.PRIO_PROCESS, own)))
        try:
            fn()
        except BaseException as error:
            self._error = error

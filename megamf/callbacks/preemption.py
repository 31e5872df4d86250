"""Stop signals: noted at once wherever the process is, agreed on by all ranks, followed by a checkpoint.

From its construction as a context on, SIGTERM, SIGUSR1 and SIGINT only leave a note. The ranks compare their notes
before the first step, at the beginning of every step and before its update, and before every batch of an evaluation;
so a job is over, with a complete checkpoint, after at most one step or one evaluation batch and one save (and after
whatever comes before the first step, where it was still there). One rank that was told is enough.
"""

import os
import signal
import sys
from types import FrameType
from typing import TYPE_CHECKING, Self

from megamf.callbacks.base import Callback

if TYPE_CHECKING:
    from megamf.trainer import Trainer

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Preemption(Callback):
    """Notes stop signals, as a context, and passes the note on to the trainer. A second SIGINT ends the process.

    `stopped` tells, after training, that it ended before its end.
    """

    def __init__(self) -> None:
        self.stopped = False
        self.noted: list[int] = []
        self.trainer: Trainer | None = None
        self.before: dict[int, object] = {}

    def __enter__(self) -> Self:
        for number in SIGNALS:
            self.before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def on_train_start(self, trainer: "Trainer") -> None:
        # In this order a signal in between is noted by either.
        self.trainer = trainer
        trainer.stop_requested = bool(self.noted) or trainer.stop_requested

    def on_train_end(self, trainer: "Trainer") -> None:
        unfinished = trainer.step < trainer.config.train.steps or any(call.pending for call in trainer.callbacks)
        self.stopped = trainer.stopping and unfinished
        if self.stopped and trainer.is_main:
            told = "another rank" if not self.noted else ", ".join(signal.Signals(number).name for number in self.noted)
            print(f"megamf: stopped at step {trainer.step} as asked ({told}); start again to go on", file=sys.stderr)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and number in self.noted:
            # Not an exception: that would wait for threads and for other ranks. Saves are complete or invisible.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.noted.append(number)
        if self.trainer is not None:
            self.trainer.stop_requested = True

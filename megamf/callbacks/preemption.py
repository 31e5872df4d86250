"""Stop signals: noted at once, agreed on by all ranks with the next step, followed by a checkpoint."""

import signal
from typing import TYPE_CHECKING

from megamf.callbacks.base import Callback

if TYPE_CHECKING:
    from megamf.trainer import Trainer

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Preemption(Callback):
    """SIGTERM, SIGUSR1 and SIGINT request a stop after the current step; `stopped` tells that it was met."""

    def __init__(self) -> None:
        self.stopped = False
        self.before: dict[int, object] = {}

    def on_train_start(self, trainer: "Trainer") -> None:
        def request(number: int, frame: object) -> None:
            trainer.stop_requested = True

        for number in SIGNALS:
            self.before[number] = signal.signal(number, request)

    def on_train_end(self, trainer: "Trainer") -> None:
        self.stopped = trainer.stopping and trainer.step < trainer.config.train.steps
        for number, handler in self.before.items():
            signal.signal(number, handler)

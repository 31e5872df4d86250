"""Naming the rank that all others wait for."""

import socket
import statistics
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from megamf.callbacks.base import Callback
from megamf.config.run import Logging

if TYPE_CHECKING:
    from megamf.trainer import StepResult, Trainer


class Stragglers(Callback):
    """Every `straggler_every` steps: the ranks' own time a step (reading data, computing; not waiting, not saving or
    evaluating) since the last time; a rank that takes `straggler_factor` times the median is told.

    That may be its machine, or with expert parallelism its experts, where most tokens went to them.
    """

    def __init__(self, settings: Logging) -> None:
        self.settings = settings
        self.steps, self.seconds = 0, 0.0
        self.hosts: list[Any] = []

    def on_train_start(self, trainer: "Trainer") -> None:
        self.hosts = [None] * trainer.mesh.world
        dist.all_gather_object(self.hosts, socket.gethostname())

    def on_step_end(self, trainer: "Trainer", result: "StepResult") -> None:
        self.steps += 1
        if self.steps < self.settings.straggler_every:
            return
        mine = torch.zeros(trainer.mesh.world, dtype=torch.float64)
        mine[trainer.mesh.rank] = (trainer.stopwatch.seconds - self.seconds) / self.steps
        seconds = trainer.total(mine).tolist()
        usual = statistics.median_low(seconds)
        for rank in slow_ranks(seconds, self.settings.straggler_factor):
            ratio = seconds[rank] / usual
            text = (
                f"step {trainer.step} | rank {rank} on {self.hosts[rank]} is slow: {seconds[rank]:.3f} s of own work a "
                f"step, {ratio:.1f} times the median {usual:.3f} s of all ranks, over the last {self.steps} steps"
            )
            facts = {"rank": rank, "host": self.hosts[rank], "seconds": seconds[rank], "ratio": ratio}
            for callback in trainer.callbacks:
                callback.on_event(trainer, "straggler", text, facts)
        self.steps, self.seconds = 0, trainer.stopwatch.seconds


def slow_ranks(seconds: list[float], factor: float) -> list[int]:
    """The ranks above `factor` times the median, the slowest first. Of two ranks the faster is the measure."""
    usual = statistics.median_low(seconds)
    slow = [rank for rank, own in enumerate(seconds) if own > factor * usual]
    return sorted(slow, key=lambda rank: -seconds[rank])

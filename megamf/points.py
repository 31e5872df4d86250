"""Points that every rank of a run passes: signs of life for the watchdog, and the places of injected faults."""

from torch import nn

from megamf import faults
from megamf.heartbeat import beat


def reach(point: str, *, step: int | None = None, model: nn.Module | None = None) -> None:
    """This rank has come to `point` (one of faults.POINTS). `step`, the update in progress, holds until the next."""
    beat(point, step)
    faults.reach(point, step=step, model=model)

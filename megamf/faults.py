"""Faults on purpose: tests make a run fail at a named point. Inert unless MEGAMF_FAULTS is set.

MEGAMF_FAULTS is a JSON list of objects:

    at       one of POINTS
    action   one of ACTIONS
    rank     the rank that it happens on; every rank without it
    step     the update in progress (counted from 1, as in metrics.jsonl); every step without it
    after    how many matching passes go by first (0)
    times    how often it happens in this process (1; 0: always)
    seconds  of `sleep`
    factor   of `scale`

Each fault counts its own passes in each process; a process that is started again starts again.
"""

import errno
import json
import os
import signal
import time
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from megamf.errors import UserError

# In the order of a run. `loss` is the one point with a value; `save.shard` comes before every tensor of a rank's files.
POINTS = (
    "start",
    "load",
    "data",
    "forward",
    "dispatch",
    "loss",
    "backward",
    "gradients",
    "step",
    "evaluation",
    "save.begin",
    "save.shard",
    "save.manifest",
    "save.rename",
    "save.latest",
    "end",
)
SIGNALS = {"kill": "SIGKILL", "stop": "SIGSTOP", "term": "SIGTERM", "usr1": "SIGUSR1", "int": "SIGINT"}
ERRORS = {"full_disk": errno.ENOSPC, "read_only": errno.EROFS}
# `nan` at `loss` makes the loss of one micro batch NaN, at `backward` one element of one gradient behind a good loss.
ACTIONS = (*SIGNALS, *ERRORS, "raise", "sleep", "nan", "scale")
DEFAULTS = {"rank": None, "step": None, "after": 0, "times": 1, "seconds": 0.0, "factor": 1.0}
WITH_VALUE = {"nan": ("loss", "backward"), "scale": ("loss",)}


class InjectedFault(RuntimeError):
    """What the action `raise` raises."""


def parse(environment: Mapping[str, str]) -> list[dict[str, Any]] | None:
    """The faults that MEGAMF_FAULTS asks for, None without it. Raises UserError for what it does not know."""
    text = environment.get("MEGAMF_FAULTS")
    if not text:
        return None
    try:
        faults = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"MEGAMF_FAULTS is no JSON ({error}): {text[:80]!r}") from None
    if not isinstance(faults, list) or not all(isinstance(fault, dict) for fault in faults):
        raise UserError(f"MEGAMF_FAULTS is a JSON list of objects, not {text[:80]!r}")
    for fault in faults:
        unknown = fault.keys() - DEFAULTS.keys() - {"at", "action"}
        if unknown:
            raise UserError(f"MEGAMF_FAULTS: unknown key {min(unknown)!r}; known: at, action, {', '.join(DEFAULTS)}")
        for key, known in (("at", POINTS), ("action", ACTIONS)):
            if fault.get(key) not in known:
                raise UserError(f"MEGAMF_FAULTS: {key}={fault.get(key)!r} is none of {', '.join(known)}")
        places = WITH_VALUE.get(fault["action"], POINTS)
        if fault["at"] not in places:
            raise UserError(f"MEGAMF_FAULTS: {fault['action']} happens at {' or '.join(places)}, not {fault['at']}")
    return [DEFAULTS | fault | {"passed": 0, "happened": 0} for fault in faults]


_faults = parse(os.environ)
_step: int | None = None


def reach(point: str, *, step: int | None = None, model: nn.Module | None = None) -> None:
    """This process has come to `point`; what was asked for happens here. `step` holds until another is told.

    `nan` needs `model`: the gradient that the next backward pass gives its first trained parameter gets a NaN.
    """
    if _faults is None:
        return
    for fault in _due(point, step):
        if fault["action"] == "nan":
            _spoil_gradient(model)
        else:
            _happen(fault, point)


def spoil(point: str, value: Tensor) -> Tensor:
    """`value`, or what a fault asked for here makes of it (`nan`, `scale`); other actions happen as in `reach`."""
    if _faults is None:
        return value
    for fault in _due(point, None):
        if fault["action"] == "nan":
            value = value * float("nan")
        elif fault["action"] == "scale":
            value = value * fault["factor"]
        else:
            _happen(fault, point)
    return value


def _due(point: str, step: int | None) -> list[dict[str, Any]]:
    """The faults that happen now; counts this pass."""
    global _step
    _step = _step if step is None else step
    rank = int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0)
    due = []
    for fault in _faults:
        if fault["at"] != point or fault["rank"] not in (None, rank) or fault["step"] not in (None, _step):
            continue
        fault["passed"] += 1
        if fault["passed"] > fault["after"] and (fault["times"] == 0 or fault["happened"] < fault["times"]):
            fault["happened"] += 1
            due.append(fault)
    return due


def _happen(fault: dict[str, Any], point: str) -> None:
    action = fault["action"]
    if action in SIGNALS:
        os.kill(os.getpid(), getattr(signal, SIGNALS[action]))
    elif action in ERRORS:
        raise OSError(ERRORS[action], os.strerror(ERRORS[action]))
    elif action == "raise":
        raise InjectedFault(f"asked for at {point}, step {_step}")
    elif action == "sleep":
        time.sleep(fault["seconds"])


def _spoil_gradient(model: nn.Module) -> None:
    # A hook, because DeepSpeed takes gradients away as they come.
    parameter = next(parameter for parameter in model.parameters() if parameter.requires_grad)

    def spoil_once(gradient: Tensor) -> Tensor:
        handle.remove()
        gradient = gradient.clone()
        gradient.view(-1)[0] = float("nan")
        return gradient

    handle = parameter.register_hook(spoil_once)

"""Adapters in a checkpoint: what they are of, the weights with them folded in, and a plain checkpoint of these.

Shapes: D input width, F output width, r rank. Stored are A [D, r] and B [r, F] of every expert (y = x W + s x A B), and
A [r, D] and B [F, r] of a linear layer (y = x (W + s B A)^T).
"""

import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from megamf.adapt.lora import NAMES, adapter_shapes, is_adapter, scaling
from megamf.checkpoint import MASTER, WEIGHTS, Checkpoint, check_space, full_name, list_steps, save
from megamf.checkpoint.layout import expert_name, split_expert
from megamf.config import ModelConfig
from megamf.config.run import Tune
from megamf.errors import UserError

ADVICE = "make a plain checkpoint of it first: megamf checkpoint fold"


@dataclass(frozen=True)
class Adapters:
    """The adapters of one checkpoint: the section `tune` of its run, and logical key -> shape of each tensor."""

    tune: Tune
    shapes: dict[str, tuple[int, ...]]

    def on(self, key: str) -> bool:
        """Whether the weight with this logical key is adapted."""
        return f"{key.removesuffix('.weight')}.{NAMES[0]}" in self.shapes


def adapters_of(checkpoint: Checkpoint) -> Adapters | None:
    """The adapters of a checkpoint, None where it has none.

    Raises UserError where its state does not say what they are, or where they do not fit its model.
    """
    stored = {key: shape for key, shape in checkpoint.logical_shapes().items() if is_adapter(key)}
    if not stored:
        return None
    tree = checkpoint.state.get("config", {}).get("tune", {})
    try:
        tune, model = Tune.model_validate(tree), ModelConfig.model_validate(checkpoint.model)
    except ValidationError as error:
        raise UserError(
            f"{checkpoint.path} holds {len(stored)} adapter tensors, but its state does not say what they are: "
            f"{error.errors()[0]['msg']}"
        ) from None
    expected = adapter_shapes(model, tune) if tune.strategy == "lora" else {}
    wrong = sorted(key for key in stored.keys() | expected.keys() if stored.get(key) != expected.get(key))
    if wrong:
        key = wrong[0]
        raise UserError(
            f"{checkpoint.path}: its adapters are not those of its model with tune.strategy={tune.strategy}, "
            f"lora_rank={tune.lora_rank}, lora_targets={tune.lora_targets}: {len(wrong)} of {len(stored)} differ, "
            f"first {key}: {stored.get(key, 'missing')}, expected {expected.get(key, 'none')}"
        )
    return Adapters(tune, stored)


def refuse_adapters(checkpoint: Checkpoint, what: str) -> None:
    """Raise UserError, with what to do, for a checkpoint with adapters."""
    if any(is_adapter(key) for key in checkpoint.logical_shapes()):
        raise UserError(
            f"{checkpoint.path} has adapters (tune.strategy=lora): to {what}, {ADVICE} {checkpoint.path} OUT"
        )


def check_adapters(checkpoint: Checkpoint, tune: Tune, *, begins: bool) -> None:
    """Raise UserError, with both values, unless a run with this section can go on with the checkpoint's adapters.

    begins: it takes the weights alone, and makes adapters where there are none.
    """
    found = adapters_of(checkpoint)
    if found is None:
        if tune.strategy == "lora" and not begins:
            before = checkpoint.state.get("config", {}).get("tune", {}).get("strategy", "full")
            raise UserError(
                f"{checkpoint.path} was trained with tune.strategy={before} and has no adapters, this run says lora: "
                f"start a new run from its weights with checkpoint.init_from={checkpoint.path}"
            )
        return
    if tune.strategy != "lora":
        raise UserError(
            f"{checkpoint.path} has adapters (tune.strategy=lora), this run says tune.strategy={tune.strategy}: to "
            f"train it so, {ADVICE} {checkpoint.path} OUT"
        )
    for key in ("lora_rank", "lora_alpha", "lora_targets"):
        before, now = getattr(found.tune, key), getattr(tune, key)
        if before != now:
            raise UserError(
                f"{checkpoint.path} has adapters with tune.{key}={before}, this run says {now}: keep it, or {ADVICE} "
                f"{checkpoint.path} OUT, and start a new run from that with checkpoint.init_from"
            )


def folded(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float, *, experts: bool) -> torch.Tensor:
    """The weight with its adapter in it, in float32 (float64 for float64); experts: one expert's [D, F]."""
    # In double precision, so that what is stored is rounded once.
    product = a.double() @ b.double() if experts else b.double() @ a.double()
    return (weight.double() + scale * product).to(torch.promote_types(weight.dtype, torch.float32))


class FoldingReader:
    """Weights of a checkpoint by stored name or logical key, those that are adapted with their adapters in them."""

    def __init__(self, checkpoint: Checkpoint, adapters: Adapters) -> None:
        self.checkpoint, self.adapters = checkpoint, adapters

    def read(self, name: str) -> torch.Tensor | None:
        """float32 (float64 for float64); None where nothing is on this weight."""
        split = split_expert(name)
        key, suffix = (name, "") if split is None else (split[0], f".{split[1]}")
        if not self.adapters.on(key):
            return None
        prefix = key.removesuffix(".weight")
        shape = self.adapters.shapes[f"{prefix}.{NAMES[0]}"]
        experts = len(shape) == 3
        if experts and split is None:
            return torch.stack([self.read(expert_name(key, index)) for index in range(shape[0])])
        a, b = (self._best(f"{prefix}.{part}{suffix}") for part in NAMES)
        return folded(self._best(name), a, b, scaling(self.adapters.tune), experts=experts)

    def _best(self, name: str) -> torch.Tensor:
        return self.checkpoint.tensor(name, MASTER if self.checkpoint.has(name, MASTER) else WEIGHTS)


def fold(source: Checkpoint, out: Path, *, on_tensor: Callable[[int, int], None] | None = None) -> Path:
    """Write a checkpoint below `out` whose weights are those of `source` with its adapters in them; no moments.

    Names and dtypes are those of the base model; of weights in low precision that were adapted there are fp32 masters
    too. `on_tensor(done, total)` counts tensors; at most one and a file's buffer are in memory. Returns the step
    directory. Raises UserError where there are no adapters and where `out` already holds checkpoints.
    """
    out = Path(out)
    adapters = adapters_of(source)
    if adapters is None:
        raise UserError(f"{source.path} has no adapters: there is nothing to fold")
    if list_steps(out):
        raise UserError(f"{out} already holds checkpoints: name another folder")
    reader = FoldingReader(source, adapters)
    names = [name for name in source.names() if not is_adapter((split_expert(name) or (name,))[0])]
    check_space(out.absolute().parent, source.num_bytes([WEIGHTS, MASTER]))

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for done, name in enumerate(names, start=1):
            dtype, value = source.dtype(name), reader.read(name)
            if value is None:
                yield full_name(name, WEIGHTS), source.tensor(name)
                if source.has(name, MASTER):
                    yield full_name(name, MASTER), source.tensor(name, MASTER)
            else:
                yield full_name(name, WEIGHTS), value.to(dtype)
                if value.dtype != dtype:
                    yield full_name(name, MASTER), value
            if on_tensor is not None:
                on_tensor(done, len(names))

    run = uuid.uuid4().hex
    state = _state(source, adapters.tune) | {"run_id": run}
    return save(out, source.step, tensors(), state, source.modules, source.model, run_id=run)


def _state(source: Checkpoint, tune: Tune) -> dict[str, Any]:
    """What is known of the run, without what only its own optimizer could go on with."""
    kept = {key: value for key, value in source.state.items() if key not in ("optimizer_step", "guard")}
    kept["config"] = {key: value for key, value in source.state["config"].items() if key != "tune"}
    origin = {"format": "megamf checkpoint", "name": source.path.name, "run_id": source.manifest.run_id}
    if isinstance(source.state.get("origin"), dict):
        origin["before"] = source.state["origin"]
    done = {"job": "fold", "rank": tune.lora_rank, "alpha": tune.lora_alpha, "targets": tune.lora_targets}
    return kept | {"origin": origin | {"edit": done}}

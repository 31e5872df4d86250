"""A checkpoint with other modules in it: streamed tensor by tensor into a new one, moments and router rows included.

Shapes: E modules of a place, D width, F expert width, G router width.
"""

import re
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch

from megamf.adapt.fold import refuse_adapters
from megamf.checkpoint import Checkpoint, check_space, list_steps, save
from megamf.checkpoint.layout import EXP_AVG, EXP_AVG_SQ, expert_name, full_name, module_id
from megamf.checkpoint.schema import Module
from megamf.config import ModelConfig
from megamf.errors import UserError
from megamf.evaluate.weights import CheckpointWeights
from megamf.modularity.places import PARTS, Place, places, with_counts

MOMENTS = (EXP_AVG, EXP_AVG_SQ)


@dataclass(frozen=True)
class Kept:
    """A module that stays: its index in the source.

    output_scale: its output weights are multiplied by this; the moments of their gradients go along.
    """

    index: int
    output_scale: float = 1.0


@dataclass(frozen=True)
class Made:
    """A module that is not in the source. Its moments are zero.

    weight(part): `experts` [D, F] or `output_experts` [F, D]. row(): of the router. Both in any floating dtype.
    origin: where it comes from, for the module table.
    """

    weight: Callable[[str], torch.Tensor]
    row: Callable[[], torch.Tensor]
    provenance: Literal["inserted", "merged"]
    origin: str


Arrangement = Mapping[Place, Sequence[Kept | Made]]


def model_of(checkpoint: Checkpoint) -> ModelConfig:
    """The architecture of a checkpoint. Raises UserError where its model.json is none."""
    with CheckpointWeights(checkpoint.path) as weights:
        return weights.model


def module_counts(model: ModelConfig) -> dict[Place, int]:
    """Place -> number of modules."""
    return {place: model.num_experts(place.layer, place.kind) for place in places(model)}


def rearrange(
    source: Checkpoint,
    out: Path,
    arrangement: Arrangement,
    *,
    what: dict[str, Any],
    on_tensor: Callable[[int, int], None] | None = None,
) -> Path:
    """Write `source` with the modules of `arrangement` (places not named stay as they are) below `out`.

    what: what was done, plain JSON, for the state's `origin`. `on_tensor(done, total)` counts tensors. At most one
    tensor and the files' buffers are in memory. The source is not touched, and nothing stays of a failed attempt.
    Returns the step directory. Raises UserError where a place would be left with fewer modules than a token uses,
    where `out` already holds checkpoints, and where the disk is full.
    """
    refuse_adapters(source, "change its modules")
    model = model_of(source)
    whole = {place: [Kept(i) for i in range(count)] for place, count in module_counts(model).items()}
    unknown = sorted(set(arrangement) - set(whole))
    if unknown:
        raise UserError(f"{source.path} has no {unknown[0]}")
    wanted = {place: list(arrangement.get(place, slots)) for place, slots in whole.items()}
    _check_kept(source, wanted, whole)
    new_model = with_counts(model, {place: len(slots) for place, slots in wanted.items()})
    out = Path(out)
    if list_steps(out):
        raise UserError(f"{out} already holds checkpoints: name another folder")
    run = uuid.uuid4().hex
    state = _state(source, new_model, what, run)
    tensors = _Stream(source, model, wanted, on_tensor)
    with leaving_nothing(out):
        check_space(out, tensors.num_bytes())
        return save(
            out,
            source.step,
            iter(tensors),
            state,
            _table(source, wanted, run),
            new_model.model_dump(mode="json"),
            run_id=run,
        )


@contextmanager
def leaving_nothing(out: Path) -> Iterator[None]:
    """A folder that was not there before is not there after a failure either."""
    existed = out.exists()
    try:
        yield
    except BaseException:
        if not existed and out.exists() and not any(out.iterdir()):
            out.rmdir()
        raise


def _check_kept(source: Checkpoint, wanted: Arrangement, whole: Arrangement) -> None:
    for place, slots in wanted.items():
        kept = [slot.index for slot in slots if isinstance(slot, Kept)]
        outside = [index for index in kept if index >= len(whole[place]) or index < 0]
        if outside or len(set(kept)) < len(kept):
            raise UserError(
                f"{source.path}, {place}: modules {sorted(kept)} cannot be kept; it has 0..{len(whole[place]) - 1}"
            )


def _state(source: Checkpoint, model: ModelConfig, what: dict[str, Any], run: str) -> dict[str, Any]:
    """The state of the source, so that a run can go on from the edit, with the new model and where it comes from."""
    state = dict(source.state)
    if isinstance(state.get("config"), dict) and "model" in state["config"]:
        state["config"] = state["config"] | {"model": model.model_dump(mode="json")}
    origin = {"format": "megamf checkpoint", "name": source.path.name, "run_id": source.manifest.run_id}
    if isinstance(source.state.get("origin"), dict):
        origin["before"] = source.state["origin"]
    return state | {"run_id": run, "origin": origin | {"edit": what}}


def _table(source: Checkpoint, wanted: Arrangement, run: str) -> list[Module]:
    before = {(Place(row.layer, row.kind), row.index): row for row in source.modules}
    inserted = 1 + max((row.generation for row in source.modules), default=0)
    rows = []
    for place, slots in sorted(wanted.items()):
        for index, slot in enumerate(slots):
            if isinstance(slot, Kept):
                row = before.get((place, slot.index))
                if row is None:
                    raise UserError(f"{source.path}: the module table has no module {slot.index} of {place}")
                rows.append(row.model_copy(update={"index": index}))
                continue
            # Numbers of removed modules are not known here: the run makes the id unique for good.
            name = f"{module_id(place.layer, place.kind, index)}-{run[:8]}"
            rows.append(
                Module(
                    layer=place.layer,
                    kind=place.kind,
                    index=index,
                    id=name,
                    provenance=slot.provenance,
                    origin=slot.origin,
                    generation=inserted if slot.provenance == "inserted" else 0,
                )
            )
    return rows


class _Stream:
    """The tensors of the new checkpoint in turn: (full name, tensor)."""

    def __init__(
        self,
        source: Checkpoint,
        model: ModelConfig,
        wanted: Arrangement,
        on_tensor: Callable[[int, int], None] | None,
    ) -> None:
        self.source, self.wanted, self.on_tensor = source, wanted, on_tensor
        self.experts = {key: (place, part) for place in wanted for key, part in zip(place.expert_keys(), PARTS)}
        self.rows = {place.rows_key(model): place for place in wanted}

    def num_bytes(self) -> int:
        """Of all tensors."""
        total = 0
        for group in self.source.groups:
            for key, shape in self.source.logical_shapes(group).items():
                expert = self.experts.get(key)
                name = key if expert is None else self._first(group, key)
                if expert is not None:
                    shape = (len(self.wanted[expert[0]]), *shape[1:])
                total += prod(shape) * self.source.dtype(name, group).itemsize
        return total

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        steps = [(group, key) for group in self.source.groups for key in self.source.logical_shapes(group)]
        total = sum(len(self._slots(group, key)) if key in self.experts else 1 for group, key in steps)
        done = 0
        for group, key in steps:
            for item in self._tensors(group, key):
                yield item
                done += 1
                if self.on_tensor is not None:
                    self.on_tensor(done, total)

    def _first(self, group: str, key: str) -> str:
        """Name of a stored module of this expert tensor; in other groups than the weights the first may be missing."""
        names = (expert_name(key, index) for index in range(self.source.logical_shapes(group)[key][0]))
        return next(name for name in names if self.source.has(name, group))

    def _slots(self, group: str, key: str) -> list[tuple[int, Kept | Made]]:
        """(index, slot) of every module that the group has, or gets: one that was not trained has no moments."""
        return [
            (index, slot)
            for index, slot in enumerate(self.wanted[self.experts[key][0]])
            if isinstance(slot, Made) or self.source.has(expert_name(key, slot.index), group)
        ]

    def _tensors(self, group: str, key: str) -> Iterator[tuple[str, torch.Tensor]]:
        if key in self.experts:
            place, part = self.experts[key]
            shape, dtype = self.source.logical_shapes(group)[key], self.source.dtype(self._first(group, key), group)
            for index, slot in self._slots(group, key):
                if isinstance(slot, Kept):
                    tensor = self.source.tensor(expert_name(key, slot.index), group)
                    if part == "output_experts" and slot.output_scale != 1:
                        # Where outputs are to stay as they are, a weight s times as large has a gradient 1/s as large.
                        power = {EXP_AVG: -1, EXP_AVG_SQ: -2}.get(group, 1)
                        tensor = (tensor.float() * slot.output_scale**power).to(tensor.dtype)
                else:
                    made = None if group in MOMENTS else slot.weight(part)
                    tensor = _fitting(made, shape[1:], dtype, f"a module for {place}, {part}")
                yield full_name(expert_name(key, index), group), tensor
            return
        tensor = self.source.tensor(key, group)
        if key in self.rows:
            place = self.rows[key]
            rows = []
            for slot in self.wanted[place]:
                if isinstance(slot, Kept):
                    rows.append(tensor[slot.index])
                else:
                    made = None if group in MOMENTS else slot.row()
                    rows.append(_fitting(made, tensor.shape[1:], tensor.dtype, f"a router row for {place}"))
            tensor = torch.stack(rows)
        yield full_name(key, group), tensor


def _fitting(made: torch.Tensor | None, shape: Sequence[int], dtype: torch.dtype, what: str) -> torch.Tensor:
    """`made` in the stored dtype, or zeros for a moment."""
    if made is None:
        return torch.zeros(tuple(shape), dtype=dtype)
    if tuple(made.shape) != tuple(shape):
        raise UserError(f"{what} has shape {list(made.shape)}, this model needs {list(shape)}")
    return made.detach().to("cpu", dtype).contiguous()


_ID = re.compile(r"[A-Za-z0-9.-]+")


def find_modules(source: Checkpoint, ids: Sequence[str]) -> dict[Place, set[int]]:
    """The places and indices of modules named by id. Raises UserError for ids that are unknown or doubled."""
    of = {row.id: (Place(row.layer, row.kind), row.index) for row in source.modules}
    unknown = [name for name in ids if name not in of]
    if unknown:
        some = ", ".join(list(of)[:3])
        shown = unknown[0] if _ID.fullmatch(unknown[0]) else repr(unknown[0])
        raise UserError(f"{source.path} has no module {shown}; its {len(of)} modules are {some}, ...")
    found: dict[Place, set[int]] = {}
    for name in ids:
        place, index = of[name]
        found.setdefault(place, set()).add(index)
    return found

"""What the modules of a model do on given data: how often each is chosen, with which gate, and how sharply.

Shapes: B windows, T tokens, N = B*T, D width, E modules of a place, K chosen by a token.
Source: the ModuleFormer paper, section on fine-tuning and compressing (f_m), and its mutual-information loss.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megamf.checkpoint import Checkpoint
from megamf.checkpoint.layout import MANIFEST
from megamf.data.indexed import IndexedDataset
from megamf.errors import UserError
from megamf.evaluate.perplexity import Windows
from megamf.model import ModuleFormer
from megamf.model.router import Routing
from megamf.modularity.places import Kind, Place, places
from megamf.modularity.streamed import layer_by_layer


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModuleUse(_Strict):
    """One module. frequency: share of tokens that chose it. mean_gate: over these tokens (0 if there are none).
    mean_prob: of the router's softmax over all tokens."""

    layer: int = Field(ge=0)
    kind: Kind
    index: int = Field(ge=0)
    frequency: float = Field(ge=0, le=1)
    mean_gate: float = Field(ge=0, le=1)
    mean_prob: float = Field(ge=0, le=1)


class RouterUse(_Strict):
    """One router, in nats. entropy: H(m) of the mean probabilities; conditional_entropy: mean H(m|x);
    mutual_information: their difference."""

    layer: int = Field(ge=0)
    kind: Kind
    entropy: float
    conditional_entropy: float
    mutual_information: float


class Statistics(_Strict):
    """Of one model on one dataset; modules in the order of their places and indices."""

    data: str
    tokens: int = Field(ge=1)
    modules: list[ModuleUse]
    routers: list[RouterUse]

    def frequencies(self) -> dict[Place, list[float]]:
        """f_m of every place."""
        found: dict[Place, list[float]] = {}
        for module in self.modules:
            found.setdefault(Place(module.layer, module.kind), []).append(module.frequency)
        return found

    def relative_load(self) -> dict[Place, list[float]]:
        """f_m over the largest f_m of the same layer and kind."""
        return {place: [f / (max(fs) or 1.0) for f in fs] for place, fs in self.frequencies().items()}

    def check(self, counts: dict[Place, int]) -> None:
        """Raise UserError, naming the place, unless these are the statistics of a model with these modules."""
        own = {place: len(values) for place, values in self.frequencies().items()}
        for place in sorted(own.keys() | counts.keys()):
            if own.get(place, 0) != counts.get(place, 0):
                raise UserError(
                    f"the statistics are of another model: {place} has {own.get(place, 0)} modules in them "
                    f"and {counts.get(place, 0)} in the checkpoint"
                )


class StatisticsFile(BaseModel):
    """What `megamf modules show --json` writes, as far as others read it.

    manifest: `fingerprint` of the checkpoint that was looked at; None of a folder of another format.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    checkpoint: str
    manifest: str | None = None
    statistics: list[Statistics]

    def check(self, path: Path, checkpoint: Checkpoint) -> None:
        """Raise UserError where the file `path` holds statistics of another checkpoint than this one."""
        own = fingerprint(checkpoint)
        if self.manifest not in (None, own):
            raise UserError(
                f"{path} holds statistics of another checkpoint: {self.checkpoint} with manifest {self.manifest[:12]}; "
                f"{checkpoint.path} has {own[:12]}. Make them anew: megamf modules show {checkpoint.path} --json"
            )


def fingerprint(checkpoint: Checkpoint) -> str:
    """sha256 of the manifest, which has the checksums of everything else."""
    return hashlib.sha256((checkpoint.path / MANIFEST).read_bytes()).hexdigest()


def read_statistics(path: Path) -> StatisticsFile:
    """The datasets in a file written by `megamf modules show --json`. Raises UserError where it is none."""
    try:
        return StatisticsFile.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        what = str(error)
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            what = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise UserError(f"{path} is no file of module statistics: {what}") from None


@dataclass
class _Sums:
    count_E: torch.Tensor
    gate_E: torch.Tensor
    prob_E: torch.Tensor
    entropy: float = 0.0
    tokens: int = 0

    @classmethod
    def of(cls, num_experts: int) -> "_Sums":
        return cls(*(torch.zeros(num_experts, dtype=torch.float64) for _ in range(3)))

    def add(self, routing: Routing) -> None:
        expert_R = routing.expert_NK.flatten().cpu()
        gate_R = routing.gate_NK.flatten().double().cpu()
        self.count_E += expert_R.bincount(minlength=len(self.count_E))
        self.gate_E.index_add_(0, expert_R, gate_R)
        self.prob_E += routing.stats.prob_E.double().cpu()
        self.entropy += float(routing.stats.entropy)
        self.tokens += routing.expert_NK.shape[0]


@torch.no_grad()
def collect(
    model: ModuleFormer,
    prefix: str | Path,
    *,
    seq_len: int,
    batch: int,
    max_batches: int | None = None,
    on_batch: Callable[[int, int], None] | None = None,
) -> Statistics:
    """Run `model` (in evaluation mode) over the indexed dataset PREFIX, windows of `seq_len` as in evaluation.

    All data go through one layer before the next, see `layer_by_layer`; on_batch(done, total) counts batches times
    layers.

    Raises UserError for a model without modules, token ids outside its vocabulary and data without two tokens.
    """
    sums = {place: _Sums.of(model.config.num_experts(place.layer, place.kind)) for place in places(model.config)}
    with IndexedDataset(prefix) as dataset, _watching(model, sums):
        plan = list(batches(Windows(dataset, seq_len), batch, max_batches, model.config.vocab_size))
        layer_by_layer(model, plan, on_batch)
    if not plan:
        raise UserError(f"{prefix} holds fewer than two tokens: nothing to look at")
    return _statistics(str(prefix), sums)


def batches(windows: Windows, size: int, limit: int | None, vocab: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """input_BT and start_BT of every batch, without padding: a last window that is shorter stands alone."""
    for numbers in windows.batches(size, limit):
        rows = [_row(windows, number, vocab) for number in numbers]
        whole = [row for row in rows if len(row[0]) == windows.seq_len]
        for group in (whole, *([row] for row in rows if len(row[0]) < windows.seq_len)):
            if group:
                yield torch.stack([row[0] for row in group]), torch.stack([row[1] for row in group])


def _row(windows: Windows, number: int, vocab: int) -> tuple[torch.Tensor, torch.Tensor]:
    input_T, _, start_T = (torch.from_numpy(part) for part in windows[number])
    tokens = windows.dataset.num_tokens - 1 - number * windows.seq_len
    input_T, start_T = input_T[:tokens], start_T[:tokens]
    if int(input_T.max()) >= vocab or int(input_T.min()) < 0:
        raise UserError(
            f"{windows.dataset.prefix} holds token id {int(input_T.max())}, outside the model's vocabulary of {vocab}: "
            "it was prepared with another tokenizer"
        )
    return input_T, start_T


@contextmanager
def _watching(model: ModuleFormer, sums: dict[Place, _Sums]) -> Iterator[None]:
    """While this is open, every routing decision of the model adds to the sums of its place."""
    hooks = []
    for place, total in sums.items():
        router = model.get_submodule(f"{place.prefix}.gate")
        hooks.append(router.register_forward_hook(lambda _, __, routing, total=total: total.add(routing)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _statistics(name: str, sums: dict[Place, _Sums]) -> Statistics:
    modules, routers = [], []
    for place, total in sums.items():
        here: dict[str, Any] = {"layer": place.layer, "kind": place.kind}
        prob_E = total.prob_E / total.tokens
        for index, count in enumerate(total.count_E.tolist()):
            gate = total.gate_E[index].item() / count if count else 0.0
            modules.append(
                ModuleUse(
                    **here,
                    index=index,
                    frequency=count / total.tokens,
                    mean_gate=min(gate, 1.0),
                    mean_prob=min(prob_E[index].item(), 1.0),
                )
            )
        entropy = -sum(p * math.log(p) for p in prob_E.tolist() if p > 0)
        conditional = total.entropy / total.tokens
        routers.append(
            RouterUse(
                **here,
                entropy=entropy,
                conditional_entropy=conditional,
                mutual_information=entropy - conditional,
            )
        )
    return Statistics(data=name, tokens=next(iter(sums.values())).tokens, modules=modules, routers=routers)


def summary(statistics: Statistics, thresholds: Sequence[float] = (0.003, 0.03, 0.3)) -> list[dict[str, Any]]:
    """One row a place: largest and smallest f_m, share of modules below each threshold of the largest, nats."""
    load = statistics.relative_load()
    rows = []
    for router in statistics.routers:
        place = Place(router.layer, router.kind)
        frequencies = statistics.frequencies()[place]
        row = {"layer": router.layer, "kind": router.kind, "modules": len(frequencies)}
        row |= {"largest": max(frequencies), "smallest": min(frequencies)}
        row |= {f"below_{t:g}": sum(value < t for value in load[place]) / len(load[place]) for t in thresholds}
        rows.append(row | router.model_dump(include={"entropy", "conditional_entropy", "mutual_information"}))
    return rows

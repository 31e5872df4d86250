"""Cus-Prun: neurons that matter for no dimension of the expert that is wanted are removed, without training.

Source: Cus-Prun (arXiv 2506.02561). An expert is fixed along language, domain and task, or some of them; each is given
as a set of documents that hold it fixed and vary the rest. A neuron is irrelevant to a dimension where the change that
zeroing it makes is below a threshold on its documents; what is irrelevant to every dimension given is removed.

Free parameters, because the paper's values are not known: `share`, the share of a dimension's documents on which a
neuron must be below the threshold (1: on all of them); `scale`, whether the dimensions share one threshold of the
change itself (`value`) or of the rank among a dimension's neurons (`rank`); `relative`, whether changes are divided by
a norm of the stream that they are made in, that of the `document` or of its median `token` (the paper's formula has
`none`; without it nearly all attention of the first layers goes, because their stream is small).
The threshold is not set but found: the lowest score goes first until the ratio is met.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import ceil
from typing import Any

import torch
from torch import nn

from megamf.compress.neurons import (
    Keep,
    NeuronGroup,
    Scores,
    choose,
    neuron_groups,
    prunable_parameters,
    removed_parameters,
)
from megamf.compress.relevance import NORMS, QK_TOKENS, Impacts, impacts
from megamf.errors import UserError

DIMENSIONS = ("language", "domain", "task")
SCALES = ("value", "rank")
RELATIVE = (*NORMS, "none")
OF = ("prunable", "all")


@dataclass(frozen=True)
class Settings:
    """How much goes, of what, and when a neuron is irrelevant.

    ratio: share of the parameters that goes, `of` the matrices of attention and feed-forward layers (`prunable`, also
    where `attention` leaves some of them alone) or of the whole model (`all`).
    budget, multiple: see `neurons.choose`. attention, experts: see `neurons.neuron_groups`. share, scale, relative: see
    above. qk_tokens: tokens of a document that queries and keys are measured on.
    """

    ratio: float = 0.25
    of: str = "prunable"
    budget: str = "global"
    multiple: int = 1
    attention: str = "neurons"
    experts: str = "neurons"
    share: float = 1.0
    scale: str = "value"
    relative: str = "document"
    qk_tokens: int = QK_TOKENS

    def check(self) -> None:
        """Raises UserError for values that mean nothing; the others are met where they are used."""
        if not 0 <= self.ratio < 1:
            raise UserError(f"ratio={self.ratio} is outside [0, 1): it is the share of parameters that goes")
        if self.of not in OF:
            raise UserError(f"of={self.of!r} is not one of {', '.join(OF)}")
        if not 0 < self.share <= 1:
            raise UserError(f"share={self.share} is outside (0, 1]: it is a share of the documents")
        for name, choices in (("scale", SCALES), ("relative", RELATIVE)):
            if getattr(self, name) not in choices:
                raise UserError(f"{name}={getattr(self, name)!r} is not one of {', '.join(choices)}")


def over_documents(changes: Mapping[NeuronGroup, torch.Tensor], share: float = 1.0) -> dict[NeuronGroup, torch.Tensor]:
    """Changes [documents, count] -> the lowest threshold at which a neuron is below it on `share` of the documents."""
    found = {}
    for group, values in changes.items():
        place = ceil(share * values.shape[0])
        found[group] = values.kthvalue(place, dim=0).values
    return found


def ranks(scores: Scores) -> dict[NeuronGroup, torch.Tensor]:
    """Scores as the share of parameters that would go if everything up to this neuron went, in (0, 1]."""
    groups = list(scores)
    order = torch.cat([scores[group] for group in groups]).argsort(stable=True)
    weight = torch.cat([torch.full((group.count,), group.parameters, dtype=torch.float64) for group in groups])
    rank = torch.empty_like(weight)
    rank[order] = weight[order].cumsum(0) / weight.sum()
    parts = rank.float().split([group.count for group in groups])
    return dict(zip(groups, parts))


def intersect(dimensions: Mapping[str, Scores], scale: str = "value") -> dict[NeuronGroup, torch.Tensor]:
    """The lowest common threshold at which a neuron is irrelevant to every dimension.

    Raises UserError where there is no dimension, and for an unknown scale.
    """
    if not dimensions:
        raise UserError(f"no dimension is given: documents for at least one of {', '.join(DIMENSIONS)} are needed")
    if scale not in SCALES:
        raise UserError(f"scale={scale!r} is not one of {', '.join(SCALES)}")
    each = [scores if scale == "value" else ranks(scores) for scores in dimensions.values()]
    return {group: torch.stack([scores[group] for scores in each]).amax(0) for group in each[0]}


def dimension_scores(changes: Impacts, settings: Settings) -> dict[NeuronGroup, torch.Tensor]:
    """One dimension's scores: how much change a neuron makes on its documents."""
    values = changes.values if settings.relative == "none" else changes.relative(settings.relative)
    return over_documents(values, settings.share)


@dataclass(frozen=True)
class Selection:
    """`keep`: what stays. `scores`: what it was chosen by. `dimensions`: the scores of each of them."""

    keep: Keep
    scores: Scores
    dimensions: Mapping[str, Scores]


def select(
    model: nn.Module,
    documents: Mapping[str, Sequence[torch.Tensor]],
    settings: Settings,
    *,
    on_document: Callable[[int, int], None] | None = None,
) -> Selection:
    """The neurons that stay when the ratio of those irrelevant to every dimension goes; the model is not changed.

    documents: dimension -> token ids [T] of its documents; the names are free. Raises UserError for a dimension with
    fewer than two documents, and as `impacts`, `neuron_groups` and `choose` do.
    """
    settings.check()
    for name, rows in documents.items():
        if len(rows) < 2:
            raise UserError(f"{name} has {len(rows)} documents: at least 2 are needed to tell what they share")
    groups = neuron_groups(model, attention=settings.attention, experts=settings.experts)
    total, before = sum(map(len, documents.values())), 0
    dimensions = {}
    for name, rows in documents.items():

        def progress(done: int, _: int, before: int = before) -> None:
            if on_document is not None:
                on_document(before + done, total)

        changes = impacts(model, groups, rows, qk_tokens=settings.qk_tokens, on_document=progress)
        dimensions[name] = dimension_scores(changes, settings)
        before += len(rows)
    scores = intersect(dimensions, settings.scale)
    return Selection(keep_by(model, scores, settings), scores, dimensions)


def keep_by(model: nn.Module, scores: Scores, settings: Settings) -> Keep:
    """The neurons that stay when the lowest-scored ones go."""
    return choose(scores, list(scores), settings.ratio, settings.budget, settings.multiple, ratio_of(model, settings))


def ratio_of(model: nn.Module, settings: Settings) -> int:
    """The number of parameters that the ratio is a share of."""
    return model.num_parameters() if settings.of == "all" else prunable_parameters(neuron_groups(model))


def describe(model: nn.Module, selection: Selection, settings: Settings) -> dict[str, Any]:
    """What went, as a tree for JSON: ratio asked and reached, threshold, counts by layer and kind, overlap.

    `irrelevant`: how many neurons each dimension alone has below the threshold that was found (of value or of rank).
    """
    keep, groups = selection.keep, list(selection.keep)
    whole = ratio_of(model, settings)
    gone = {group: ~mask for group, mask in keep.items()}
    threshold = max((selection.scores[g][gone[g]].max().item() for g in groups if gone[g].any()), default=0.0)
    each = {n: s if settings.scale == "value" else ranks(s) for n, s in selection.dimensions.items()}
    return {
        "settings": asdict(settings),
        "ratio_asked": settings.ratio,
        "ratio_reached": removed_parameters(keep) / whole,
        "parameters": model.num_parameters(),
        "prunable_parameters": prunable_parameters(neuron_groups(model)),
        "removed_parameters": removed_parameters(keep),
        "threshold": threshold,
        "neurons": sum(group.count for group in groups),
        "removed_neurons": sum(int(mask.sum()) for mask in gone.values()),
        "irrelevant": {n: sum(int((s[g] <= threshold).sum()) for g in groups) for n, s in each.items()},
        "layers": layer_counts(keep),
    }


def layer_counts(keep: Mapping[NeuronGroup, torch.Tensor]) -> list[dict[str, Any]]:
    """For every layer: kind -> neurons there were and neurons that stay."""
    rows: dict[int, dict[str, Any]] = {}
    for group, mask in keep.items():
        row = rows.setdefault(group.layer, {"layer": group.layer})
        entry = row.setdefault(group.kind, {"count": 0, "kept": 0})
        entry["count"] += group.count
        entry["kept"] += int(mask.sum())
    return [rows[layer] for layer in sorted(rows)]

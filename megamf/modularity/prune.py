"""Which modules go: by how rarely they are used, by weight norm, at random, or by name.

Source: the ModuleFormer paper, section on fine-tuning and compressing. f_m over the largest f_m of the same layer and
kind (attention and MLP apart) is compared with a threshold tau; the modules below it are removed.

Gates are probabilities over all modules of a place and are not renormalised, in the released model and here. Without
modules that had a share p of the probability the gates of the others grow by 1 / (1 - p), also where those modules were
never chosen; it vanishes with p. `remaining_shares` has the mean of 1 - p: output weights scaled by it undo the growth,
for every token where p is the same for all, and on average otherwise.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from megamf.checkpoint import Checkpoint
from megamf.checkpoint.layout import expert_name
from megamf.config import ModelConfig
from megamf.errors import UserError
from megamf.model import ModuleFormer
from megamf.modularity.edit import module_counts
from megamf.modularity.places import PARTS, Place, module_size, places, top_k, with_counts
from megamf.modularity.statistics import Statistics
from megamf.plan.flops import count_parameters

Scores = Mapping[Place, Sequence[float]]
Keep = dict[Place, list[int]]


def norm_scores(source: Checkpoint, model: ModelConfig) -> dict[Place, list[float]]:
    """Root of the summed squares of a module's two matrices, over the largest of its place; reads every module once."""
    found = {}
    for place in places(model):
        norms = []
        for index in range(model.num_experts(place.layer, place.kind)):
            parts = (source.tensor(expert_name(key, index)) for key in place.expert_keys())
            norms.append(sum(part.double().square().sum().item() for part in parts) ** 0.5)
        found[place] = [norm / (max(norms) or 1.0) for norm in norms]
    return found


def random_scores(model: ModelConfig, seed: int) -> dict[Place, list[float]]:
    """Uniform in [0, 1), from (seed, place)."""
    found = {}
    for place, count in module_counts(model).items():
        digest = hashlib.blake2b(f"{seed}:{place}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        found[place] = torch.rand(count, generator=generator, dtype=torch.float64).tolist()
    return found


def keep_above(model: ModelConfig, scores: Scores, tau: float) -> Keep:
    """Modules whose score is at least tau; of a place where fewer than k have it, the k best stay.

    Raises UserError for a tau outside 0..1: scores are relative to the best of a place, so that one above 1 would
    empty every layer.
    """
    if not 0 <= tau <= 1:
        raise UserError(f"tau={tau} is outside 0..1: loads are relative to the layer's most used module")
    kept = {}
    for place, values in scores.items():
        best = sorted(range(len(values)), key=lambda i: (-values[i], i))[: top_k(model, place.kind)]
        kept[place] = sorted({*best, *(i for i, value in enumerate(values) if value >= tau)})
    return kept


def keep_share(model: ModelConfig, scores: Scores, share: float) -> Keep:
    """Without the lowest-scored modules of the whole model, as many as fit into `share` of its parameters.

    They go by rising score until the next one does not fit: what goes at one share goes at every larger one, and no
    better module goes to fill a small rest. No place is left with fewer than k. Raises UserError for a share outside
    0..1 or beyond what can go.
    """
    if not 0 <= share < 1:
        raise UserError(f"share={share} is outside [0, 1)")
    total = count_parameters(model).total
    possible = sum(
        (count - top_k(model, place.kind)) * module_size(model, place.kind)
        for place, count in module_counts(model).items()
    )
    if share * total > possible:
        raise UserError(
            f"share={share:g} of {total:,} parameters cannot go: with k modules left in every layer it is at most "
            f"{possible / total:.4f}"
        )
    kept = {place: list(range(len(values))) for place, values in scores.items()}
    budget = share * total
    order = sorted((value, place, i) for place, values in scores.items() for i, value in enumerate(values))
    for _, place, index in order:
        if len(kept[place]) == top_k(model, place.kind):
            continue
        budget -= module_size(model, place.kind)
        if budget < 0:
            break
        kept[place].remove(index)
    return kept


def keep_without(model: ModelConfig, gone: Mapping[Place, Iterable[int]]) -> Keep:
    """Everything but these modules."""
    return {
        place: [i for i in range(count) if i not in set(gone.get(place, ()))]
        for place, count in module_counts(model).items()
    }


def remaining_shares(statistics: Statistics, keep: Mapping[Place, Sequence[int]]) -> dict[Place, float]:
    """Place -> the mean probability of the modules `keep` together, on the data of `statistics`; 1 where all stay."""
    mean: dict[Place, list[float]] = {}
    for module in statistics.modules:
        mean.setdefault(Place(module.layer, module.kind), []).append(module.mean_prob)
    return {
        place: 1.0 if len(indices) == len(mean[place]) else sum(mean[place][i] for i in indices) / sum(mean[place])
        for place, indices in keep.items()
    }


@torch.no_grad()
def pruned_model(
    model: ModuleFormer, keep: Mapping[Place, Sequence[int]], output_scale: Mapping[Place, float] | None = None
) -> ModuleFormer:
    """A copy in memory with the modules `keep` (places not named stay whole); to measure before anything is written.

    `output_scale`: what the output weights of a place are multiplied by.
    """
    counts = module_counts(model.config)
    small = with_counts(model.config, {place: len(keep.get(place, range(count))) for place, count in counts.items()})
    with torch.device("meta"):
        pruned = ModuleFormer(small)
    state = dict(model.state_dict())
    for place, indices in keep.items():
        chosen = torch.tensor(list(indices), device=model.lm_head.weight.device)
        for key in (*place.expert_keys(), place.rows_key(model.config)):
            state[key] = state[key][chosen]
        scale = (output_scale or {}).get(place, 1.0)
        if scale != 1:
            outputs = place.expert_keys()[PARTS.index("output_experts")]
            state[outputs] = (state[outputs].float() * scale).to(state[outputs].dtype)
    pruned.load_state_dict(state, assign=True)
    return pruned.eval()


@dataclass(frozen=True)
class Point:
    """One point of the pruning curve. `loss` in nats a token, None where it was not measured."""

    setting: float
    attention: int
    mlp: int
    parameters: int
    pruned_share: float
    bytes: int
    flops_per_token: int
    loss: float | None = None


def point(model: ModelConfig, keep: Keep, setting: float, loss: float | None, itemsize: int, seq_len: int) -> Point:
    """What a model with these modules is like. flops_per_token: of a forward pass in rows of `seq_len` tokens."""
    from megamf.plan.flops import train_flops_per_token

    small = with_counts(model, {place: len(indices) for place, indices in keep.items()})
    total, left = count_parameters(model).total, count_parameters(small).total
    return Point(
        setting=setting,
        attention=sum(len(indices) for place, indices in keep.items() if place.kind == "attention"),
        mlp=sum(len(indices) for place, indices in keep.items() if place.kind == "mlp"),
        parameters=left,
        pruned_share=1 - left / total,
        bytes=left * itemsize,
        flops_per_token=train_flops_per_token(small, seq_len) // 3,
        loss=loss,
    )


def curve(
    model: ModelConfig,
    settings: Sequence[float],
    choose: Callable[[float], Keep],
    measure: Callable[[Keep], float] | None,
    *,
    itemsize: int,
    seq_len: int,
) -> list[Point]:
    """A point for every setting (tau or share); `measure` gives the loss of a selection of modules."""
    points = []
    for setting in settings:
        keep = choose(setting)
        loss = None if measure is None else measure(keep)
        points.append(point(model, keep, setting, loss, itemsize, seq_len))
    return points

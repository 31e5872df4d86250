"""Checkpoints averaged into one, task vectors added, and duplicate modules of one checkpoint made one.

Shapes: N tokens, E modules of a place, D width, F expert width, G router width.
"""

import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megamf.adapt.fold import refuse_adapters
from megamf.checkpoint import MASTER, WEIGHTS, Checkpoint, check_space, full_name, list_steps, save
from megamf.checkpoint.layout import expert_name
from megamf.errors import UserError
from megamf.model import ModuleFormer
from megamf.modularity.edit import Arrangement, Kept, Made, leaving_nothing, module_counts
from megamf.modularity.inputs import module_inputs
from megamf.modularity.places import PARTS, Place
from megamf.modularity.similarity import closest_pairs
from megamf.modularity.streamed import bring


def combine(
    checkpoints: Sequence[Checkpoint],
    coefficients: Sequence[float],
    out: Path,
    *,
    what: dict[str, Any],
    on_tensor: Callable[[int, int], None] | None = None,
) -> Path:
    """Write sum of coefficient times weights of checkpoints of one architecture below `out`; weights only, no moments.

    Sums are made in float64 from the best precision each checkpoint has, and stored as the first one's weights (and
    masters, where it has them). Model, module table and state are the first one's. Returns the step directory. Raises
    UserError where the checkpoints differ in shape, and where `out` already holds checkpoints.
    """
    first = checkpoints[0]
    if len(checkpoints) != len(coefficients):
        raise UserError(f"{len(checkpoints)} checkpoints and {len(coefficients)} coefficients: one for each")
    for checkpoint in checkpoints:
        refuse_adapters(checkpoint, "average it with others")
    for other in checkpoints[1:]:
        _check_alike(first, other)
    out = Path(out)
    if list_steps(out):
        raise UserError(f"{out} already holds checkpoints: name another folder")
    groups = [group for group in first.groups if group in (WEIGHTS, MASTER)]
    names = [(group, name) for group in groups for name in first.names(group)]

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for done, (group, name) in enumerate(names, start=1):
            total = sum(
                coefficient * _best(checkpoint, name).double()
                for checkpoint, coefficient in zip(checkpoints, coefficients)
            )
            yield full_name(name, group), total.to(first.dtype(name, group))
            if on_tensor is not None:
                on_tensor(done, len(names))

    run = uuid.uuid4().hex
    parents = [
        {"name": checkpoint.path.name, "run_id": checkpoint.manifest.run_id, "coefficient": coefficient}
        for checkpoint, coefficient in zip(checkpoints, coefficients)
    ]
    kept = {key: value for key, value in first.state.items() if key not in ("optimizer_step", "guard")}
    state = kept | {"run_id": run, "origin": {"format": "megamf checkpoints", "parents": parents, "edit": what}}
    origin = ", ".join(f"{parent['run_id'][:8]}/{parent['name']}" for parent in parents)
    table = [row.model_copy(update={"provenance": "merged", "origin": origin}) for row in first.modules]
    with leaving_nothing(out):
        check_space(out, first.num_bytes(groups))
        return save(out, first.step, tensors(), state, table, first.model, run_id=run)


def _check_alike(first: Checkpoint, other: Checkpoint) -> None:
    ours, theirs = first.logical_shapes(), other.logical_shapes()
    for key in sorted(ours.keys() | theirs.keys()):
        if ours.get(key) != theirs.get(key):
            raise UserError(
                f"{other.path} and {first.path} are not of one architecture: {key} is "
                f"{_shape(theirs.get(key))} and {_shape(ours.get(key))}"
            )
    identity = [[(row.layer, row.kind, row.index, row.id) for row in c.modules] for c in (first, other)]
    if identity[0] != identity[1]:
        differing = next((a, b) for a, b in zip(*identity) if a != b)
        raise UserError(
            f"{other.path} and {first.path} do not have the same modules: {differing[1][3]} stands where "
            f"{differing[0][3]} does; averages of unrelated modules mean nothing"
        )


def _shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else str(list(shape))


def _best(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    return checkpoint.tensor(name, MASTER if checkpoint.has(name, MASTER) else WEIGHTS)


def task_arithmetic(num_tasks: int, scales: Sequence[float]) -> list[float]:
    """Coefficients of (base, tuned_1, ...) for base + sum_i scale_i (tuned_i - base)."""
    if len(scales) not in (1, num_tasks):
        raise UserError(f"{num_tasks} tuned checkpoints and {len(scales)} scales: give one for all or one for each")
    scales = list(scales) * (num_tasks if len(scales) == 1 else 1)
    return [1.0 - sum(scales), *scales]


def group_duplicates(
    similarity: Mapping[Place, torch.Tensor], above: float, least: Mapping[Place, int]
) -> dict[Place, list[list[int]]]:
    """Place -> groups of two or more modules of which every two are more alike than `above`; most alike first.

    A place keeps at least `least` modules: groups that would leave fewer are not made.
    """
    found = {}
    for place, matrix in similarity.items():
        group_of: dict[int, list[int]] = {i: [i] for i in range(len(matrix))}
        left = len(matrix)
        for i, j, _ in closest_pairs(matrix, above):
            first, second = group_of[i], group_of[j]
            whole = [(a, b) for a in first for b in second]
            if first is second or left <= least[place] or any(float(matrix[a, b]) <= above for a, b in whole):
                continue
            merged = sorted(first + second)
            group_of.update(dict.fromkeys(merged, merged))
            left -= 1
        groups = {id(group): group for group in group_of.values() if len(group) > 1}
        if groups:
            found[place] = sorted(groups.values())
    return found


@torch.no_grad()
def merged_rows(
    model: ModuleFormer,
    prefix: str | Path,
    groups: Mapping[Place, Sequence[Sequence[int]]],
    *,
    seq_len: int,
    tokens: int,
) -> dict[tuple[Place, int], torch.Tensor]:
    """(place, first module of a group) -> the router row whose logits are closest to the group's summed probability.

    The least-squares fit of h.row to logsumexp of the group's logits, over tokens of PREFIX: the merged module gets
    the probability of all that it replaces. Raises UserError for `gmm` routers, whose logits are bounded.
    """
    if model.config.gate_type == "gmm":
        raise UserError("gate_type=gmm: rows of duplicates cannot be merged, its logits are bounded cosines")
    found = {}
    for place, x_ND in module_inputs(model, prefix, seq_len, tokens).items():
        if place not in groups:
            continue
        bring(model, place.layer)
        router = model.get_submodule(f"{place.prefix}.gate")
        h_NG = router.factors(x_ND)[0].double()
        logits_NE = router.logits(x_ND).double()
        # A little ridge: features that do not occur keep the mean of the old rows.
        rows_EG = router.expert_rows().double()
        ridge = 1e-6 * h_NG.square().sum() / h_NG.shape[1]
        gram = h_NG.t() @ h_NG + ridge * torch.eye(h_NG.shape[1], dtype=h_NG.dtype, device=h_NG.device)
        for group in groups[place]:
            mean_G = rows_EG[list(group)].mean(0)
            rest_N = logits_NE[:, list(group)].logsumexp(-1) - h_NG @ mean_G
            found[place, group[0]] = (mean_G + torch.linalg.solve(gram, h_NG.t() @ rest_N)).float().cpu()
    return found


def merge_duplicates(
    source: Checkpoint,
    model: ModuleFormer,
    groups: Mapping[Place, Sequence[Sequence[int]]],
    rows: Mapping[tuple[Place, int], torch.Tensor],
    shares: Mapping[Place, Sequence[float]],
) -> Arrangement:
    """The average of every group, weighted by use (`shares`), in the place of its first module."""
    ids = {(Place(row.layer, row.kind), row.index): row.id for row in source.modules}
    found: dict[Place, list[Kept | Made]] = {}
    for place, place_groups in groups.items():
        first_of = {group[0]: group for group in place_groups}
        gone = {index for group in place_groups for index in group[1:]}
        slots: list[Kept | Made] = []
        for index in range(module_counts(model.config)[place]):
            if index in first_of:
                group = list(first_of[index])
                origin = " + ".join(ids[place, member] for member in group)
                slots.append(_average(source, place, group, shares[place], rows[place, index], origin))
            elif index not in gone:
                slots.append(Kept(index))
        found[place] = slots
    return found


def _average(
    source: Checkpoint, place: Place, group: list[int], shares: Sequence[float], row: torch.Tensor, origin: str
) -> Made:
    weights = [max(shares[index], 1e-12) for index in group]
    total = sum(weights)

    def weight(part: str) -> torch.Tensor:
        key = place.expert_keys()[PARTS.index(part)]
        parts = (source.tensor(expert_name(key, index)).double() for index in group)
        return sum(share / total * value for share, value in zip(weights, parts))

    return Made(weight, lambda: row, "merged", origin)

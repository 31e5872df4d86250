"""Neurons into experts of one size: at random, by their weights, by what answers together.

Shapes: M neurons, E experts, D input width. A split is label_M (int64): the expert of every neuron; every expert has
exactly `size` of them.
"""

import importlib
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from megamf.errors import UserError

Split = Literal["random", "clustering", "coactivation"]
# Exact assignment takes cubic time; beyond this many neurons it is approached by swaps.
MOST_EXACT = 4096


def num_experts(num_neurons: int, size: int) -> int:
    """How many experts of `size` neurons. Raises UserError, naming sizes that fit, unless it divides."""
    if size < 1 or num_neurons % size or num_neurons == size:
        fits = [d for d in range(1, num_neurons) if num_neurons % d == 0]
        raise UserError(
            f"{num_neurons} neurons cannot be shared out to two or more experts of {size}; sizes that divide: "
            f"{', '.join(map(str, fits))}"
        )
    return num_neurons // size


def random_split(num_neurons: int, size: int, seed: int = 0) -> torch.Tensor:
    """A random balanced split."""
    count = num_experts(num_neurons, size)
    order = torch.randperm(num_neurons, generator=torch.Generator().manual_seed(seed))
    label_M = torch.empty(num_neurons, dtype=torch.int64)
    label_M[order] = torch.arange(count).repeat_interleave(size)
    return label_M


def cluster_split(rows_MD: torch.Tensor, size: int, seed: int = 0, iterations: int = 20) -> torch.Tensor:
    """Balanced k-means of the rows at length 1: neurons with like input weights together.

    Lloyd's iterations with equal sizes: greedy by regret while centres move, at the end the best assignment there is
    (see `assign`), until nothing changes. The split with the least sum of squared distances is returned.
    """
    count = num_experts(len(rows_MD), size)
    row_MD = F.normalize(rows_MD.float(), dim=-1)
    generator = torch.Generator().manual_seed(seed)
    centre_ED = row_MD[_spread(row_MD, count, generator)]
    best, best_cost = None, float("inf")
    label_M = torch.full((len(row_MD),), -1)
    exact_rounds = 2
    for round in range(iterations):
        exact = round >= iterations - exact_rounds
        cost_ME = torch.cdist(row_MD, centre_ED).square()
        new_M = assign(cost_ME, size) if exact else _greedy(cost_ME.numpy(), size)
        cost = cost_ME.gather(1, new_M[:, None]).sum().item()
        if cost < best_cost:
            best, best_cost = new_M, cost
        if exact and torch.equal(new_M, label_M):
            break
        label_M = new_M
        centre_ED = mean_rows(row_MD, label_M, count)
    assert best is not None
    return best


def mean_rows(row_MD: torch.Tensor, label_M: torch.Tensor, count: int) -> torch.Tensor:
    """Mean of the rows of every expert, [E, D]."""
    total_ED = row_MD.new_zeros(count, row_MD.shape[1]).index_add_(0, label_M, row_MD)
    return total_ED / torch.bincount(label_M, minlength=count)[:, None]


def _spread(row_MD: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """Rows to begin with: each drawn with probability proportional to its squared distance to those before."""
    first = torch.randint(len(row_MD), (1,), generator=generator)
    chosen = [first.item()]
    distance_M = (row_MD - row_MD[first]).square().sum(-1)
    while len(chosen) < count:
        weight_M = distance_M.clamp(min=1e-12)
        index = torch.multinomial(weight_M, 1, generator=generator)
        chosen.append(index.item())
        distance_M = torch.minimum(distance_M, (row_MD - row_MD[index]).square().sum(-1))
    return torch.tensor(chosen)


def assign(cost_ME: torch.Tensor, size: int) -> torch.Tensor:
    """label_M with `size` neurons an expert and the least total cost: exact up to MOST_EXACT neurons.

    Beyond, the greedy assignment is improved by swaps of two neurons until none helps.
    """
    cost = cost_ME.double().numpy()
    if len(cost) <= MOST_EXACT:
        optimize = _library("scipy.optimize", "scipy")
        _, slot_M = optimize.linear_sum_assignment(np.repeat(cost, size, axis=1))
        return torch.from_numpy(slot_M // size)
    label = _greedy(cost, size).numpy()
    for _ in range(20 * len(cost)):
        # gain[m, n] of a swap = what m saves in n's expert plus what n saves in m's
        save_ME = cost[np.arange(len(cost)), label][:, None] - cost
        best_EE = np.full((cost.shape[1],) * 2, -np.inf)
        who_EE = np.zeros_like(best_EE, dtype=np.int64)
        for e in range(cost.shape[1]):
            member = np.flatnonzero(label == e)
            who_EE[e] = member[save_ME[member].argmax(0)]
            best_EE[e] = save_ME[member].max(0)
        gain_EE = best_EE + best_EE.T
        np.fill_diagonal(gain_EE, -np.inf)
        e, f = np.unravel_index(gain_EE.argmax(), gain_EE.shape)
        if gain_EE[e, f] <= 1e-9:
            break
        label[[who_EE[e, f], who_EE[f, e]]] = f, e
    return torch.from_numpy(label)


def _greedy(cost_ME: np.ndarray, size: int) -> torch.Tensor:
    """Neurons that lose most by their second choice go first; each takes the nearest expert with room."""
    two = np.partition(cost_ME, 1, axis=1)[:, :2]
    room = np.full(cost_ME.shape[1], size)
    label = np.empty(len(cost_ME), dtype=np.int64)
    choices = cost_ME.argsort(axis=1)
    for m in np.argsort(two[:, 0] - two[:, 1], kind="stable"):
        label[m] = next(e for e in choices[m] if room[e])
        room[label[m]] -= 1
    return torch.from_numpy(label)


def coactivation_split(w_MM: torch.Tensor, size: int, seed: int = 0, neighbours: int = 64) -> torch.Tensor:
    """Partition of the co-activation graph into equal parts with little weight between them, by METIS.

    As in the published code, the edges below a threshold (the first non-zero one of the percentiles 10, 20, ... of all
    weights) are dropped and the weights become whole numbers in units of it. Beyond that, only the `neighbours`
    heaviest edges of either end stay, which keeps graphs sparse where every pair answers together. METIS balances
    to a few neurons: those with the weakest ties to an over-full part move to the part with room that they are tied
    to most.
    """
    metis = _library("pymetis", "pymetis")
    count = num_experts(len(w_MM), size)
    edge_MM = graph(w_MM, neighbours)
    links = [np.flatnonzero(row) for row in edge_MM]
    start = np.concatenate([[0], np.cumsum([len(link) for link in links])])
    # The total of all weights must fit the 32 bit numbers of METIS.
    scale = min(1.0, 2**30 / max(1.0, float(edge_MM.sum())))
    weight = np.concatenate([np.maximum(row[link] * scale, 1) for row, link in zip(edge_MM, links)]).astype(np.int64)
    options = metis.Options(seed=seed)
    _, parts = metis.part_graph(
        count,
        xadj=start.tolist(),
        adjncy=np.concatenate(links).tolist(),
        eweights=weight.tolist(),
        options=options,
    )
    return torch.from_numpy(_balanced(np.array(parts), w_MM.numpy(), count, size))


def graph(w_MM: torch.Tensor, neighbours: int) -> np.ndarray:
    """Whole numbers [M, M], symmetric: the edges of the graph that is partitioned."""
    w = w_MM.double().numpy()
    upper = w[np.triu_indices(len(w), 1)]
    levels = np.percentile(upper, range(10, 101, 10))
    above = levels[levels > 0]
    if not len(above):
        raise UserError("no two neurons answer together on this text: there is no graph to split; give more text")
    edge = np.floor(w / (0.99 * above[0]))
    if neighbours < len(w) - 1:
        nth = np.partition(edge, len(w) - neighbours, axis=1)[:, len(w) - neighbours]
        keep = edge >= np.maximum(nth, 1)[:, None]
        edge = np.where(keep | keep.T, edge, 0)
    return edge


def _balanced(label_M: np.ndarray, w_MM: np.ndarray, count: int, size: int) -> np.ndarray:
    room = size - np.bincount(label_M, minlength=count)
    tie_ME = np.stack([w_MM[:, label_M == e].sum(1) for e in range(count)], axis=1)
    for e in np.flatnonzero(room < 0):
        member = np.flatnonzero(label_M == e)
        for m in member[np.argsort(tie_ME[member, e], kind="stable")][: -room[e]]:
            to = max(np.flatnonzero(room > 0), key=lambda f: tie_ME[m, f])
            label_M[m] = to
            room[to] -= 1
        room[e] = 0
    return label_M


def _library(module: str, package: str):
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        raise UserError(f"this split needs the package {package}: pip install {package} (or megamf[moefy])") from None

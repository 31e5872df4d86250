"""Splits: balanced whatever comes, the best assignment there is, planted groups found again."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megamf.compress.moefication import split as module
from megamf.compress.moefication.split import assign, cluster_split, coactivation_split, num_experts, random_split
from megamf.compress.moefication.statistics import active, coactivation
from megamf.errors import UserError


def planted(groups, size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    label = torch.arange(groups).repeat_interleave(size)
    return label[torch.randperm(groups * size, generator=generator)], generator


def same_partition(one, two):
    return all(len(set(two[one == value].tolist())) == 1 for value in one.unique())


@settings(max_examples=15, deadline=None)
@given(st.integers(2, 6), st.integers(1, 6), st.integers(0, 5))
def test_every_split_is_balanced(groups, size, seed):
    generator = torch.Generator().manual_seed(seed)
    M = groups * size
    rows = torch.randn(M, 5, generator=generator)
    h = torch.relu(torch.randn(32, M, generator=generator))
    splits = [random_split(M, size, seed), cluster_split(rows, size, seed)]
    if size > 1:
        splits += [coactivation_split(coactivation(h, kind, True), size, seed) for kind in ("product", "binary")]
    for label_M in splits:
        assert label_M.dtype == torch.int64
        assert torch.bincount(label_M, minlength=groups).tolist() == [size] * groups


def test_one_row_over_and_over_is_still_shared_out():
    label_M = cluster_split(torch.ones(12, 3), 4)
    assert torch.bincount(label_M).tolist() == [4, 4, 4]


@pytest.mark.parametrize("most_exact", [4096, 0])
def test_assignment_against_all_there_are(monkeypatch, most_exact):
    monkeypatch.setattr(module, "MOST_EXACT", most_exact)
    for seed in range(5):
        cost = torch.rand(6, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        orders = set(itertools.permutations((0, 0, 1, 1, 2, 2)))
        best = min(sum(cost[m, e].item() for m, e in enumerate(order)) for order in orders)
        label = assign(cost, 2)
        found = sum(cost[m, e].item() for m, e in enumerate(label))
        assert torch.bincount(label).tolist() == [2, 2, 2]
        # Swaps of two end at the optimum or a little above.
        assert found == pytest.approx(best) if most_exact else best - 1e-9 <= found <= best + 0.3


def test_clusters_of_weights_are_found():
    label, generator = planted(5, 8)
    centre = torch.randn(5, 20, generator=generator)
    rows = centre[label] + 0.1 * torch.randn(40, 20, generator=generator)
    assert same_partition(label, cluster_split(rows, 8))


@pytest.mark.parametrize("kind", ["product", "binary"])
def test_neurons_that_answer_together_are_found(kind):
    label, generator = planted(4, 8)
    h = torch.zeros(400, 32)
    for row in h:
        group = torch.randint(4, (1,), generator=generator)
        row[label == group] = torch.rand(8, generator=generator) + 0.5
    # One at a time for `binary`: groups that follow each other within a batch are no ties.
    assert same_partition(label, coactivation_split(coactivation(h, kind, True), 8))


def test_coactivation_by_definition():
    h = torch.relu(torch.randn(20, 6, generator=torch.Generator().manual_seed(0)))
    product, binary = np.zeros((6, 6)), np.zeros((6, 6))
    for n, m in itertools.permutations(range(6), 2):
        product[n, m] = sum(float(row[n] * row[m]) for row in h)
        binary[n, m] = sum(any(row[n] > 0 and row[m] > 0 for row in h[s : s + 8]) for s in range(0, 20, 8))
    assert np.allclose(coactivation(h, "product", True), product, atol=1e-5)
    assert np.array_equal(coactivation(h, "binary", True).numpy(), binary)
    assert active(torch.tensor([[1.0, -3.0, 0.5, 0.1]]), False).tolist() == [[False, True, False, False]]


def test_the_same_seed_gives_the_same_split():
    assert torch.equal(random_split(64, 8, 3), random_split(64, 8, 3))
    assert not torch.equal(random_split(64, 8, 3), random_split(64, 8, 4))


def test_refusals():
    with pytest.raises(UserError, match=r"30 neurons cannot be shared out .* sizes that divide: 1, 2, 3, 5, 6, 10, 15"):
        num_experts(30, 32)
    with pytest.raises(UserError, match="no two neurons answer together"):
        coactivation_split(torch.zeros(8, 8), 4)

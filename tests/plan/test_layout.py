"""Layouts: which are possible, which fit, which is fastest."""

from itertools import pairwise

import pytest

from megamf.config import load_config
from megamf.plan.cluster import Cluster
from megamf.plan.layout import divisors, remedies, search, vary, warnings
from megamf.plan.predict import predict

GIB = 2**30


@pytest.fixture(scope="module")
def config():
    return load_config(preset="molm-700m-8b")


def test_the_ranking_holds_the_layouts_that_fit_fastest_first(config):
    ranked = search(config, Cluster.of("h100", 8, 8))
    times = [found.time.total for found in ranked]
    assert all(found.fits for found in ranked) and len(ranked) > 10
    assert all(later >= 0.99 * sooner for sooner, later in pairwise(times))
    assert {found.job.ep for found in ranked} <= {1, 2, 4, 8, 16}
    # Masters are needed in bf16: stage 0 is refused by the run.
    assert all(found.job.engine.stage > 0 for found in ranked)


def test_a_roomy_device_needs_no_expert_parallelism(config):
    assert search(config, Cluster.of("h100", 8, 8))[0].job.ep == 1


def test_little_memory_asks_for_expert_parallelism(config):
    small = search(config, Cluster.of("h100", 8, 8, memory=18 * GIB))
    assert small and all(found.job.ep > 1 or found.job.engine.stage == 3 for found in small)
    assert search(config, Cluster.of("h100", 8, 8, memory=GIB)) == []


def test_what_does_not_fit_is_told_with_what_to_change(config):
    cluster = Cluster.of("h100", 8, 8)
    found = predict(vary(config, micro_batch=48, activation_checkpointing="none"), cluster)
    assert not found.fits
    near = remedies(found)
    assert near and all(item.fits for item in near)
    said = " ".join(warnings(found))
    assert "does not fit" in said and near[0].overrides in said


def test_experts_over_nodes_are_warned_about(config):
    assert any(
        "reaches over nodes" in said for said in warnings(predict(vary(config, ep=16), Cluster.of("h100", 8, 8)))
    )
    assert not any("reaches over nodes" in said for said in warnings(predict(config, Cluster.of("h100", 8, 8))))


def test_dense_models_have_one_degree():
    ranked = search(load_config(preset="dense-350m"), Cluster.of("h100", 1, 8))
    assert {found.job.ep for found in ranked} == {1}


def test_divisors():
    assert divisors(12) == [1, 2, 3, 4, 6, 12]

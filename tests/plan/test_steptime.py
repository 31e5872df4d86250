"""The time formula against arithmetic by hand."""

import pytest

from megamf.config import load_config
from megamf.plan import train_flops_per_token
from megamf.plan.cluster import Cluster
from megamf.plan.job import Job
from megamf.plan.steptime import days, forward_flops, hardware_flops, step_mfu, step_time


def job(num_ranks=1, *overrides, preset="nano"):
    return Job.of(load_config(preset=preset, overrides=["train.global_batch=64", *overrides]), num_ranks)


@pytest.mark.parametrize("preset", ["nano", "molm-700m-8b", "dense-350m"])
def test_without_recomputation_a_device_does_the_models_flops(preset):
    plain = ["train.activation_checkpointing=none", "train.loss_chunk=100000", "losses.scope=micro_batch"]
    laid_out = job(8, *plain, preset=preset)
    per_token = train_flops_per_token(laid_out.model, laid_out.config.train.seq_len)
    assert hardware_flops(laid_out) * 8 == pytest.approx(per_token * laid_out.tokens_a_step, rel=1e-3)


def test_recomputation_costs_what_is_computed_again():
    more = ["losses.scope=micro_batch"]
    parts = forward_flops(job())
    plain, experts, full = (
        hardware_flops(job(1, *more, f"train.activation_checkpointing={mode}")) / job().accumulation
        for mode in ("none", "experts", "full")
    )
    assert experts - plain == pytest.approx(parts["mlp"])
    assert full - plain == pytest.approx(sum(parts.values()) - parts["head"])


def test_exact_statistics_with_accumulation_cost_a_forward_pass():
    exact, cheap = (hardware_flops(job(1, f"losses.scope={scope}")) for scope in ("global_batch", "micro_batch"))
    parts = forward_flops(job())
    assert exact - cheap == pytest.approx(job().accumulation * (sum(parts.values()) - parts["head"]))


def test_a_perfect_device_alone_reaches_the_assumed_efficiency():
    cluster = Cluster.of("h100", 1, 1, efficiency=0.5, memory_bandwidth=1e18)
    laid_out = job(1, "losses.scope=micro_batch")
    time = step_time(laid_out, cluster)
    assert time.communication == 0.0
    assert step_mfu(laid_out, cluster, time.total) == pytest.approx(0.5, rel=1e-2)


def test_slower_links_cost_time_and_overlap_hides_some():
    near = step_time(job(8), Cluster.of("h100", 1, 8))
    far = step_time(job(8), Cluster.of("h100", 8, 1))
    assert far.zero > near.zero > 0
    assert (near.products, near.elementwise) == (far.products, far.elementwise)


def test_days_are_tokens_over_speed():
    laid_out = job(1)
    assert days(laid_out.tokens_a_step * 86400, laid_out, 2.0) == pytest.approx(2.0)

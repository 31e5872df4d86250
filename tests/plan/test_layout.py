"""Layouts: which are possible, which fit, which one is recommended."""

import pytest

from megamf.config import ConfigError, load_config
from megamf.plan import layouts, recommend

GIB = 2**30


def test_a_roomy_device_needs_no_expert_parallelism():
    found = layouts(load_config(preset="molm-700m-8b"), 64, 80 * GIB)
    best = recommend(found)
    assert (best.ep, best.zero_stage) == (1, 1)
    assert {layout.ep for layout in found} == {1, 2, 4, 8, 16}


def test_less_memory_asks_for_stage_two_and_then_for_expert_parallelism():
    config = load_config(preset="molm-700m-8b", overrides=["train.micro_batch=1"])
    found = layouts(config, 64, 80 * GIB)
    by_name = {(layout.ep, layout.zero_stage): layout.memory.total for layout in found}
    assert by_name[1, 1] > by_name[1, 2] > by_name[2, 2]
    for just_too_small, wanted in (((1, 1), (1, 2)), ((1, 2), (2, 2))):
        device = int((by_name[just_too_small] - 1) / 0.9)
        best = recommend(layouts(config, 64, device))
        assert (best.ep, best.zero_stage) == wanted


def test_stage_zero_is_for_fp32():
    stages = [{x.zero_stage for x in layouts(load_config(preset=p), 2, 80 * GIB)} for p in ("nano", "molm-350m-4b")]
    assert stages == [{0, 1, 2}, {1, 2}]


def test_nothing_fits_a_tiny_device():
    assert recommend(layouts(load_config(preset="molm-700m-8b"), 64, GIB)) is None


def test_dense_models_have_one_degree():
    assert {layout.ep for layout in layouts(load_config(preset="dense-350m"), 8, 80 * GIB)} == {1}


@pytest.mark.parametrize(("ranks", "ep", "message"), [(6, 4, "world size 6"), (12, 12, "n_att_experts=16")])
def test_an_impossible_degree_is_refused(ranks, ep, message):
    with pytest.raises(ConfigError, match=message):
        layouts(load_config(preset="molm-700m-8b"), ranks, 80 * GIB, eps=[ep])

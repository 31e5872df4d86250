"""Every figure of the suite is measured; sizes here are small, so the values mean nothing."""

import math

import torch

from megamf.bench import cpu
from megamf.bench.memory import attention_memory_ratio
from megamf.config import ModelConfig
from megamf.ops.stickbreaking import DEFAULT_STOP


def test_attention_reports_both_and_their_ratio():
    ticks = []
    figures = cpu.attention(1, 2, 32, 16, "_t32", 2, lambda: ticks.append(1), formula=True)
    values = {figure.name: figure.value for figure in figures}
    timed = ("stickbreaking", "stickbreaking_early_stop", "sdpa", "naive")
    assert values.keys() == {f"{name}_t32_ms" for name in timed} | {"stickbreaking_vs_sdpa_t32"}
    assert values["stickbreaking_vs_sdpa_t32"] == values["stickbreaking_t32_ms"] / values["sdpa_t32_ms"]
    assert len(ticks) == 4


def test_one_training_step_updates_every_parameter():
    torch.manual_seed(0)
    model = ModelConfig(
        vocab_size=40, n_layer=1, n_embd=16, att_hidden=16, ffd_hidden=16, n_att_experts=2, n_mlp_experts=2, k_att=1,
        k_mlp=1, gating_size=8,
    )  # fmt: skip
    step = cpu.training_step(model, 2, 32)
    cells = dict(zip(step.__code__.co_freevars, (cell.cell_contents for cell in step.__closure__)))
    parameters = list(cells["objective"].model.parameters())
    before = [parameter.detach().clone() for parameter in parameters]
    step()
    assert all(not torch.equal(old, new) for old, new in zip(before, parameters))


def test_no_key_is_passed_over_where_figures_have_limits():
    usual = dict(DEFAULT_STOP)
    with cpu.every_key():
        assert set(DEFAULT_STOP.values()) == {0.0}
    assert usual == DEFAULT_STOP


def test_memory_ratio_sees_what_attention_allocates():
    # Output and three gradients are four of the four tensors it is measured in; a T x T matrix would make it 128.
    ratio = attention_memory_ratio(1, 2, 4096, 32)
    assert math.isfinite(ratio)
    assert 0.5 < ratio < 16

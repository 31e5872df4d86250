"""Every figure of the suite is measured; sizes here are small, so the values mean nothing."""

import math

from megamf.bench import cpu
from megamf.bench.memory import attention_memory_ratio


def names_of(figures: list) -> dict[str, float]:
    assert all(math.isfinite(figure.value) and figure.value >= 0 for figure in figures)
    return {figure.name: figure.value for figure in figures}


def test_attention_reports_both_and_their_ratio():
    ticks = []
    values = names_of(cpu.attention(1, 2, 32, 16, "_t32", 2, lambda: ticks.append(1), formula=True))
    timed = ("stickbreaking", "stickbreaking_early_stop", "sdpa", "naive")
    assert values.keys() == {f"{name}_t32_ms" for name in timed} | {"stickbreaking_vs_sdpa_t32"}
    assert values["stickbreaking_vs_sdpa_t32"] == values["stickbreaking_t32_ms"] / values["sdpa_t32_ms"]
    assert len(ticks) == 4


def test_large_heads_against_their_products():
    values = names_of(cpu.large_heads(64, 128, 2, 2, lambda: None))
    assert values["stickbreaking_vs_gemm"] == values["stickbreaking_c1024_ms"] / values["gemms_c1024_ms"]


def test_stopping_is_faster_and_changes_next_to_nothing():
    values = names_of(cpu.exhaustion(1, 2, 2048, 16, 8, 2, lambda: None))
    assert values["exhaustion_speedup"] > 2
    assert 0 < values["exhaustion_error"] < 1e-6


def test_permutation_and_experts():
    figures = cpu.permutation(64, 16, 4, 2, 2, lambda: None) + cpu.experts(32, 16, 32, 4, 2, 2, lambda: None)
    values = names_of(figures)
    assert {"permute_vs_copy", "unpermute_vs_copy", "experts_vs_dense"} <= values.keys()
    assert values["experts_vs_dense"] == values["dense_ms"] / values["experts_ms"]


def test_every_bar_is_declared():
    """The limits that the suite enforces, wherever it is run."""
    source = [
        *cpu.attention(1, 1, 8, 4, "", 1, lambda: None),
        *cpu.large_heads(8, 16, 2, 1, lambda: None),
        *cpu.exhaustion(1, 1, 64, 4, 4, 1, lambda: None),
        *cpu.permutation(8, 8, 2, 2, 1, lambda: None),
        *cpu.experts(8, 16, 16, 2, 2, 1, lambda: None),
    ]
    limits = {f.name: (f.at_most, f.at_least) for f in source if f.kept is not None}
    assert limits == {
        "stickbreaking_vs_sdpa": (1.3, None),
        "stickbreaking_vs_gemm": (0.8, None),
        "exhaustion_speedup": (None, 6.0),
        "exhaustion_error": (1e-6, None),
        "permute_vs_copy": (None, 0.6),
        "unpermute_vs_copy": (None, 0.6),
        "experts_vs_dense": (None, 0.75),
    }


def test_memory_ratio_sees_what_attention_allocates():
    # Output and three gradients are four of the four tensors it is measured in; a T x T matrix would make it 128.
    ratio = attention_memory_ratio(1, 2, 4096, 32)
    assert math.isfinite(ratio)
    assert 0.5 < ratio < 16

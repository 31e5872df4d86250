"""The `comm` suite with a tiny model on one and two processes; the values mean nothing, their relations do."""

import math

import pytest

from megamf.bench.comm import answering, run

TINY = {
    "vocab_size": 40, "n_layer": 1, "n_embd": 16, "n_head": 1, "att_hidden": 16, "ffd_hidden": 16, "n_att_experts": 2,
    "n_mlp_experts": 2, "k_att": 1, "k_mlp": 1, "gating_size": 8,
}  # fmt: skip


@pytest.mark.slow
def test_cases_of_one_and_two_processes():
    ticks = []
    result = run(lambda what: lambda: ticks.append(what), repeats=2, worlds=(1, 2), model=TINY, seq_len=16)
    assert ticks == ["turns"] * 4
    values = {figure.name: figure.value for figure in result.figures}
    assert all(math.isfinite(value) and value > 0 for value in values.values())
    for case in ("no_ep", "ep_tokens", "ep_weights"):
        speed = values[f"p2_{case}_tokens_per_second"]
        assert values[f"p2_{case}_efficiency"] == pytest.approx(speed / values["p1_tokens_per_second"])
        kinds = [values.get(f"p2_{case}_{kind}_share", 0.0) for kind in ("all_to_all", "reduce", "gather")]
        assert values[f"p2_{case}_comm_share"] == pytest.approx(sum(kinds)) and sum(kinds) < 1
        assert (kinds[0] > 0) == (case != "no_ep"), "rows travel only where experts are split"
    # 32 rows, 64 values there and back, forward and backward; 2 x 2 x 16 x 16 weights, three times; half leaves.
    assert values["p2_ep_tokens_attention_mb"] == pytest.approx(32 * 64 * 2 * 4 / 2 / 1e6)
    assert values["p2_ep_weights_attention_mb"] == pytest.approx(1024 * 12 / 2 / 1e6)


def test_a_rank_that_fails_is_told(tmp_path):
    command = ["sh", "-c", "echo no luck >&2; exit $RANK"]
    with (
        pytest.raises(RuntimeError, match=r"group of 2 processes ended early\n(.|\n)*rank 1: no luck"),
        answering(command, 2, {}, tmp_path) as ask,
    ):
        ask("case")

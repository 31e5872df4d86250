"""Bytes of attention experts by either strategy, counted by hand, and the choice between them."""

import pytest

from megamf.config import ConfigError, load_config
from megamf.parallel.traffic import Traffic, attention_expert_bytes, attention_strategy

SMALL = [
    "model.n_layer=3", "model.n_embd=8", "model.att_hidden=6", "model.n_head=1", "model.n_att_experts=4",
    "model.k_att=2", "train.seq_len=10", "train.micro_batch=1", "train.global_batch=4", "parallel.ep=2",
]  # fmt: skip


def traffic(*overrides: str, ranks: int = 4) -> Traffic:
    return attention_expert_bytes(load_config(overrides=[*SMALL, *overrides]), ranks)


def test_by_hand():
    # 20 rows; 8 there, 6 back, for the queries; 6 there, 8 back, for the outputs; forward and backward; half leaves.
    assert traffic().tokens == 3 * 20 * (8 + 6 + 6 + 8) * 2 * 4 // 2
    # Two projections of 4 x 8 x 6, gathered twice and scattered once; half leaves.
    assert traffic().weights == 3 * 2 * (4 * 8 * 6) * (4 + 4 + 4) // 2


def test_low_precision_scatters_gradients_in_float32():
    one, other = traffic(), traffic("train.precision=bf16", "deepspeed=zero1")
    assert other.tokens * 2 == one.tokens
    assert other.weights * 12 == one.weights * 8


def test_passes():
    one = traffic()
    again = traffic("train.activation_checkpointing=full")
    assert (again.tokens * 2, again.weights) == (one.tokens * 3, one.weights)
    # On two ranks two micro batches, each with a pass ahead, unless the loss does not ask for one.
    twice = traffic("losses.scope=rank", ranks=2)
    assert twice == (2 * one.tokens, 2 * one.weights)
    ahead = traffic(ranks=2)
    assert (ahead.tokens * 2, ahead.weights * 3) == (twice.tokens * 3, twice.weights * 4)


def test_nothing_travels_without_expert_parallelism():
    assert traffic("parallel.ep=1") == (0, 0)
    assert attention_strategy(load_config(overrides=[*SMALL, "parallel.ep=1"]), 4) == "move_tokens"


def test_fewer_bytes_decide():
    few, many = load_config(overrides=SMALL), load_config(overrides=[*SMALL, "train.seq_len=1000"])
    assert attention_strategy(few, 4) == "move_tokens" and attention_strategy(many, 4) == "gather_weights"
    asked = load_config(overrides=[*SMALL, "parallel.attention_experts=gather_weights"])
    assert attention_strategy(asked, 4) == "gather_weights"


@pytest.mark.parametrize("strategy", ["move_tokens", "gather_weights"])
def test_a_strategy_without_ranks_to_travel_between_is_refused(strategy):
    with pytest.raises(ConfigError, match=f"parallel.attention_experts={strategy} needs parallel.ep above 1"):
        load_config(overrides=[f"parallel.attention_experts={strategy}"])

"""Bytes of collectives counted by hand for a model of round sizes."""

import pytest

from megamf.config import load_config
from megamf.parallel.traffic import attention_expert_bytes
from megamf.plan.job import Job
from megamf.plan.traffic import collectives

# 2 layers, width 8, attention width 8 (K = V), hidden 16, 4 attention and 8 MLP experts, top 2, rows of 32.
MODEL = [
    "model.vocab_size=16", "model.n_layer=2", "model.n_embd=8", "model.att_hidden=8", "model.ffd_hidden=16",
    "model.n_att_experts=4", "model.n_mlp_experts=8", "model.gating_size=4", "train.seq_len=32",
    "train.micro_batch=2", "train.global_batch=16", "losses.scope=micro_batch", "parallel.attention_experts=auto",
]  # fmt: skip
MOVED = ["parallel.ep=4", "parallel.attention_experts=move_tokens"]
TOKENS = 64  # of one micro batch
EXPERTS = 2 * (4 * 2 * 8 * 8 + 8 * 2 * 8 * 16)


def job(num_ranks, *overrides):
    return Job.of(load_config(preset="nano", overrides=[*MODEL, *overrides]), num_ranks)


def sizes(found):
    return {item.name: (item.calls, item.sent, item.group.size) for item in found}


def test_one_rank_talks_to_nobody():
    assert collectives(job(1)) == []


def test_rows_travel_to_their_experts_and_back_once_a_direction():
    found = sizes(collectives(job(4, *MOVED)))
    # 2 micro batches x 2 layers; half of 3/4 of 64 tokens x 2 copies x 8 values x 4 bytes ...
    row = TOKENS * 2 * 8 * 4 * 3 / 4
    # ... forward and backward: MLP out and back; attention twice, once to the queries, once to the outputs.
    assert found["MLP experts: rows"] == (2 * 2 * 4, row, 4)
    assert found["attention experts: rows of width n_embd"] == (2 * 2 * 4, row, 4)
    assert found["attention experts: rows of width att_hidden"] == (2 * 2 * 4, row, 4)
    assert found["split sizes"][0] == 2 * 2 * 2


def test_recomputing_everything_repeats_the_forward_exchanges():
    plain, again = (
        sizes(collectives(job(4, *MOVED, f"train.activation_checkpointing={mode}"))) for mode in ("none", "full")
    )
    name = "MLP experts: rows"
    assert again[name][0] == plain[name][0] * 3 / 2
    experts = sizes(collectives(job(4, *MOVED, "train.activation_checkpointing=experts")))
    assert experts == plain


def test_the_busiest_rank_is_apart_from_the_mean():
    item = next(i for i in collectives(job(4, "parallel.ep=4"), imbalance=1.5) if i.name == "MLP experts: rows")
    assert item.busiest == 1.5 * item.sent


def test_gradients_are_summed_over_all_who_hold_the_weight():
    shared = job(4).counts.shared
    zero = [sizes(collectives(job(4, "parallel.ep=2", f"deepspeed=zero{stage}"))) for stage in (0, 1, 2)]
    # A ring moves (n - 1) / n of the bytes twice; experts have 2 replicas of a half each.
    assert zero[0]["gradients, shared"] == (1, 2 * 4 * shared * 3 / 4, 4)
    assert zero[0]["gradients, experts"] == (1, 2 * 4 * EXPERTS / 2 / 2, 2)
    assert zero[1]["gradients, shared"] == zero[0]["gradients, shared"]
    # Stage 2 after each of the two micro batches.
    assert zero[2]["gradients, shared"] == (2, 2 * 4 * shared * 3 / 4, 4)
    assert "ZeRO: weights, shared" not in zero[0]
    calls, sent, _ = zero[1]["ZeRO: weights, shared"]
    assert calls * sent == 4 * shared * 3 / 4


def test_experts_of_one_replica_need_no_sum():
    assert "gradients, experts" not in sizes(collectives(job(4, "parallel.ep=4")))


def test_low_precision_sums_in_four_bytes_and_spreads_in_two():
    found = sizes(collectives(job(4, "train.precision=bf16")))
    shared = job(4).counts.shared
    assert found["gradients, shared"][1] == 2 * 4 * shared * 3 / 4
    calls, sent, _ = found["ZeRO: weights, shared"]
    assert calls * sent == 2 * shared * 3 / 4


@pytest.mark.parametrize("strategy", ["move_tokens", "gather_weights"])
@pytest.mark.parametrize("mode", ["none", "full"])
@pytest.mark.parametrize("scope", ["micro_batch", "global_batch"])
def test_attention_experts_move_what_the_run_counts_on(strategy, mode, scope):
    laid_out = job(4, "parallel.ep=4", f"parallel.attention_experts={strategy}", f"losses.scope={scope}",
                   f"train.activation_checkpointing={mode}")  # fmt: skip
    moved = [item for item in collectives(laid_out) if item.name.startswith("attention experts")]
    both = attention_expert_bytes(laid_out.config, 4)
    assert sum(item.bytes for item in moved) == (both.tokens if strategy == "move_tokens" else both.weights)


def test_a_split_sequence_gathers_keys_and_adds_their_gradients_in_full_precision():
    found = sizes(collectives(job(4, "parallel.context=2", "train.precision=bf16")))
    # 4 micro batches (2 data ranks) x 2 layers; half of 64 tokens from the other rank, K = V of 8 values.
    # Keys come for both passes.
    assert found["context: keys and values"] == (16, 32 * 8 * 2, 2)
    assert found["context: their gradients"] == (8, 32 * 8 * 4, 2)


def test_a_dense_model_has_no_exchange():
    config = load_config(preset="dense-350m", overrides=["train.global_batch=64"])
    names = sizes(collectives(Job.of(config, 8)))
    assert set(names) == {"gradients, shared", "ZeRO: weights, shared", "counts, losses and norms"}

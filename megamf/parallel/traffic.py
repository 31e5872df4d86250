"""Bytes that expert parallelism moves in attention, by formula, and the strategy that moves fewer.

Letters: P expert-parallel ranks, N tokens of a micro batch on a rank, K experts a token, R = N*K routed copies,
E attention experts, D model width, A attention width.
"""

from typing import Literal, NamedTuple

from megamf.config import RunConfig

Strategy = Literal["move_tokens", "gather_weights"]


class Traffic(NamedTuple):
    """Bytes that one rank sends in one optimizer step, for the attention experts of all layers, by either strategy."""

    tokens: int
    weights: int


def attention_expert_bytes(config: RunConfig, num_ranks: int) -> Traffic:
    """What `config` sends on each of `num_ranks` ranks, all micro batches of a step together; zeros where ep is 1.

    Tokens, evenly routed: either of the two projections sends R rows there (D, then A wide) and back (A, then D), so
    2 R (D + A) values a forward pass and as many a backward pass; all but 1/P of them leave the rank.

    Weights: a forward pass gathers 2 E D A values, a backward pass gathers them again and scatters their gradients,
    which are added up in float32; a rank sends (P - 1)/P of each. Recomputed blocks send tokens once more; weights
    they gather once for both, so nothing is added.

    The pass that finds the sums of the global batch (`losses.scope=global_batch` with accumulation) counts as a
    forward pass.
    """
    model, train, ranks = config.model, config.train, config.parallel.ep
    if not model.sparse or ranks == 1:
        return Traffic(0, 0)
    accumulation = config.accumulation_steps(num_ranks)
    value_bytes = 2 if train.precision == "bf16" else 4
    looks_ahead = int(config.losses.scope == "global_batch" and accumulation > 1)
    recomputes = int(train.activation_checkpointing == "full")

    rows = train.micro_batch * train.seq_len // config.parallel.context * model.k_att
    token_bytes = 2 * rows * (model.n_embd + model.att_hidden) * value_bytes * (2 + looks_ahead + recomputes)
    # Every rank sends as many slots as the largest share has experts.
    slots = sum(-(-model.num_experts(layer, "attention") // ranks) for layer in range(model.n_layer))
    values = 2 * slots * model.n_embd * model.att_hidden
    weight_bytes = values * (value_bytes * (2 + looks_ahead) + 4)

    times = accumulation * (ranks - 1)
    return Traffic(token_bytes * model.n_layer * times // ranks, weight_bytes * times)


def attention_strategy(config: RunConfig, num_ranks: int) -> Strategy:
    """What `parallel.attention_experts` means on `num_ranks` ranks; "auto": what moves fewer bytes, tokens if equal."""
    if config.parallel.attention_experts != "auto":
        return config.parallel.attention_experts
    traffic = attention_expert_bytes(config, num_ranks)
    return "gather_weights" if traffic.weights < traffic.tokens else "move_tokens"

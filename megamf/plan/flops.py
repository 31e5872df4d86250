"""Parameter counts and training FLOPs by formula, exact to the parameter, without building a model.

Letters: `D` model width, `A` attention width, `F` expert hidden, `E` experts, `K` top-k, `G` router width,
`V` vocabulary, `T` sequence length, `L` layers.
"""

from dataclasses import dataclass

from megamf.config import ModelConfig


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of one model by kind, summed over its layers.

    `active_experts` counts the K experts of each kind that one token uses (for a dense model: all of them).
    `matmul_extra` are the weight matrices besides experts and `head` that every token is multiplied with
    (router matrices, key and value projections, without biases). `norms` holds the biases of a GPT-NeoX but those of
    its keys and values.
    """

    embedding: int
    head: int
    norms: int
    routers: int
    key_value: int
    experts: int
    active_experts: int
    matmul_extra: int

    @property
    def shared(self) -> int:
        """Parameters that every rank holds whatever the expert parallelism: all but the experts."""
        return self.embedding + self.head + self.norms + self.routers + self.key_value

    @property
    def total(self) -> int:
        """All trained parameters."""
        return self.shared + self.experts

    @property
    def active(self) -> int:
        """Parameters one token meets; the embedding is a table lookup and does not count."""
        return self.active_experts + self.routers + self.key_value + self.norms + self.head

    @property
    def active_matmul(self) -> int:
        """The active parameters that cost a multiply-add per token: `active` without norms and biases."""
        return self.active_experts + self.matmul_extra + self.head


def count_parameters(model: ModelConfig) -> ParameterCounts:
    """The parameter counts of `model`, equal to those of the built module."""
    layers, width, attention, hidden = model.n_layer, model.n_embd, model.att_hidden, model.ffd_hidden
    # GPT-NeoX has biases everywhere: of queries, of both output projections, of the hidden values.
    biases = 2 * width + attention + hidden if model.kind == "gpt_neox" else 0
    per_attention, per_mlp = 2 * width * attention, 2 * width * hidden
    key_value_matrices = 0 if model.shares_kv else 2 * width * attention
    key_value_biases = 0 if model.shares_kv else 2 * attention
    if not model.sparse:
        active = per_attention + per_mlp
        experts = layers * active
        router_matrices = router_rest = 0
    else:
        attention_counts = [model.num_experts(layer, "attention") for layer in range(layers)]
        mlp_counts = [model.num_experts(layer, "mlp") for layer in range(layers)]
        experts = sum(attention_counts) * per_attention + sum(mlp_counts) * per_mlp
        active = model.k_att * per_attention + model.k_mlp * per_mlp
        sizes = [_router(model, count) for count in attention_counts + mlp_counts]
        router_matrices = sum(matrices for matrices, _ in sizes)
        router_rest = sum(rest for _, rest in sizes)
    return ParameterCounts(
        embedding=model.vocab_size * width,
        head=model.vocab_size * width,
        norms=layers * (4 * width + biases) + 2 * width,
        routers=router_matrices + router_rest,
        key_value=layers * (key_value_matrices + key_value_biases),
        experts=experts,
        active_experts=layers * active,
        matmul_extra=router_matrices + layers * key_value_matrices,
    )


def train_flops_per_token(model: ModelConfig, seq_len: int) -> int:
    """Model FLOPs of one training token (forward and backward) in rows of `seq_len` tokens.

    A weight that multiplies the token costs 2 FLOPs forward and 4 backward: 6 per active matmul parameter.
    Causal stick-breaking attention, like softmax attention, is two products between a token's K expert
    queries of width A and the (T + 1) / 2 keys it sees on average, itself included: Q K^T and A V cost 2 *
    K * A * (T + 1) / 2 each forward and twice that backward, so 6 * L * K * A * (T + 1). Elementwise work,
    routing, the optimizer and recomputation do not count (model FLOPs, not hardware FLOPs); document
    boundaries are ignored, as if every row were one document, and keys that a kernel passes over because the
    stick is used up count like any other: MFU is then higher than the device's real utilisation.
    """
    top_k = model.k_att if model.sparse else 1
    attention = 6 * model.n_layer * top_k * model.att_hidden * (seq_len + 1)
    return 6 * count_parameters(model).active_matmul + attention


def mfu(tokens_per_second: float, flops_per_token: float, peak_flops: float) -> float:
    """Model FLOPs utilisation: the share of `peak_flops` (FLOP/s of all devices) that training uses."""
    if peak_flops <= 0:
        raise ValueError(f"peak_flops must be positive, not {peak_flops}")
    return tokens_per_second * flops_per_token / peak_flops


def _router(model: ModelConfig, num_experts: int) -> tuple[int, int]:
    """Matrix parameters and other parameters of one router."""
    width, gating = model.n_embd, model.gating_size
    if model.gate_type == "linear":
        return width * num_experts, 0
    matrices = width * gating + gating * num_experts
    # mlp: the bias of its first layer; gmm: its temperature.
    return matrices, {"mlp": gating, "gmm": 1, "tanh": 0}[model.gate_type]

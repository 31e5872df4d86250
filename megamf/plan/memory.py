"""How many bytes one rank needs, by formula: weights, gradients, optimizer state, activations, logits.

Letters: `N` tokens of one micro batch on a rank, `D` model width, `A` attention width, `F` expert hidden,
`E` experts, `K` top-k, `R` = N*K routed copies, `G` router width, `H` heads, `V` vocabulary; `b` bytes of a
value in the training precision. The allocator's fragmentation, communication buckets and library workspaces
are not in the sum; leave a tenth free.
"""

from dataclasses import asdict, dataclass

from megamf.config import ModelConfig, RunConfig
from megamf.plan.flops import count_parameters


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one rank at the peak of a training step."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(asdict(self).values())

    def rows(self) -> list[tuple[str, int]]:
        """(name, bytes) of each part, and of the total."""
        return [*asdict(self).items(), ("total", self.total)]


def rank_memory(config: RunConfig, num_ranks: int, *, ep: int, zero_stage: int, imbalance: float = 1.5) -> RankMemory:
    """Bytes per rank when `num_ranks` train `config` with `ep` and `zero_stage` instead of its own layout.

    A rank holds the shared parameters and 1/ep of the experts. Weights take b bytes each. Gradients take b
    each at stages 0 and 1; at stage 2 only the rank's shard stays: shared parameters are sharded over all
    ranks, expert parameters over the num_ranks/ep ranks that replicate them. The optimizer keeps two fp32
    moments, and an fp32 master copy unless the stage is 0 in fp32; from stage 1 on only of the shard, plus,
    in bf16, the shard's gradient in fp32 at the step. `imbalance` is how many times its even share of
    routed rows the busiest rank receives; it matters with ep > 1 only, since one rank alone gets exactly R
    rows.
    """
    if zero_stage not in (0, 1, 2):
        raise ValueError(f"zero_stage={zero_stage}: the plan knows 0, 1 and 2")
    if imbalance < 1:
        raise ValueError(f"imbalance={imbalance}: the busiest rank gets at least its even share, so at least 1")
    config.parallel.model_copy(update={"ep": ep}).check(num_ranks, config.model)
    counts = count_parameters(config.model)
    value_bytes = 2 if config.train.precision == "bf16" else 4
    local = counts.shared + counts.experts // ep
    shard = local if zero_stage == 0 else -(-counts.shared // num_ranks) + counts.experts // num_ranks
    master = 0 if zero_stage == 0 and config.train.precision == "fp32" else 4
    step_gradient = 4 if config.train.precision == "bf16" else 0
    return RankMemory(
        weights=local * value_bytes,
        gradients=(shard if zero_stage == 2 else local) * value_bytes,
        optimizer=shard * (8 + master + step_gradient),
        activations=_activations(config, value_bytes, imbalance if ep > 1 else 1.0),
        logits=_logits(config),
    )


def layer_activations(model: ModelConfig, tokens: int, value_bytes: int, *, imbalance: float = 1.0) -> tuple[int, int]:
    """Bytes that one layer saves for its backward pass: (all but the hidden rows, the hidden rows of the MLP).

    The hidden rows before and after the activation function (2 R F) are what `activation_checkpointing=experts`
    recomputes. The rest, in values of b bytes: inputs and outputs of both layer norms (4 N D), queries and outputs of
    attention (2 R A), keys and values where they are projected (2 N A), and for either kind of expert the rows that
    enter the first (R D) and leave the second product (R D), with the attention outputs in expert order (R A) between.
    In fp32: per router the hidden values on both sides of its activation function (2 N G) and logits, log-probabilities
    and probabilities (3 N E), and a row sum per query head of attention. `imbalance` scales the rows that experts work
    on, not those that tokens keep.
    """
    width, attention, hidden = model.n_embd, model.att_hidden, model.ffd_hidden
    if model.kind == "dense":
        kept = tokens * ((4 * width + 4 * attention) * value_bytes + 4 * model.n_head)
        return kept, tokens * 2 * hidden * value_bytes
    key_value = 0 if model.shares_kv else 2 * attention
    by_token = 4 * width + key_value + model.k_att * (2 * attention + width) + model.k_mlp * width
    by_expert = model.k_att * (width + attention) + model.k_mlp * width
    gating = 0 if model.gate_type == "linear" else 2 * 2 * model.gating_size
    fp32 = gating + 3 * (model.n_att_experts + model.n_mlp_experts) + model.k_att * model.n_head
    kept = tokens * ((by_token + imbalance * by_expert) * value_bytes + 4 * fp32)
    return int(kept), int(tokens * imbalance * model.k_mlp * 2 * hidden * value_bytes)


def _activations(config: RunConfig, value_bytes: int, imbalance: float) -> int:
    """All layers by recomputation mode; what is recomputed is alive for one layer at a time."""
    tokens = config.train.micro_batch * config.train.seq_len
    layers = config.model.n_layer
    kept, hidden = layer_activations(config.model, tokens, value_bytes, imbalance=imbalance)
    entry = tokens * config.model.n_embd * value_bytes
    match config.train.activation_checkpointing:
        case "none":
            return entry + layers * (kept + hidden)
        case "experts":
            return entry + layers * kept + hidden
        case "full":
            return (layers + 1) * entry + kept + hidden


def _logits(config: RunConfig) -> int:
    """Logits of one chunk and their gradient in fp32, and both once more in the softmax's working copies."""
    tokens = min(config.train.loss_chunk, config.train.micro_batch * config.train.seq_len)
    return 3 * 4 * tokens * config.model.vocab_size

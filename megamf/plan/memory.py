"""How many bytes one rank needs, by formula: resident state, activations, and the workspace of each phase of a step.

Letters: `N` tokens of one micro batch on a rank, `D` model width, `A` attention width, `F` expert hidden,
`E` experts, `K` top-k, `R` = N*K routed copies, `G` router width, `H` heads, `V` vocabulary; `b` bytes of a
value in the training precision. The allocator's fragmentation, communication buffers of NCCL and workspaces of
libraries are not in the sum; leave a tenth free.
"""

from dataclasses import dataclass

from megamf.config import ModelConfig
from megamf.plan.job import Job


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one rank.

    `weights` and `optimizer` are there always. The rest comes and goes: `gradients` what accumulates (of a single micro
    batch: what there is when it is over), `activations` saved for the backward pass, and the workspaces of the loss, of
    the backward pass through one layer, of ZeRO's reduction and of the optimizer. `peak` is the most that meets.
    `host` is in the memory of the rank's host (offload).
    """

    weights: int
    optimizer: int
    gradients: int
    activations: int
    loss: int
    layer: int
    bucket: int
    update: int
    peak: int
    host: int

    def rows(self) -> list[tuple[str, int]]:
        """(name, bytes) in order."""
        return [(name, getattr(self, name)) for name in self.__dataclass_fields__]


def rank_memory(job: Job, imbalance: float = 1.0) -> RankMemory:
    """The bytes of one rank of `job`, whose busiest rank receives `imbalance` times its even share of routed rows.

    Weights take b bytes each: all shared ones and 1/P of the experts; at stage 3 a shard, and what is gathered while it
    is used. All that follows is of the trained parameters alone. The optimizer keeps two fp32 moments, and an fp32
    master copy unless the stage is 0 in fp32; from stage 1 on of a shard only (shared parameters over all W ranks,
    experts over the W/P that hold the same). Gradients take b bytes each: at stages 0 and 1 all of them accumulate,
    from stage 2 on a shard. While they are summed over ranks a bucket of fixed size is filled (stages 1 to 3); at the
    update the largest of the parameter groups is copied, in bf16 also to fp32.

    Peak: resident state, and the largest of: the loss (all activations, what earlier micro batches accumulated, the
    logits of one chunk); the start of the backward pass (all activations and the bucket); its end (no activations, all
    gradients and the bucket); the update. `imbalance` matters with P > 1 only: alone, a rank gets exactly R rows.
    """
    engine, b = job.engine, job.value_bytes
    low = b == 2
    local, shard = job.trained_shared + job.trained_experts, job.shard_shared + job.shard_experts
    master = 0 if engine.stage == 0 and not low else 4
    optimizer = shard * (8 + master)
    weights = (job.held if engine.stage < 3 else shard) * b
    gathered = gathered_parameters(job) * b if engine.stage == 3 else 0
    gradients = (shard if engine.stage >= 2 else local) * b
    bucket = engine.bucket * b * (2 if engine.overlap else 1) if engine.stage > 0 and engine.contiguous else 0
    update = 0 if engine.stage == 0 else max(job.shard_shared, job.shard_experts) * (b + (4 if low else 0))

    tokens, spread = job.tokens, imbalance if job.ep > 1 else 1.0
    saved = _activations(job, spread)
    loss = 3 * 4 * min(job.config.train.loss_chunk, tokens) * job.model.vocab_size
    layer = _layer_workspace(job, spread) + gathered
    repeated = job.accumulation > 1
    before = gradients if repeated else 0
    held = bucket if repeated and engine.stage == 1 else 0
    phases = [
        before + held + saved + loss,
        before + bucket + saved + layer,
        gradients + bucket + layer,
        (shard if engine.stage else local) * b + update,
    ]
    host = 0
    if engine.offload_optimizer:
        # The gradients of the shard are added up there too, in fp32.
        host, optimizer = shard * (8 + 4 + 4), 0
        phases[3] = shard * b
    if engine.offload_parameters:
        host, weights = host + weights, 0
    peak = weights + optimizer + max(phases)
    return RankMemory(weights, optimizer, gradients, saved, loss, layer, bucket, update, peak, host)


def layer_activations(model: ModelConfig, tokens: int, value_bytes: int, *, imbalance: float = 1.0) -> tuple[int, int]:
    """Bytes that one layer saves for its backward pass: (all but the hidden rows, the hidden rows of the MLP).

    The hidden rows before and after the activation function (2 R F) are what `activation_checkpointing=experts`
    recomputes. The rest, in values of b bytes: inputs and outputs of both layer norms (4 N D), queries (R A), keys and
    values where they are projected (2 N A), and for either kind of expert the rows that enter the first (R D) and leave
    the second product (R D), with the attention outputs in expert order (R A) between; per router its hidden values
    (N G), and in fp32 those behind its activation function (N G) and logits, log-probabilities and probabilities
    (3 N E). `imbalance` scales the rows that experts work on, not those that tokens keep.
    """
    width, attention, hidden = model.n_embd, model.att_hidden, model.ffd_hidden
    if not model.sparse:
        # Queries and keys that have turned are saved beside what they were a part of.
        turned = 2 * attention if model.kind == "gpt_neox" else 0
        kept = tokens * ((4 * width + 4 * attention + turned) * value_bytes + 4 * model.n_head)
        return kept, tokens * 2 * hidden * value_bytes
    key_value = 0 if model.shares_kv else 2 * attention
    by_token = 4 * width + key_value + model.k_att * (attention + width) + model.k_mlp * width
    by_expert = model.k_att * (width + attention) + model.k_mlp * width
    gating = 0 if model.gate_type == "linear" else 2 * model.gating_size
    fp32 = gating + 3 * (model.n_att_experts + model.n_mlp_experts)
    kept = tokens * ((by_token + gating + imbalance * by_expert) * value_bytes + 4 * fp32)
    return int(kept), int(tokens * imbalance * model.k_mlp * 2 * hidden * value_bytes)


def _activations(job: Job, imbalance: float) -> int:
    """What all layers save, by recomputation mode."""
    layers, b = job.model.n_layer, job.value_bytes
    kept, hidden = layer_activations(job.model, job.tokens, b, imbalance=imbalance)
    entry = job.tokens * job.model.n_embd * b
    # The final norm keeps its input and its output.
    match job.config.train.activation_checkpointing:
        case "none":
            return (
                2 * entry + layers * (kept + hidden) + _joined_experts(job, "attention") + _joined_experts(job, "mlp")
            )
        case "experts":
            return 2 * entry + layers * kept + _joined_experts(job, "attention")
        case "full":
            return (layers + 2) * entry


def _joined_experts(job: Job, kind: str) -> int:
    """The copies of frozen and inserted experts in one tensor, of all layers."""
    hidden = {"attention": job.model.att_hidden, "mlp": job.model.ffd_hidden}[kind]
    places = job.tuned.copied if job.tuned else ()
    experts = sum(job.model.num_experts(layer, found) for layer, found in places if found == kind)
    return experts * 2 * job.model.n_embd * hidden * job.value_bytes


def _layer_workspace(job: Job, imbalance: float) -> int:
    """What the backward pass through one layer needs besides what the forward pass saved.

    Recomputed activations; of the MLP the gradients of both hidden rows (2 R F) and of the rows on either side (2 R D);
    the gradient of its larger weight before it is added to what has accumulated; where attention experts' weights are
    gathered, those of one projection with their gradient, once more in fp32 (of two where blocks are recomputed).
    """
    model, b = job.model, job.value_bytes
    kept, hidden = layer_activations(model, job.tokens, b, imbalance=imbalance)
    again = {"none": 0, "experts": hidden, "full": kept + hidden}[job.config.train.activation_checkpointing]
    copies = model.k_mlp * imbalance if job.sparse else 1
    experts = -(-model.n_mlp_experts // job.ep) if job.sparse else 1
    passing = int(job.tokens * copies * 2 * (model.ffd_hidden + model.n_embd) * b)
    gathered = 0
    if job.sparse and job.ep > 1 and not job.moves_tokens:
        copies = 2 if job.config.train.activation_checkpointing == "full" else 1
        gathered = model.n_att_experts * model.n_embd * model.att_hidden * (copies * b + b + 4)
    # Beside adapters there is no gradient of a whole weight.
    weight = 0 if job.config.tune.strategy == "lora" else experts * model.n_embd * model.ffd_hidden * b
    return again + passing + max(gathered, weight)


def gathered_parameters(job: Job) -> int:
    """Parameters that stage 3 has gathered at one time: a layer, what is fetched ahead, and the head at its turn."""
    layer = (job.shared - job.counts.embedding - job.counts.head + job.local_experts) // job.model.n_layer
    return max(layer, job.counts.head) + min(job.engine.prefetch, job.shared + job.local_experts)

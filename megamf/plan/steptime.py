"""How long one update takes, by formula: arithmetic, memory traffic, exposed communication, the optimizer.

A prediction from data sheets and stated assumptions, for comparing layouts and for ordering machines. Nothing is
measured.
"""

from dataclasses import dataclass

from megamf.plan.cluster import Cluster
from megamf.plan.flops import mfu, train_flops_per_token
from megamf.plan.job import Job
from megamf.plan.memory import layer_activations
from megamf.plan.traffic import Collective, collectives

# A saved activation is written and read in the forward pass, read again and met by a gradient in the backward pass.
PASSES_OVER_ACTIVATIONS = 6
# Every micro batch reads all local weights twice, writes their gradients, and reads and writes what they add up to.
PASSES_OVER_WEIGHTS = 2
PASSES_OVER_GRADIENTS = 3
DAY = 86400


@dataclass(frozen=True)
class StepTime:
    """Seconds of one update, by what they are spent on."""

    products: float
    elementwise: float
    optimizer: float
    experts: float
    context: float
    zero: float
    hidden: float
    small: float

    @property
    def total(self) -> float:
        """All of it; `hidden` is the part of ZeRO's traffic that computing hides, and not in `zero`."""
        return self.products + self.elementwise + self.optimizer + self.experts + self.context + self.zero + self.small

    @property
    def communication(self) -> float:
        """Exposed seconds in collectives."""
        return self.experts + self.context + self.zero + self.small


def forward_flops(job: Job) -> dict[str, float]:
    """Floating-point operations of the forward pass of one micro batch on one rank, by part."""
    model, counts, tokens = job.model, job.counts, job.tokens
    top_k = 1 if not job.sparse else model.k_att
    experts = 2 * counts.active_experts * tokens
    mlp = model.n_layer * (1 if not job.sparse else model.k_mlp) * 4 * model.n_embd * model.ffd_hidden * tokens
    return {
        "mlp": mlp,
        "projections": experts - mlp,
        "attention": 2 * model.n_layer * top_k * model.att_hidden * (job.config.train.seq_len + 1) * tokens,
        "routers": 2 * counts.matmul_extra * tokens,
        "head": 2 * counts.head * tokens,
    }


def hardware_flops(job: Job, imbalance: float = 1.0) -> float:
    """Operations of one update on the busiest rank: forward, backward (twice it), and what is computed again.

    Of frozen weights no gradient is computed: there the backward pass is as long as the forward pass.
    """
    forward = forward_flops(job)
    if job.ep > 1:
        forward["mlp"] *= imbalance
        if job.moves_tokens:
            forward["projections"] *= imbalance
    blocks = sum(forward.values()) - forward["head"]
    again = {"none": 0.0, "experts": forward["mlp"], "full": blocks}[job.config.train.activation_checkpointing]
    if job.tokens > job.config.train.loss_chunk:
        again += forward["head"]
    if job.looks_ahead:
        again += blocks
    weights = sum(forward.values()) - forward["attention"]
    frozen = (1 - min(job.trained_share, 1)) * weights
    return job.accumulation * (3 * sum(forward.values()) - frozen + again)


def step_time(job: Job, cluster: Cluster, traffic: list[Collective] | None = None) -> StepTime:
    """Seconds of one update of `job` on `cluster`. Every rank waits for the busiest one in every layer."""
    imbalance = cluster.imbalance if job.ep > 1 else 1.0
    traffic = collectives(job, imbalance) if traffic is None else traffic
    memory_rate = cluster.memory_bandwidth * cluster.memory_efficiency
    products = hardware_flops(job, imbalance) / (cluster.peak_flops * cluster.efficiency)
    elementwise = job.accumulation * memory_traffic(job, imbalance) / memory_rate

    spent = {"experts": 0.0, "context": 0.0, "zero": 0.0, "small": 0.0}
    hideable = 0.0
    for item in traffic:
        seconds = item.seconds(cluster)
        spent[_room(item)] += seconds
        hideable += seconds if item.hidden else 0.0
    hidden = min(hideable, cluster.overlap * (products + elementwise))
    spent["zero"] -= hidden
    return StepTime(products, elementwise, optimizer_seconds(job, cluster), hidden=hidden, **spent)


def memory_traffic(job: Job, imbalance: float = 1.0) -> float:
    """Bytes that one micro batch moves through a device's memory: activations, logits, weights and gradients.

    The fewer rows an expert gets, the more its weights count: all of them are read for every micro batch.
    """
    rows = sum(layer_activations(job.model, job.tokens, job.value_bytes, imbalance=imbalance))
    logits = 4 * job.tokens * job.model.vocab_size
    again = {"none": 0, "experts": 0, "full": 1}[job.config.train.activation_checkpointing]
    weights = (job.shared + job.local_experts - job.counts.embedding) * job.value_bytes
    passes = PASSES_OVER_ACTIVATIONS + 2 * again
    over_weights = PASSES_OVER_WEIGHTS + again + PASSES_OVER_GRADIENTS * min(job.trained_share, 1)
    return passes * job.model.n_layer * rows + PASSES_OVER_ACTIVATIONS * logits + over_weights * weights


def optimizer_seconds(job: Job, cluster: Cluster) -> float:
    """AdamW reads and writes master weight and moments once, reads the gradient and writes the weight.

    With offload it does so at the host's memory rate, taken as the link's, and gradients and weights cross the link.
    """
    shard, b = job.shard_shared + job.shard_experts, job.value_bytes
    state = shard * 2 * (8 + (4 if job.engine.stage or b == 2 else 0)) + 2 * shard * b
    if job.engine.offload_optimizer:
        return (state + 2 * shard * b) / cluster.host_link
    return state / (cluster.memory_bandwidth * cluster.memory_efficiency)


def step_mfu(job: Job, cluster: Cluster, seconds: float) -> float:
    """Model FLOPs utilisation of an update that takes `seconds`."""
    flops = train_flops_per_token(job.model, job.config.train.seq_len)
    return mfu(job.tokens_a_step / seconds, flops, cluster.peak_flops * cluster.num_ranks)


def days(tokens: float, job: Job, seconds: float) -> float:
    """Days to train on `tokens` tokens at one update in `seconds`."""
    return tokens / job.tokens_a_step * seconds / DAY


def _room(item: Collective) -> str:
    if item.kind == "all_to_all" or item.name.startswith("attention experts"):
        return "experts"
    if item.name.startswith("context"):
        return "context"
    return "small" if item.name in ("counts, losses and norms", "router statistics") else "zero"

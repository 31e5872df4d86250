"""Every collective of one training step: what, among which ranks, how often, how many bytes, how long.

Letters as in `megamf.plan.memory`; `P` expert-parallel ranks, `W` ranks. Nothing is measured here.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from megamf.plan.cluster import Cluster, Group, all_to_all_seconds, hops, ring_rate
from megamf.plan.job import Job

# Parameter groups of the optimizer, each gathered by itself: decayed and not.
SHARED_GROUPS = 2


@dataclass(frozen=True)
class Collective:
    """`calls` times in a step, `sent` bytes leave a rank each time (the mean, and of the busiest rank).

    `hidden`: ZeRO's traffic that runs beside computing where the engine is told to (overlap_comm).
    """

    name: str
    kind: str
    group: Group
    calls: int
    sent: float
    busiest: float
    hidden: bool = False

    @property
    def bytes(self) -> float:
        """Bytes a rank sends in one step."""
        return self.calls * self.sent

    def seconds(self, cluster: Cluster) -> float:
        """Time in one step, when nothing else uses the links; the busiest rank sets it."""
        if self.group.size == 1:
            return 0.0
        if self.kind == "all_to_all":
            transfer = all_to_all_seconds(self.busiest, self.group, cluster)
        else:
            transfer = self.busiest / ring_rate(self.group, cluster)
        return self.calls * (transfer + cluster.latency * hops(self.group))


def collectives(job: Job, imbalance: float = 1.0) -> list[Collective]:
    """All collectives of one update that involve more than one rank, those of experts first.

    `imbalance`: routed rows of the busiest expert-parallel rank over its even share.
    """
    found = [*_experts(job, imbalance), *_context(job), *_zero(job), *_small(job)]
    return [item for item in found if item.group.size > 1 and item.calls]


def _experts(job: Job, imbalance: float) -> Iterator[Collective]:
    """Rows to their experts and back, layer by layer; split sizes once a routing decision."""
    if not job.sparse or job.ep == 1:
        return
    model, b, group = job.model, job.value_bytes, job.expert_group
    layers = model.n_layer * job.accumulation
    forward = 2 if job.config.train.activation_checkpointing == "full" else 1
    ahead = int(job.looks_ahead)
    away = (job.ep - 1) / job.ep

    def rows(name: str, top_k: int, width: int) -> Collective:
        sent = job.tokens * top_k * width * b * away
        return Collective(name, "all_to_all", group, 2 * (forward + ahead + 1) * layers, sent, sent * imbalance)

    if job.moves_tokens:
        yield rows("attention experts: rows of width n_embd", model.k_att, model.n_embd)
        yield rows("attention experts: rows of width att_hidden", model.k_att, model.att_hidden)
    else:
        # Two matrices; gathered for the forward and the backward pass (where blocks are recomputed, for both at once).
        values = job.slots("attention") * job.ep / model.n_layer * model.n_embd * model.att_hidden * away
        gathers = 2 * layers * (2 + ahead)
        yield Collective("attention experts: weights", "all_gather", group, gathers, values * b, values * b)
        yield Collective("attention experts: gradients", "reduce_scatter", group, 2 * layers, values * 4, values * 4)
    yield rows("MLP experts: rows", model.k_mlp, model.n_embd)
    sizes = 8 * max(model.n_att_experts if job.moves_tokens else 0, model.n_mlp_experts) * away
    decisions = 2 if job.moves_tokens else 1
    yield Collective("split sizes", "all_to_all", group, decisions * layers * (forward + ahead), sizes, sizes)


def _context(job: Job) -> Iterator[Collective]:
    """Keys and values of the whole sequence for every attention layer; the sums of their gradients, in fp32, back.

    They are gathered for the forward and again for the backward pass, recomputed or not.
    """
    if job.context == 1:
        return
    model, group = job.model, job.context_group
    width = model.n_embd if model.shares_kv else 2 * model.att_hidden
    values = (job.context - 1) * job.tokens * width
    sent, back = values * job.value_bytes, values * 4
    layers = model.n_layer * job.accumulation
    gathers = layers * (2 + int(job.looks_ahead))
    yield Collective("context: keys and values", "all_gather", group, gathers, sent, sent)
    yield Collective("context: their gradients", "reduce_scatter", group, layers, back, back)


def _zero(job: Job) -> Iterator[Collective]:
    """Gradients summed and weights spread, shared parameters over all ranks and experts over their replicas.

    Frozen parameters, which ZeRO 3 does not take, have no part in it.

    DeepSpeed's stages 1 and 2 sum whole buckets by all-reduce and keep their shard of the result; stage 2 does so after
    every micro batch, stage 1 (without overlap_comm) and 0 after the last.
    """
    engine, b = job.engine, job.value_bytes
    experts = ("experts", job.trained_experts, job.replica_group, 1)
    parts = [("shared", job.trained_shared, job.world, SHARED_GROUPS), experts]
    for name, count, group, groups in parts:
        share = count * (group.size - 1) / group.size if count else 0
        if not share:
            continue
        buckets = max(1, -(-count // engine.bucket))
        if engine.stage == 3:
            times = job.accumulation
            passes = (3 if job.config.train.activation_checkpointing == "full" else 2) + int(job.looks_ahead)
            fetches = job.model.n_layer * times * passes
            sent = share * b * times * passes / fetches
            yield Collective(f"ZeRO: weights, {name}", "all_gather", group, fetches, sent, sent, engine.overlap)
            sent = share * engine.wire_bytes / buckets
            calls = buckets * times
            yield Collective(f"ZeRO: gradients, {name}", "reduce_scatter", group, calls, sent, sent, engine.overlap)
            continue
        times = job.accumulation if engine.stage == 2 else 1
        sent = 2 * share * engine.wire_bytes / buckets
        yield Collective(f"gradients, {name}", "all_reduce", group, buckets * times, sent, sent, engine.overlap)
        if engine.stage:
            sent = share * b / groups
            yield Collective(f"ZeRO: weights, {name}", "all_gather", group, groups, sent, sent)


def _small(job: Job) -> Iterator[Collective]:
    """Sums of a few numbers: labels and stop, losses, gradient norms, router statistics."""
    share = 2 * (job.num_ranks - 1) / job.num_ranks
    norms = (2 + SHARED_GROUPS) if job.engine.stage else 0
    yield Collective("counts, losses and norms", "all_reduce", job.world, 2 + norms, 16 * share, 16 * share)
    if not job.sparse:
        return
    routers = 2 * job.model.n_layer
    sums = 4 * (routers * (2 * max(job.model.n_att_experts, job.model.n_mlp_experts) + 2) + 1) * share
    calls = job.accumulation if job.config.losses.scope == "micro_batch" else 1
    yield Collective("router statistics", "all_reduce", job.world, calls, sums, sums)

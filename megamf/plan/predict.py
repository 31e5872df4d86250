"""One layout on one cluster: memory, traffic, time, and what follows from them. Predictions, nothing is measured."""

from dataclasses import asdict, dataclass
from functools import cached_property

import torch

from megamf.config import RunConfig
from megamf.hf.layout import public_entries, public_shapes
from megamf.parallel.traffic import attention_expert_bytes
from megamf.plan.cluster import Cluster
from megamf.plan.flops import count_parameters, train_flops_per_token
from megamf.plan.job import Engine, Job
from megamf.plan.memory import RankMemory, rank_memory
from megamf.plan.steptime import DAY, StepTime, days, step_mfu, step_time
from megamf.plan.traffic import Collective, collectives

# What the released models were trained on.
PUBLISHED_TOKENS = 300_000_000_000


@dataclass(frozen=True)
class Checkpoint:
    """Bytes of the tensors of a training checkpoint and of an exported folder, and seconds to write the first."""

    training: int
    exported: int
    seconds: float


@dataclass(frozen=True)
class Prediction:
    """What a run with this layout is expected to need and to do."""

    job: Job
    cluster: Cluster
    memory: RankMemory
    collectives: list[Collective]
    time: StepTime

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """What is written to disk."""
        return checkpoint_size(self.job, self.cluster)

    @property
    def fits(self) -> bool:
        """Whether the peak stays within the share of the device that may be filled."""
        return self.memory.peak <= self.cluster.usable_memory

    @property
    def tokens_per_second(self) -> float:
        """Of all ranks together."""
        return self.job.tokens_a_step / self.time.total

    @property
    def tokens_per_day(self) -> float:
        """Of all ranks together."""
        return self.tokens_per_second * DAY

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation, 0 to 1."""
        return step_mfu(self.job, self.cluster, self.time.total)

    @property
    def days(self) -> float:
        """Days to `PUBLISHED_TOKENS`."""
        return days(PUBLISHED_TOKENS, self.job, self.time.total)

    @property
    def attention_bytes(self) -> dict[str, int]:
        """Bytes a rank would send in one step for attention experts, by strategy; empty where they do not travel."""
        if not self.job.sparse or self.job.ep == 1:
            return {}
        both = attention_expert_bytes(self.job.config, self.job.num_ranks)
        return {"move_tokens": both.tokens, "gather_weights": both.weights}

    @property
    def overrides(self) -> str:
        """The layout in the words of the command line."""
        config = self.job.config
        words = [f"parallel.ep={self.job.ep}", f"deepspeed={config.deepspeed}"]
        if self.job.context > 1:
            words.append(f"parallel.context={self.job.context}")
        words += [
            f"train.micro_batch={config.train.micro_batch}",
            f"train.activation_checkpointing={config.train.activation_checkpointing}",
        ]
        return " ".join(words)

    def tree(self) -> dict:
        """Plain JSON. Bytes, seconds, and tokens."""
        job, time = self.job, self.time
        config = job.config
        return {
            "predicted": True,
            "layout": {
                "ranks": job.num_ranks,
                "ep": job.ep,
                "context": job.context,
                "deepspeed": config.deepspeed,
                "zero_stage": job.engine.stage,
                "offload_optimizer": job.engine.offload_optimizer,
                "micro_batch": config.train.micro_batch,
                "global_batch": config.train.global_batch,
                "accumulation": job.accumulation,
                "seq_len": config.train.seq_len,
                "activation_checkpointing": config.train.activation_checkpointing,
                "attention_experts": job.attention_experts if job.sparse and job.ep > 1 else None,
                "overrides": self.overrides,
            },
            "trained_parameters": job.tuned.total if job.tuned else job.counts.total,
            "fits": self.fits,
            "bytes_per_rank": dict(self.memory.rows()),
            "usable_bytes_per_rank": self.cluster.usable_memory,
            "attention_experts_bytes": self.attention_bytes,
            "collectives": [
                {
                    "name": item.name,
                    "kind": item.kind,
                    "ranks": item.group.size,
                    "crosses_nodes": item.group.crosses(self.cluster),
                    "calls": item.calls,
                    "bytes_a_call": round(item.sent),
                    "bytes_a_step": round(item.bytes),
                    "seconds": item.seconds(self.cluster),
                }
                for item in self.collectives
            ],
            "seconds": {name: getattr(time, name) for name in time.__dataclass_fields__} | {"step": time.total},
            "mfu": self.mfu,
            "tokens_per_second": self.tokens_per_second,
            "tokens_per_day": self.tokens_per_day,
            "days_to_300b_tokens": self.days,
            "checkpoint": {
                "training_bytes": self.checkpoint.training,
                "exported_bytes": self.checkpoint.exported,
                "seconds": self.checkpoint.seconds,
            },
        }


def predict(config: RunConfig, cluster: Cluster, engine: Engine | None = None) -> Prediction:
    """Raises ConfigError where `config` cannot be laid out on the ranks of `cluster`. engine: read before."""
    job = Job.of(config, cluster.num_ranks, engine)
    imbalance = cluster.imbalance if job.ep > 1 else 1.0
    traffic = collectives(job, imbalance)
    return Prediction(
        job,
        cluster,
        rank_memory(job, imbalance),
        traffic,
        step_time(job, cluster, traffic),
    )


def checkpoint_size(job: Job, cluster: Cluster) -> Checkpoint:
    """Weights of everything; moments and, in bf16, fp32 masters of what is trained. Ranks write at the same time.

    Exact but for the headers and the JSON beside the tensors. The exported folder is in the public layout, in bf16,
    with the constant masks that the released files carry.
    """
    b = job.value_bytes
    trained = job.tuned.total if job.tuned else job.counts.total
    training = (job.counts.total + (job.tuned.added if job.tuned else 0)) * b + trained * (8 + (4 if b == 2 else 0))
    if job.sparse:
        types = dict.fromkeys(public_shapes(job.model), torch.bfloat16)
        exported = sum(entry.num_bytes for entry in public_entries(job.model, types, buffers=True))
    else:
        exported = 2 * job.counts.total
    seconds = training / cluster.storage + training / job.num_ranks / cluster.host_link
    return Checkpoint(training, exported, seconds)


def summary(config: RunConfig) -> dict:
    """What does not depend on the layout: parameters, FLOPs, tokens."""
    counts = count_parameters(config.model)
    flops = train_flops_per_token(config.model, config.train.seq_len)
    tokens = config.train.steps * config.train.global_batch * config.train.seq_len
    return {
        "parameters": {"total": counts.total, "active": counts.active, **asdict(counts)},
        "train_flops_per_token": flops,
        "tokens": tokens,
        "train_flops": flops * tokens,
    }

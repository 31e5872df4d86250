"""What the formulas of memory, traffic and time need to know of a configuration on a number of ranks.

Letters as in `megamf.plan.flops`; besides `N` tokens of one micro batch on one rank, `W` ranks, `P` expert-parallel
ranks, `X` ranks that share one sequence.
"""

import os
from dataclasses import dataclass

from megamf.config import ConfigError, ModelConfig, RunConfig
from megamf.model.tuning import Inserted
from megamf.parallel.traffic import Strategy, attention_strategy
from megamf.plan.cluster import Group
from megamf.plan.flops import ParameterCounts, count_parameters
from megamf.plan.trained import Trained, trained_parameters

# DeepSpeed's own defaults where its JSON is silent.
BUCKET = 500_000_000
PREFETCH = 50_000_000
PERSISTENT = 100_000


@dataclass(frozen=True)
class Engine:
    """What of the DeepSpeed JSON matters here. Sizes in elements."""

    stage: int
    bucket: int
    overlap: bool
    contiguous: bool
    prefetch: int
    offload_optimizer: bool
    offload_parameters: bool
    wire_bytes: int
    """Bytes of one gradient value while gradients are summed over ranks."""


@dataclass(frozen=True)
class Job:
    """One layout of one configuration."""

    config: RunConfig
    counts: ParameterCounts
    engine: Engine
    num_ranks: int
    ep: int
    context: int
    accumulation: int
    attention_experts: Strategy
    tuned: Trained | None = None
    """What is trained, where that is not everything."""

    @classmethod
    def of(
        cls, config: RunConfig, num_ranks: int, engine: Engine | None = None, inserted: Inserted | None = None
    ) -> "Job":
        """Raises ConfigError where the configuration cannot be laid out on `num_ranks` ranks. engine: read before.

        inserted: see `trained_parameters`.
        """
        parallel, seq_len = config.parallel, config.train.seq_len
        try:
            parallel.check(num_ranks, config.model)
            config.check_degree()
            accumulation = config.accumulation_steps(num_ranks)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        if parallel.context > 1 and seq_len % (2 * parallel.context):
            raise ConfigError(f"train.seq_len={seq_len} is not divisible by 2 x parallel.context={parallel.context}")
        counts = count_parameters(config.model)
        return cls(
            config,
            counts,
            engine or engine_of(config, num_ranks),
            num_ranks,
            parallel.ep,
            parallel.context,
            accumulation,
            attention_strategy(config, num_ranks),
            trained_parameters(config, counts, inserted),
        )

    @property
    def model(self) -> ModelConfig:
        return self.config.model

    @property
    def sparse(self) -> bool:
        """Whether there are experts."""
        return self.model.sparse

    @property
    def value_bytes(self) -> int:
        """Bytes of a weight or an activation."""
        return 2 if self.config.train.precision == "bf16" else 4

    @property
    def tokens(self) -> int:
        """N: tokens of one micro batch on one rank."""
        return self.config.train.micro_batch * self.config.train.seq_len // self.context

    @property
    def moves_tokens(self) -> bool:
        """Whether rows travel to attention experts."""
        return self.sparse and self.ep > 1 and self.attention_experts == "move_tokens"

    @property
    def looks_ahead(self) -> bool:
        """Whether the router statistics of the global batch cost a forward pass of their own."""
        return self.sparse and self.config.losses.scope == "global_batch" and self.accumulation > 1

    @property
    def tokens_a_step(self) -> int:
        """Tokens of all ranks and micro batches in one update."""
        return self.config.train.global_batch * self.config.train.seq_len

    @property
    def world(self) -> Group:
        return Group(self.num_ranks)

    @property
    def expert_group(self) -> Group:
        """Ranks that share one copy of the experts: neighbours."""
        return Group(self.ep)

    @property
    def replica_group(self) -> Group:
        """Ranks that hold the same experts."""
        return Group(self.num_ranks // self.ep, self.ep)

    @property
    def context_group(self) -> Group:
        """Ranks that share one sequence: neighbours."""
        return Group(self.context)

    @property
    def local_experts(self) -> int:
        """Expert parameters a rank holds, those of empty slots (where experts are not shared out evenly) included."""
        if not self.sparse:
            return 0
        model = self.model
        hidden = {"attention": model.att_hidden, "mlp": model.ffd_hidden}
        return 2 * model.n_embd * sum(self.slots(kind) * width for kind, width in hidden.items())

    def slots(self, kind: str) -> int:
        """Places for experts of one kind that a rank has, all layers together."""
        return sum(-(-self.model.num_experts(layer, kind) // self.ep) for layer in range(self.model.n_layer))

    @property
    def shared(self) -> int:
        """Parameters outside expert parallelism (in a dense model all of them)."""
        return self.counts.shared if self.sparse else self.counts.total

    @property
    def held(self) -> int:
        """Parameters whose weights this rank holds, adapters among them (at stage 3: shards of them)."""
        return self.shared + self.local_experts + (self.tuned.added if self.tuned else 0)

    @property
    def trained_shared(self) -> int:
        """Shared parameters that are trained."""
        return self.tuned.shared if self.tuned else self.shared

    @property
    def trained_experts(self) -> int:
        """Expert parameters of this rank that are trained."""
        return self.tuned.experts if self.tuned else self.local_experts

    @property
    def trained_share(self) -> float:
        """Trained parameters over all that the model has, 0 to 1."""
        return (self.trained_shared + self.trained_experts) / (self.shared + self.local_experts)

    @property
    def shard_shared(self) -> int:
        """Shared parameters whose optimizer state this rank keeps."""
        return self.trained_shared if self.engine.stage == 0 else -(-self.trained_shared // self.num_ranks)

    @property
    def shard_experts(self) -> int:
        """Expert parameters whose optimizer state this rank keeps."""
        return self.trained_experts if self.engine.stage == 0 else -(-self.trained_experts // self.replica_group.size)


def engine_of(config: RunConfig, num_ranks: int) -> Engine:
    """The JSON that `config.deepspeed` names, read as the run reads it. Raises ConfigError as the run would."""
    # What this imports brings DeepSpeed along, which looks for accelerators that a plan does not need, and says so.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from megamf.parallel.zero import deepspeed_config

    tree = deepspeed_config(config, num_ranks)
    zero = tree["zero_optimization"]
    low = config.train.precision == "bf16"
    wire = {"fp32": 4, "fp16": 2, "bf16": 2}.get(tree.get("communication_data_type", ""), 2 if low else 4)
    return Engine(
        stage=zero["stage"],
        bucket=int(zero.get("reduce_bucket_size", BUCKET)),
        overlap=bool(zero.get("overlap_comm", zero["stage"] == 3)),
        contiguous=bool(zero.get("contiguous_gradients", True)),
        prefetch=int(zero.get("stage3_prefetch_bucket_size", PREFETCH)),
        offload_optimizer=_offloaded(zero, "offload_optimizer"),
        offload_parameters=_offloaded(zero, "offload_param"),
        wire_bytes=wire,
    )


def _offloaded(zero: dict, key: str) -> bool:
    return (zero.get(key) or {}).get("device", "none") not in ("none", None)

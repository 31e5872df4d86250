"""The validated configuration of one run: one section per room, each key with an effect."""

from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from megamf.config.base import Section, TextPath
from megamf.config.model import ModelConfig


class Run(Section):
    """Where the run lives and the seed from which every random number of it is derived."""

    dir: TextPath = Path("runs/default")
    seed: int = Field(0, ge=0)


class Source(Section):
    """One part of a data blend: the path of an indexed dataset without `.bin`/`.idx`, and its weight."""

    path: TextPath
    weight: PositiveFloat = 1.0


class Data(Section):
    """What is trained and evaluated on."""

    tokenizer: TextPath | None = Field(None, description="sentencepiece .model or Hugging Face tokenizer.json")
    train: list[Source] = Field(default_factory=list)
    valid: list[Source] = Field(default_factory=list)
    valid_fraction: float = Field(
        0.0, ge=0, lt=1, description="without `valid`: the last share of each training source's documents"
    )
    document_mask: bool = Field(True, description="no token attends to another document")
    mmap: bool = Field(True, description="false: read by plain file access, for file systems that refuse mapping")

    @model_validator(mode="after")
    def _one_kind_of_split(self) -> "Data":
        if self.valid and self.valid_fraction:
            raise ValueError(
                f"data.valid names {len(self.valid)} sources and data.valid_fraction={self.valid_fraction}: "
                "give one of the two"
            )
        return self


class Losses(Section):
    """The objective beside cross entropy. Balance losses see the statistics named by `scope`."""

    balance: Literal["mi", "switch", "none"] = "mi"
    balance_weight: NonNegativeFloat = 1e-3
    scope: Literal["global_batch", "micro_batch", "rank"] = Field(
        "global_batch",
        description="global_batch: exact over all ranks and accumulation steps (with accumulation it costs one more "
        "forward pass); micro_batch: over all ranks of one accumulation step; rank: one rank's micro batch",
    )
    z_weight: NonNegativeFloat = Field(0.0, description="router z-loss: mean squared logsumexp of the router logits")
    concentration: NonNegativeFloat = Field(0.0, description="weight of the load concentration loss H(m)")
    routing_regularisation: NonNegativeFloat = Field(0.0, description="weight of ||A||^2 of the router output matrix")

    @model_validator(mode="after")
    def _no_tug_of_war(self) -> "Losses":
        if self.concentration and self.balance != "none" and self.balance_weight:
            raise ValueError(
                f"losses.concentration={self.concentration} and losses.balance={self.balance} with weight "
                f"{self.balance_weight} pull the load in opposite directions: set losses.balance=none"
            )
        return self


class Tune(Section):
    """Which parameters are trained. Inserted modules are those that the module table of the checkpoint says were."""

    strategy: Literal["full", "inserted", "router_rows", "lora"] = Field(
        "full",
        description="full: everything; inserted: inserted modules and all routers; router_rows: inserted modules and "
        "their rows of the routers; lora: low-rank adapters beside the weights. The rest stays as it is and has no "
        "optimizer state",
    )
    inserted: Literal["latest", "all"] = Field(
        "latest",
        description="latest: inserted modules are those of the last insertion, and those of earlier ones stay as they "
        "are; all: those of every insertion",
    )
    embeddings: bool = Field(False, description="train embedding and head too (with strategy full they always are)")
    rows_regularisation: NonNegativeFloat = Field(
        0.0, description="weight of ||A'||^2, the squared norm of the routers' rows of inserted modules"
    )
    lora_rank: PositiveInt = Field(8, description="of an adapter, on top of its frozen weight")
    lora_alpha: PositiveFloat = Field(16.0, description="adapters are scaled by lora_alpha / lora_rank")
    lora_targets: Literal["attention", "mlp", "all"] = Field(
        "all",
        description="attention: projections of queries, outputs, and keys and values where there are any; mlp: both "
        "matrices; all: these two. Of experts each has an adapter of its own; routers stay as they are",
    )

    @model_validator(mode="after")
    def _has_an_effect(self) -> "Tune":
        needed = {"embeddings": ("inserted", "router_rows", "lora")}
        needed |= dict.fromkeys(("inserted", "rows_regularisation"), ("inserted", "router_rows"))
        needed |= dict.fromkeys(("lora_rank", "lora_alpha", "lora_targets"), ("lora",))
        for key, strategies in needed.items():
            value = getattr(self, key)
            if self.strategy not in strategies and value != type(self).model_fields[key].default:
                raise ValueError(
                    f"tune.{key}={value} needs tune.strategy={' or '.join(strategies)}, not {self.strategy}"
                )
        return self


class Optim(Section):
    """AdamW and its learning-rate schedule, in steps."""

    lr: PositiveFloat = 3e-4
    min_lr: NonNegativeFloat = 3e-5
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = Field(0.1, description="applied to matrices only")
    clip: NonNegativeFloat = Field(1.0, description="global gradient norm; 0 turns clipping off")
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    warmup_steps: NonNegativeInt = 100
    decay_steps: NonNegativeInt = Field(0, description="wsd only: the length of the final decay")
    implementation: Literal["torch", "apex"] = Field("torch", description="apex: the fused Adam of NVIDIA apex")

    @model_validator(mode="after")
    def _consistent(self) -> "Optim":
        if self.min_lr > self.lr:
            raise ValueError(f"optim.min_lr={self.min_lr} is larger than optim.lr={self.lr}")
        if self.decay_steps and self.schedule != "wsd":
            raise ValueError(f"optim.decay_steps={self.decay_steps} needs optim.schedule=wsd, not {self.schedule}")
        if self.schedule == "wsd" and not self.decay_steps:
            raise ValueError("optim.schedule=wsd needs optim.decay_steps > 0, not 0")
        return self


class Experts(Section):
    """Which implementation multiplies rows by expert weights."""

    backend: Literal["auto", "torch", "triton", "megablocks", "loop"] = "auto"


class Attention(Section):
    """Which implementation computes stick-breaking attention."""

    backend: Literal["auto", "csrc", "triton", "naive"] = "auto"


class Norm(Section):
    """Which implementation normalises."""

    backend: Literal["torch", "apex"] = Field("torch", description="apex: the fused layer norm of NVIDIA apex")


class Train(Section):
    """How long and in what portions. `micro_batch` and `global_batch` are in sequences."""

    steps: PositiveInt = 1000
    seq_len: PositiveInt = 512
    micro_batch: PositiveInt = 1
    global_batch: PositiveInt = 8
    precision: Literal["fp32", "bf16"] = "fp32"
    activation_checkpointing: Literal["none", "experts", "full"] = "none"
    eval_every: NonNegativeInt = Field(0, description="steps between evaluations; 0 evaluates at the end only")
    eval_batches: PositiveInt = Field(16, description="global batches per evaluation, of each validation source")
    loss_chunk: PositiveInt = Field(4096, description="tokens whose logits are in memory at one time")
    hang_timeout: float = Field(
        600.0,
        ge=0,
        le=1800,
        description="seconds without a sign of life from any rank after which the watchdog writes the stacks and ends "
        "the job; longer than any pause between two micro batches or two tensors of a checkpoint; 0 turns it off",
    )

    @model_validator(mode="after")
    def _portions(self) -> "Train":
        if self.global_batch % self.micro_batch:
            raise ValueError(
                f"train.global_batch={self.global_batch} is not divisible by train.micro_batch={self.micro_batch}"
            )
        return self

    def accumulation_steps(self, num_ranks: int) -> int:
        """Micro batches each of `num_ranks` data ranks runs per optimizer step; `RunConfig` has it for all ranks."""
        per_round = self.micro_batch * num_ranks
        if self.global_batch % per_round:
            raise ValueError(
                f"train.global_batch={self.global_batch} is not divisible by train.micro_batch={self.micro_batch} "
                f"x {num_ranks} data-parallel ranks = {per_round}"
            )
        return self.global_batch // per_round


class Parallel(Section):
    """The layout. `ep` ranks share one copy of the experts; `context` ranks share every sequence.

    The two are independent: every rank has tokens of its own and is an expert-parallel rank.
    """

    ep: PositiveInt = 1
    context: PositiveInt = Field(1, description="one sequence is split over this many consecutive ranks")
    attention_experts: Literal["auto", "move_tokens", "gather_weights"] = Field(
        "auto",
        description="with ep > 1, what travels for attention experts: the tokens, the experts' weights, or whichever "
        "is fewer bytes a step; MLP experts always have the tokens moved",
    )

    @model_validator(mode="after")
    def _something_travels(self) -> "Parallel":
        if self.ep == 1 and self.attention_experts != "auto":
            raise ValueError(
                f"parallel.attention_experts={self.attention_experts} needs parallel.ep above 1: with parallel.ep=1 "
                "every rank has all experts and nothing travels; leave it at auto"
            )
        return self

    def check(self, num_ranks: int, model: ModelConfig) -> None:
        """Raise ValueError unless `num_ranks` and the experts of `model` can be laid out with this `ep`."""
        if num_ranks % self.ep:
            raise ValueError(f"world size {num_ranks} is not divisible by parallel.ep={self.ep}")
        self.data_ranks(num_ranks)
        if model.kind == "gpt_neox" and self.context > 1:
            raise ValueError(
                f"parallel.context={self.context} splits sequences for stick-breaking attention, model.kind=gpt_neox "
                "has softmax attention: use parallel.context=1"
            )
        if not model.sparse:
            if self.ep > 1:
                raise ValueError(f"parallel.ep={self.ep} needs experts, but model.kind={model.kind} has none")
            return
        for layer in range(model.n_layer):
            for kind in ("attention", "mlp"):
                count = model.num_experts(layer, kind)
                if count < self.ep:
                    raise ValueError(
                        f"layer {layer} has {count} {kind} experts, parallel.ep={self.ep} is more: a rank without an "
                        f"expert would hold copies of everything else and compute nothing; parallel.ep={count} or less"
                    )

    def data_ranks(self, num_ranks: int) -> int:
        """How many groups of ranks read sequences of their own; ValueError unless `context` divides `num_ranks`."""
        if num_ranks % self.context:
            raise ValueError(f"world size {num_ranks} is not divisible by parallel.context={self.context}")
        return num_ranks // self.context


class Guards(Section):
    """Which updates are not made, decided by all ranks together before the optimizer is touched. A skipped batch is
    used up: parameters, moments, step and learning rate stay as if it had not been read."""

    skip_nonfinite: bool = Field(
        True, description="skip where loss or gradient is not finite; false: the run ends there, with exit code 1"
    )
    spike_zscore: NonNegativeFloat = Field(
        0.0,
        description="skip where the loss is this many robust standard deviations, (loss - median) / (1.4826 MAD), "
        "above the last spike_window losses; 0: never",
    )
    spike_window: int = Field(128, ge=3, description="losses that a spike is measured against; none before they are")
    max_skips: NonNegativeInt = Field(
        8,
        description="more skipped batches than this among the last skip_window, and the run goes back to the newest "
        "good checkpoint and jumps over the data read since",
    )
    skip_window: PositiveInt = Field(128, description="batches among which skipped ones are counted")
    max_rollbacks: NonNegativeInt = Field(2, description="in the life of a run; then it ends with exit code 1")

    @model_validator(mode="after")
    def _reachable(self) -> "Guards":
        if self.max_skips >= self.skip_window:
            raise ValueError(
                f"guards.max_skips={self.max_skips} is never exceeded within guards.skip_window={self.skip_window} "
                "batches: make the window larger"
            )
        return self


class Checkpoint(Section):
    """When checkpoints are written and which are kept."""

    every: NonNegativeInt = Field(500, description="steps between checkpoints; 0 writes one at the end only")
    keep: NonNegativeInt = Field(3, description="the newest N stay; 0 keeps all")
    keep_every: NonNegativeInt = Field(0, description="checkpoints at multiples of this step are never rotated out")
    resume: str = Field("auto", description="auto | never | path of a checkpoint or of a run directory")
    init_from: TextPath | None = Field(None, description="weights of another checkpoint to start a new run from")
    background: bool = Field(False, description="write while training goes on")
    previous_on_damage: bool = Field(
        False, description="on resume=auto, a damaged newest checkpoint is passed over for the one before"
    )


class Logging(Section):
    """What is recorded."""

    every: PositiveInt = Field(1, description="steps between lines of metrics.jsonl")
    module_load_every: NonNegativeInt = Field(10, description="steps between module load records; 0 turns them off")
    straggler_every: NonNegativeInt = Field(
        100, description="steps between comparisons of the ranks' own time, without waiting for others; 0: none"
    )
    straggler_factor: float = Field(
        1.5, gt=1, description="a rank that takes this many times the median's time is named in the log"
    )
    tensorboard: bool = True
    wandb: str | None = Field(None, description="W&B project; needs the wandb package")
    progress: bool = Field(True, description="a progress bar on a terminal; false: plain lines there too")


class RunConfig(Section):
    """Everything that defines a run. `deepspeed` is the name of a packaged JSON (`zero1`) or a path."""

    run: Run = Field(default_factory=Run)
    model: ModelConfig = Field(default_factory=ModelConfig)
    data: Data = Field(default_factory=Data)
    losses: Losses = Field(default_factory=Losses)
    tune: Tune = Field(default_factory=Tune)
    optim: Optim = Field(default_factory=Optim)
    train: Train = Field(default_factory=Train)
    experts: Experts = Field(default_factory=Experts)
    attention: Attention = Field(default_factory=Attention)
    norm: Norm = Field(default_factory=Norm)
    parallel: Parallel = Field(default_factory=Parallel)
    guards: Guards = Field(default_factory=Guards)
    checkpoint: Checkpoint = Field(default_factory=Checkpoint)
    logging: Logging = Field(default_factory=Logging)
    deepspeed: str = "zero1"

    @model_validator(mode="after")
    def _schedule_fits(self) -> "RunConfig":
        span = self.optim.warmup_steps + self.optim.decay_steps
        if span > self.train.steps:
            raise ValueError(
                f"optim.warmup_steps={self.optim.warmup_steps} + optim.decay_steps={self.optim.decay_steps} "
                f"= {span} is longer than train.steps={self.train.steps}"
            )
        return self

    @model_validator(mode="after")
    def _tunes_what_there_is(self) -> "RunConfig":
        if self.tune.strategy == "full":
            return self
        self.check_degree()
        if self.tune.strategy == "lora":
            return self._adapts_what_there_is()
        if not self.model.sparse:
            raise ValueError(
                f"tune.strategy={self.tune.strategy} needs experts, but model.kind={self.model.kind} has none"
            )
        if self.tune.rows_regularisation and self.losses.routing_regularisation:
            raise ValueError(
                f"tune.rows_regularisation={self.tune.rows_regularisation} and losses.routing_regularisation="
                f"{self.losses.routing_regularisation} measure rows of the same routers: give one of the two"
            )
        return self

    def check_degree(self) -> None:
        """Raise ValueError where what `tune` trains cannot be shared out over `parallel.ep` ranks."""
        if self.tune.strategy == "full" or self.parallel.ep == 1:
            return
        reason = (
            "every rank holds the adapters of all experts"
            if self.tune.strategy == "lora"
            else "inserted modules come last in their layers, so the last ranks would hold all that is trained"
        )
        raise ValueError(f"tune.strategy={self.tune.strategy} needs parallel.ep=1, not {self.parallel.ep}: {reason}")

    def _adapts_what_there_is(self) -> "RunConfig":
        if self.losses.routing_regularisation:
            raise ValueError(
                f"losses.routing_regularisation={self.losses.routing_regularisation} has no effect with "
                "tune.strategy=lora, which leaves routers as they are"
            )
        if self.tune.lora_rank >= (least := min(self.model.n_embd, self.model.att_hidden, self.model.ffd_hidden)):
            raise ValueError(
                f"tune.lora_rank={self.tune.lora_rank} is no low rank of matrices whose smaller side is {least}: "
                "use tune.strategy=full"
            )
        return self

    @model_validator(mode="after")
    def _computes_what_there_is(self) -> "RunConfig":
        if self.model.kind != "gpt_neox":
            return self
        for key, value, only in (
            ("attention.backend", self.attention.backend, "auto"),
            ("experts.backend", self.experts.backend, "auto"),
        ):
            if value != only:
                raise ValueError(f"{key}={value} has no effect on model.kind=gpt_neox: leave it at {only}")
        if self.train.activation_checkpointing == "experts":
            raise ValueError(
                "train.activation_checkpointing=experts needs experts, but model.kind=gpt_neox has none: use full"
            )
        return self

    @model_validator(mode="after")
    def _sequence_splits(self) -> "RunConfig":
        chunks = 2 * self.parallel.context
        if self.parallel.context > 1 and self.train.seq_len % chunks:
            raise ValueError(
                f"train.seq_len={self.train.seq_len} is not divisible by 2 x parallel.context={self.parallel.context} "
                f"= {chunks}: each rank takes two chunks of the sequence, an early and a late one"
            )
        return self

    def accumulation_steps(self, num_ranks: int) -> int:
        """Micro batches each of `num_ranks` ranks runs per optimizer step; ValueError where they do not come out even.

        The ranks that share a sequence run the same micro batches, each its part of them.
        """
        return self.train.accumulation_steps(self.parallel.data_ranks(num_ranks))

"""One training step of the real model on fake tensors, as one rank of a fake process group: its bytes, not its numbers.

Nothing is allocated and nobody is talked to, so the 8B model in a world of 64 fits any machine. What is real: the
modules, their operations (forward, recomputation, backward by autograd), the dispatchers' buffers, the collectives'
buffers. What stands in, because it needs numbers or DeepSpeed's engine:

* How many rows a rank receives from each other follows from `imbalance` times the even share, not from routing.
* State of the engine is made by the rules of its stage: shards of master weights and moments, the bucket that gradients
  are summed in, shards of gradients from stage 2 on, the copies of the update.
* At stage 3 the weights count as shards, and what is gathered while it is used is taken from the formula.

Shapes: B batch, T time, N tokens, K experts a token, R rows that this rank computes, P expert-parallel ranks.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from megamf.adapt.lora import attach
from megamf.config import RunConfig
from megamf.errors import UserError
from megamf.model import ModuleFormer
from megamf.model.backends import Backends
from megamf.model.dispatch import Dispatcher, Plan
from megamf.model.losses import auxiliary_loss, routing_norm
from megamf.model.objective import Objective
from megamf.model.router import Router
from megamf.model.tuning import Inserted, specialise
from megamf.ops.permutation import sort_by_expert
from megamf.parallel.context import make_context
from megamf.parallel.dispatch import AllToAllDispatcher, Transport, make_dispatchers
from megamf.parallel.mesh import Mesh
from megamf.plan.job import Job
from megamf.plan.live import LiveBytes
from megamf.plan.memory import gathered_parameters


@dataclass(frozen=True)
class FakeStep:
    """Bytes on one rank, counted tensor by tensor; names as in `megamf.plan.memory.RankMemory`."""

    weights: int
    optimizer: int
    gradients: int
    activations: int
    peak: int


class EvenDispatcher(AllToAllDispatcher):
    """Moves rows as the real one does, but knows beforehand how many: `imbalance` times the even share."""

    def __init__(self, group: dist.ProcessGroup, imbalance: float) -> None:
        super().__init__(group)
        self.imbalance = imbalance

    def plan(self, expert_NK: torch.Tensor, num_experts: int) -> Plan:
        order_R, inverse_R, _ = sort_by_expert(expert_NK, num_experts)
        copies = expert_NK.numel()
        receive_P = shares(round(copies * self.imbalance), self.num_ranks)
        index_R = order_R.new_empty(sum(receive_P))
        count_L = order_R.new_empty(num_experts // self.num_ranks)
        transport = Transport(shares(copies, self.num_ranks), receive_P, index_R, torch.empty_like(index_R))
        return Plan(order_R, inverse_R, count_L, expert_NK.shape[1], transport)


class KnownCounts(TorchDispatchMode):
    """A count has as many values as there are experts, which fake tensors cannot know."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.ops.aten.bincount.default:
            least = args[2] if len(args) > 2 else (kwargs or {})["minlength"]
            return args[0].new_empty(least)
        return func(*args, **(kwargs or {}))


def shares(total: int, parts: int) -> list[int]:
    """`total` in `parts` whole numbers that differ by at most one."""
    return [(total + part) // parts for part in range(parts)]


def fake_step(config: RunConfig, num_ranks: int, imbalance: float = 1.0, inserted: Inserted | None = None) -> FakeStep:
    """The bytes of rank 0 of `num_ranks` in one update. Raises ConfigError for a layout that the run would refuse.

    inserted: the modules that `config.tune` is about; without, a run that trains these counts as one of everything.
    Up to two micro batches are run: from the third on nothing changes.
    """
    job = Job.of(config, num_ranks, inserted=inserted)
    live = LiveBytes()
    with fake_process_group(num_ranks), FakeTensorMode(), KnownCounts(), live:
        engine = _Engine(job, live)
        with default_dtype(torch.bfloat16 if job.value_bytes == 2 else torch.float32):
            objective = Objective(_model(job, imbalance, inserted), config.train.loss_chunk).train()
        parameters = list(objective.parameters())
        engine.adopt(parameters, sum(parameter.nbytes for parameter in parameters))
        live.reset_peak()
        for turn in range(min(2, job.accumulation)):
            activations = _micro_batch(objective, job, live)
            engine.after_backward(last=turn + 1 == min(2, job.accumulation))
        gradients = engine.gradient_bytes
        engine.update()
        peak = live.peak
    return FakeStep(engine.weights, engine.optimizer, gradients, activations, peak + engine.unseen)


class _Engine:
    """What DeepSpeed holds beside the model, as fake tensors of the right sizes."""

    def __init__(self, job: Job, live: LiveBytes) -> None:
        self.job = job
        self.live = live
        self.bucket: list[torch.Tensor] = []
        self.shard: torch.Tensor | None = None
        self.weights = self.optimizer = self.gradient_bytes = self.unseen = 0

    def adopt(self, parameters: list[nn.Parameter], num_bytes: int) -> None:
        """Make the optimizer's state, and follow every gradient that becomes ready."""
        job, stage = self.job, self.job.engine.stage
        self.parameters = parameters
        size = job.shard_shared + job.shard_experts
        self.weights = num_bytes
        if stage == 3:
            self.weights = size * job.value_bytes
            self.unseen = self.weights + gathered_parameters(job) * job.value_bytes - num_bytes
        kept = 2 + (0 if stage == 0 and job.value_bytes == 4 else 1)
        self.state = [] if job.engine.offload_optimizer else [torch.empty(size) for _ in range(kept)]
        self.optimizer = sum(tensor.nbytes for tensor in self.state)
        for parameter in (parameter for parameter in parameters if parameter.requires_grad):
            parameter.register_post_accumulate_grad_hook(self._ready)

    def _ready(self, parameter: nn.Parameter) -> None:
        engine = self.job.engine
        if engine.stage and engine.contiguous and not self.bucket and (engine.stage > 1 or self.repeated):
            self._fill_bucket()
        if engine.stage >= 2:
            parameter.grad = None
            self._keep_shard()

    @property
    def repeated(self) -> bool:
        """Whether several micro batches make an update."""
        return self.job.accumulation > 1

    def _fill_bucket(self) -> None:
        count = 2 if self.job.engine.overlap else 1
        dtype = self.parameters[0].dtype
        self.bucket = [torch.empty(self.job.engine.bucket, dtype=dtype) for _ in range(count)]

    def _keep_shard(self) -> None:
        if self.shard is None:
            size = self.job.shard_shared + self.job.shard_experts
            self.shard = torch.empty(size, dtype=self.parameters[0].dtype)

    def after_backward(self, *, last: bool) -> None:
        """The reduction: at stage 1 when the last micro batch is over, at stage 2 it has been."""
        stage = self.job.engine.stage
        if last and stage == 1:
            if not self.bucket and self.job.engine.contiguous:
                self._fill_bucket()
            self._keep_shard()
        self.gradient_bytes = sum(p.grad.nbytes for p in self.parameters if p.grad is not None)
        if stage >= 2:
            assert self.shard is not None
            self.gradient_bytes = self.shard.nbytes
        if last and stage == 1:
            for parameter in self.parameters:
                parameter.grad = None
        if last or stage >= 2:
            self.bucket.clear()

    def update(self) -> None:
        """The largest parameter group's gradient, copied flat, and in bf16 once more in fp32."""
        job = self.job
        if job.engine.stage == 0 or job.engine.offload_optimizer:
            return
        size = max(job.shard_shared, job.shard_experts)
        flat = [torch.empty(size, dtype=self.parameters[0].dtype)]
        if job.value_bytes == 2:
            flat.append(torch.empty(size))
        flat.clear()


def _model(job: Job, imbalance: float, inserted: Inserted | None) -> ModuleFormer:
    config = job.config
    mesh = _mesh(job)
    recomputed = config.train.activation_checkpointing == "full"
    attention, mlp = make_dispatchers(mesh, job.attention_experts, recomputed=recomputed)
    even: Dispatcher = EvenDispatcher(mesh.ep_group, imbalance) if job.ep > 1 else mlp
    model = ModuleFormer(
        config.model,
        even,
        Backends.of(config),
        make_context(mesh, recomputed=recomputed),
        attention_dispatcher=even if attention is mlp else attention,
    )
    model.set_activation_checkpointing(config.train.activation_checkpointing)
    if job.tuned:
        specialise(model, config.tune, inserted or {})
        attach(model, config.tune, config.run.seed)
    return model


def _mesh(job: Job) -> Mesh:
    groups = [dist.new_group(list(range(group.size))) for group in (job.expert_group, job.context_group)]
    replicas = dist.new_group(list(range(0, job.num_ranks, job.ep)))
    context = groups[1] if job.context > 1 else None
    return Mesh(0, job.num_ranks, job.ep, groups[0], replicas, job.context, context)


def _micro_batch(objective: Objective, job: Job, live: LiveBytes) -> int:
    """Forward and backward; returns the bytes that the forward pass left for the backward pass."""
    config = job.config
    B, T = config.train.micro_batch, config.train.seq_len // job.context
    input_BT, label_BT = torch.zeros(B, T, dtype=torch.int64), torch.zeros(B, T, dtype=torch.int64)
    start_BT = torch.zeros(B, T, dtype=torch.int32) if config.data.document_mask else None
    before = live.now
    loss, sums, _ = objective(input_BT, label_BT, start_BT)
    if sums is not None:
        loss = loss + auxiliary_loss(sums, sums, config.losses)
        if config.losses.routing_regularisation:
            routers = [module for module in objective.modules() if isinstance(module, Router)]
            loss = loss + routing_norm([router.expert_rows() for router in routers])
    del sums
    kept = live.now - before
    loss.backward()
    return kept


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Modules made within it are of `dtype`."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(usual)


@contextmanager
def fake_process_group(num_ranks: int) -> Iterator[None]:
    """This process as rank 0 of `num_ranks`, whose collectives do nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise UserError("a fake world cannot be made inside a process group: start one process, without torchrun")
    with ExitStack() as stack:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=num_ranks)
        stack.callback(dist.destroy_process_group)
        yield

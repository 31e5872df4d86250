"""The loop, and only the loop: batches in, updates out. Everything optional is a callback.

Shapes: B batch, T time, M routers, E experts.

Scaling: the engine averages gradients over all ranks and accumulation steps. A loss that is a sum of shares over ranks
and accumulation steps is therefore multiplied by (ranks x accumulation steps), so that the gradient is the one on the
global batch, whatever the layout.
"""

import hashlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
import torch.distributed as dist

from megamf import faults
from megamf.adapt.lora import attach
from megamf.callbacks.base import Callback
from megamf.config import RunConfig
from megamf.data.loader import MicroBatch, StepLoader
from megamf.guards import UpdateGuard
from megamf.heartbeat import beat
from megamf.model import ModuleFormer
from megamf.model.losses import Packed, auxiliary_loss
from megamf.model.objective import Objective
from megamf.model.router import Router
from megamf.model.tuning import Inserted, specialise
from megamf.parallel.dispatch import make_dispatchers
from megamf.parallel.mesh import create_mesh
from megamf.parallel.state import create_moments, torch_optimizer
from megamf.parallel.stopwatch import Stopwatch
from megamf.parallel.traffic import attention_strategy
from megamf.parallel.update import gradient_square, skip_update
from megamf.parallel.zero import build_engine, build_model, clip_gradients
from megamf.points import reach
from megamf.schedule import learning_rate


@dataclass
class StepResult:
    """One update, the same on every rank; or one that was not made, and `skipped` says why. `loss` is the mean cross
    entropy of the global batch in nats; `aux_loss` everything that was added to it; `router_sums` the statistics of the
    whole global batch (None when dense)."""

    step: int
    tokens: int
    loss: float
    aux_loss: float
    lr: float
    grad_norm: float
    seconds: float
    router_sums: Packed | None
    skipped: str | None = None


class Trainer:
    """Builds model and engine for this rank's place in the grid and trains. Collective in every method.

    `loader` is what `fit` reads from; None for those who bring their own batches to `train_step`. `inserted`: the
    modules that `config.tune` may be about.
    """

    def __init__(
        self,
        config: RunConfig,
        loader: StepLoader | None,
        callbacks: Sequence[Callback] = (),
        inserted: Inserted = MappingProxyType({}),
    ) -> None:
        self.config = config
        self.loader = loader
        self.callbacks = list(callbacks)
        self.mesh = create_mesh(config.parallel.ep, config.parallel.context)
        self.accumulation = config.accumulation_steps(self.mesh.world)
        self.step = 0
        self.consumed = 0  # the place in the data: samples read by all ranks, also those of batches that were skipped
        self.guard = UpdateGuard(config.guards)
        self.stop_requested = False
        self.stopping = False

        beat("model")
        recomputed = config.train.activation_checkpointing == "full"
        self.dispatchers = make_dispatchers(
            self.mesh,
            attention_strategy(config, self.mesh.world),
            recomputed=recomputed,
        )
        model = build_model(config, self.mesh, self.dispatchers)
        model.set_activation_checkpointing(config.train.activation_checkpointing)
        specialise(model, config.tune, inserted)
        attach(model, config.tune, config.run.seed)
        # A configuration has one of the two.
        self.row_weight = config.losses.routing_regularisation + config.tune.rows_regularisation
        rows = "none" if not self.row_weight else "inserted" if config.tune.rows_regularisation else "all"
        objective = Objective(model, config.train.loss_chunk, measure_rows=rows)
        beat("engine")
        self.engine = build_engine(objective, config, self.mesh)
        beat("moments")
        create_moments(self.engine)
        self.objective: Objective = self.engine.module
        self.model: ModuleFormer = self.objective.model
        self.device = next(self.model.parameters()).device
        self.stopwatch = Stopwatch(self.device)
        self.routers = [module for module in self.model.modules() if isinstance(module, Router)]

    @property
    def is_main(self) -> bool:
        """True on the rank that writes and prints."""
        return self.mesh.rank == 0

    @property
    def tokens(self) -> int:
        """Tokens behind the updates made so far, of all ranks; batches that were skipped are not among them."""
        return self.step * self.config.train.global_batch * self.config.train.seq_len

    def fit(self) -> None:
        """Train until `train.steps` updates are made or a stop is agreed on."""
        for callback in self.callbacks:
            callback.on_train_start(self)
        self.agree_to_stop()
        while self.step < self.config.train.steps and not self.stopping:
            self.stopwatch.start()
            reach("data", step=self.step + 1)
            result = self.train_step(self.loader.step(self.consumed))
            self.stopwatch.stop()
            if result is None:
                break
            for callback in self.callbacks:
                if result.skipped:
                    callback.on_skip(self, result)
                else:
                    callback.on_step_end(self, result)
        reach("end")
        for callback in self.callbacks:
            callback.on_train_end(self)

    def agree_to_stop(self) -> bool:
        """Whether any rank was asked to stop; from then on `stopping`, and the same on every rank. Collective."""
        self.stopping = self.total(torch.tensor(float(self.stop_requested or self.stopping))).item() > 0
        return self.stopping

    def train_step(self, batches: Sequence[MicroBatch]) -> StepResult | None:
        """One update on this rank's micro batches of the global batch that `consumed` stands at.

        What is known of it by then, on all ranks, decides before the optimizer is touched whether it is made. None
        where a stop was agreed on before any work.
        """
        began = time.perf_counter()
        labels = sum(int((batch.label_BT != -100).sum()) for batch in batches)
        failing = any(callback.failing for callback in self.callbacks)
        facts = torch.tensor([labels, self.stop_requested, failing], dtype=torch.float64)
        num_labels, asked, failing = self.total(facts).tolist()
        self.stopping = asked > 0
        if failing:
            for callback in self.callbacks:
                callback.on_failure(self)
        if self.stopping:
            return None
        self.engine.train()
        torch.manual_seed(step_seed(self.config.run.seed, self.step, self.mesh.rank))
        rate = learning_rate(self.config.optim, self.step, self.config.train.steps)
        for group in torch_optimizer(self.engine).param_groups:
            group["lr"] = rate

        scope = self.global_router_sums(batches)
        shares = self.mesh.world * self.accumulation

        cross_entropy = torch.zeros((), dtype=torch.float64, device=self.device)
        auxiliary = torch.zeros_like(cross_entropy)
        seen: Packed | None = None
        for last, batch in ((i == len(batches) - 1, batch) for i, batch in enumerate(batches)):
            reach("forward")
            loss_sum, local, row_norm = self.engine(*self.on_device(batch))
            loss_sum = faults.spoil("loss", loss_sum)
            loss = loss_sum / num_labels * shares
            cross_entropy += loss_sum.detach() / num_labels
            if local is not None:
                added, value, summed = self.added_losses(local, scope, row_norm)
                loss = loss + added
                auxiliary += value / shares
                seen = summed if seen is None else seen.with_flat(seen.flat() + summed.flat())
            reach("backward", model=self.model)
            self.engine.backward(loss)
            reach("gradients")
            if not last:
                self.engine.step()

        asked = torch.full_like(cross_entropy, float(self.stop_requested))
        figures = [cross_entropy, auxiliary, gradient_square(self.engine, self.mesh), asked]
        loss, aux_loss, square, asked = self.total(torch.stack(figures)).tolist()
        norm = math.sqrt(square) if square >= 0 else math.nan
        self.stopping = asked > 0
        self.consumed += self.config.train.global_batch
        skipped = self.guard.judge(loss, aux_loss, norm)
        if skipped:
            skip_update(self.engine)
        else:
            norm = self.update()
            reach("step")
            self.step += 1
            seen = None if seen is None else self.whole_batch_sums(seen)
        seconds = time.perf_counter() - began
        return StepResult(self.step, self.tokens, loss, aux_loss, rate, norm, seconds, seen, skipped)

    def update(self) -> float:
        """Clip and step; returns the gradient norm that was clipped by."""
        if self.engine.zero_optimization_stage() == 0:
            norm = clip_gradients(self.engine, self.mesh, self.config.optim.clip)
            self.engine.step()
            return norm.item()
        self.engine.step()
        return float(self.engine.get_global_grad_norm())

    def added_losses(
        self, local: Packed, scope: Packed | None, row_norm: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, Packed]:
        """What one micro batch adds to the engine's loss, the value to report, and the sums it was evaluated at.

        The value is that of the whole scope, the same for every share; the gradient is that of this share.
        """
        losses = self.config.losses
        if losses.scope == "rank":
            scope, factor = local, 1
        elif scope is None:
            scope, factor = local.with_flat(self.total(local.flat())), self.mesh.world
        else:
            factor = self.mesh.world * self.accumulation
        value = auxiliary_loss(local, scope, losses)
        added = value * factor
        if row_norm is not None:
            # No share but the whole, on every rank: the engine's average leaves it as it is.
            norm = self.row_weight * row_norm
            added, value = added + norm, value + norm
        return added, value.detach(), scope

    def global_router_sums(self, batches: Sequence[MicroBatch]) -> Packed | None:
        """Exact sums over the global batch before its first gradient; None where one micro batch a rank is all of it.

        With accumulation this costs a forward pass of every micro batch, with the random numbers of the real one.
        """
        if self.config.losses.scope != "global_batch" or self.accumulation == 1 or not self.routers:
            return None
        state = random_state(self.device)
        total: Packed | None = None
        with torch.no_grad():
            for batch in batches:
                input_BT, _, start_BT = self.on_device(batch)
                _, sums, _ = self.objective(input_BT, None, start_BT)
                total = sums if total is None else total.with_flat(total.flat() + sums.flat())
        restore_random_state(self.device, state)
        return total.with_flat(self.total(total.flat()))

    def whole_batch_sums(self, seen: Packed) -> Packed:
        """Sums over the global batch from the scopes that the losses used (added up over the micro batches)."""
        if self.config.losses.scope == "rank":
            return seen.with_flat(self.total(seen.flat()))
        if self.config.losses.scope == "global_batch" and self.accumulation > 1:
            return seen.with_flat(seen.flat() / self.accumulation)
        return seen

    def on_device(self, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """input_BT, label_BT, start_BT where the model is."""
        start_BT = None if batch.start_BT is None else batch.start_BT.to(self.device, non_blocking=True)
        input_BT = batch.input_BT.to(self.device, non_blocking=True)
        return input_BT, batch.label_BT.to(self.device, non_blocking=True), start_BT

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over all ranks."""
        values = values.to(self.device)
        if self.mesh.world > 1:
            dist.all_reduce(values)
        return values


def step_seed(seed: int, step: int, rank: int) -> int:
    """Random numbers of a step depend on nothing that came before it, so there is no random state to save."""
    digest = hashlib.blake2b(f"{seed}:{step}:{rank}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def random_state(device: torch.device) -> list[torch.Tensor]:
    """The generators' states that a forward pass may advance."""
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])


def restore_random_state(device: torch.device, state: list[torch.Tensor]) -> None:
    """Undo what advanced them."""
    torch.set_rng_state(state[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[1], device)

"""From a validated configuration to a trainer with its data and callbacks: every check that needs no training."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from megamf.adapt.lora import needs_peft, require_peft
from megamf.apex import fused_adam
from megamf.callbacks.checkpointing import Checkpointing, find_resume, inserted_modules
from megamf.callbacks.evaluation import Evaluation, Part
from megamf.callbacks.guards import Guarding
from megamf.callbacks.metrics import Metrics, require_wandb
from megamf.callbacks.preemption import Preemption
from megamf.callbacks.progress import ProgressDisplay
from megamf.callbacks.stragglers import Stragglers
from megamf.checkpoint import resolve
from megamf.config import ConfigError, RunConfig
from megamf.data.loader import StepLoader, document_end, open_train, open_valid, valid_bytes_per_token
from megamf.model.backends import Backends
from megamf.ops import backend, grouped_linear, stickbreaking
from megamf.parallel.launch import Process, process_group
from megamf.parallel.zero import deepspeed_config
from megamf.points import reach
from megamf.rundir import check_writable, claim
from megamf.trainer import Trainer
from megamf.watchdog import Watchdog


def check(config: RunConfig, num_ranks: int) -> None:
    """Everything about the configuration and this number of ranks that can be known before work starts."""
    try:
        config.parallel.check(num_ranks, config.model)
        config.accumulation_steps(num_ranks)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    deepspeed_config(config, num_ranks)
    require_wandb(config)
    Backends.of(config)
    if config.optim.implementation == "apex":
        fused_adam()
    if needs_peft(config.model, config.tune):
        require_peft()
    if not config.data.train:
        raise ConfigError("data.train is empty: give at least one {path, weight}")


@contextmanager
def build_trainer(
    config: RunConfig, process: Process, preemption: Preemption | None = None
) -> Iterator[tuple[Trainer, Preemption]]:
    """Data, process group, model, engine and callbacks; closes what it opened when the block ends. Collective.

    Without `preemption`, which has noted signals for some time, one that notes them from here on is made.
    Whatever can be wrong with the input is found, on every rank alike, before the ranks meet.
    """
    reach("start", step=0)
    check(config, process.world)
    check_backends(config, process)
    train, valid = open_train(config), open_valid(config)
    find_resume(config.checkpoint.resume, config.run.dir / "checkpoints")
    if config.checkpoint.init_from is not None:
        resolve(config.checkpoint.init_from)
    inserted = inserted_modules(config)
    check_writable(config.run.dir)
    claim(config, write=process.rank == 0)
    with ExitStack() as stack:
        # Entered first, left last: leaving the process group may hang as well.
        stack.enter_context(Watchdog(config.run.dir, process.rank, process.world, config.train.hang_timeout))
        preemption = preemption or stack.enter_context(Preemption())
        loader = stack.enter_context(step_loader(train, config, process))
        checkpointing = Checkpointing(config)
        # The guards come last: what made them go back is recorded before.
        callbacks = [
            checkpointing,
            preemption,
            Metrics(config),
            ProgressDisplay(config.logging.progress),
            Guarding(config.guards, checkpointing),
        ]
        if valid:
            loaders = [stack.enter_context(step_loader(item.blend, config, process)) for item in valid]
            parts = [Part(item.name, item.share, loader) for item, loader in zip(valid, loaders)]
            callbacks.append(Evaluation(parts, valid_bytes_per_token(config)))
        stack.enter_context(process_group(process))
        stack.push(lambda kind, error, trace: checkpointing.writer.leave() if error is not None else None)
        trainer = Trainer(config, loader, callbacks, inserted)
        if config.logging.straggler_every and process.world > 1:
            stack.enter_context(trainer.stopwatch)
            trainer.callbacks.append(Stragglers(config.logging))
        yield trainer, preemption


def check_backends(config: RunConfig, process: Process) -> None:
    """Raises UserError for a backend that does not run on this process's device."""
    attention, experts = config.attention.backend, config.experts.backend
    compiled = backend.compiled(process.device)
    if config.model.kind != "gpt_neox":
        backend.choose("stickbreaking_attention", attention, process.device, stickbreaking.IMPLEMENTATIONS, compiled)
    if config.model.sparse:
        backend.choose("grouped_linear", experts, process.device, grouped_linear.IMPLEMENTATIONS, "torch")


def step_loader(blend, config: RunConfig, process: Process) -> StepLoader:
    """This rank's share of every global batch."""
    context = config.parallel.context
    return StepLoader(
        blend,
        global_batch=config.train.global_batch,
        micro_batch=config.train.micro_batch,
        rank=process.rank // context,
        num_ranks=config.parallel.data_ranks(process.world),
        eod_id=document_end(config),
        document_mask=config.data.document_mask,
        context_rank=process.rank % context,
        context=context,
    )

"""Resuming and saving, in the one on-disk format."""

import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor

from megamf.adapt.fold import adapters_of, check_adapters
from megamf.adapt.lora import is_adapter
from megamf.callbacks.base import Callback
from megamf.callbacks.module_load import module_load
from megamf.checkpoint import (
    BackgroundWriter,
    Checkpoint,
    DamagedCheckpoint,
    Module,
    abort,
    begin,
    check_model,
    finish,
    latest,
    list_steps,
    module_table,
    newest_good,
    resolve,
    rotate,
    snapshot,
    sweep,
    verify,
    write_rank,
)
from megamf.checkpoint.layout import step_path, temporary_name
from megamf.config import RunConfig, to_tree
from megamf.data.loader import tokenizer_record
from megamf.errors import UserError
from megamf.heartbeat import beat
from megamf.model.losses import Packed
from megamf.parallel.state import (
    expected_names,
    global_shapes,
    load_state,
    load_weights,
    missing_state,
    optimizer_step,
    owned_state,
    refresh_masters,
)

if TYPE_CHECKING:
    from megamf.trainer import StepResult, Trainer


class Checkpointing(Callback):
    """Resumes at the start, saves every `checkpoint.every` steps, when asked to stop, and at the end."""

    def __init__(self, config: RunConfig) -> None:
        self.root = config.run.dir / "checkpoints"
        self.settings = config.checkpoint
        self.writer = BackgroundWriter()
        self.buffers: dict[str, Tensor] | None = {} if config.checkpoint.background else None
        self.modules: list[Module] = _fresh_modules(config)
        self.tokenizer = tokenizer_record(config)
        self.saved: tuple[int, int] | None = None
        self.router_sums: Packed | None = None
        self.resumed_from: Path | None = None

    def on_train_start(self, trainer: "Trainer") -> None:
        self._on_main(trainer, lambda: sweep(self.root))
        path = self._on_main(trainer, lambda: find_resume(self.settings.resume, self.root))
        if path is not None:
            self._resume(trainer, path)
        elif self.settings.init_from is not None:
            self._start_from(trainer, self.settings.init_from)

    def on_step_end(self, trainer: "Trainer", result: "StepResult") -> None:
        self.router_sums = result.router_sums
        due = self.settings.every and result.step % self.settings.every == 0
        if due or result.step == trainer.config.train.steps:
            self.save(trainer)

    def on_train_end(self, trainer: "Trainer") -> None:
        if trainer.stopping:
            self.save(trainer)
        self._together(self.writer.close)

    @property
    def failing(self) -> bool:
        """Whether a background save has failed on this rank, and nobody has been told."""
        return self.writer.failed

    def on_failure(self, trainer: "Trainer") -> None:
        self._together(self.writer.wait)

    def save(self, trainer: "Trainer") -> None:
        """Write a checkpoint of this step, if it is not written. Collective; every rank raises if one rank fails."""
        if self.saved == (trainer.step, trainer.consumed):
            return
        step = trainer.step
        self._together(self.writer.wait)
        if self.router_sums is not None:
            self._note_load(step, self.router_sums)
        nonce = broadcast(uuid.uuid4().hex)
        tmp = self.root / temporary_name(step, nonce)
        self._together(lambda: begin(self.root, step, nonce), undo=lambda: abort(tmp))
        # All collectives come before the first byte is written: a rank that meets a full disk leaves nobody waiting.
        tensors = snapshot(owned_state(trainer.engine, trainer.mesh), self.buffers)
        state, model = training_state(trainer) | {"tokenizer": self.tokenizer}, to_tree(trainer.config)["model"]
        expected = expected_names(trainer.engine)
        run_id = state["run_id"]

        def write() -> None:
            write_rank(tmp, trainer.mesh.rank, tensors)

        def publish() -> None:
            world = trainer.mesh.world
            finish(tmp, self.root, step, world, state, self.modules, model, run_id=run_id, expected=expected)
            rotate(self.root, self.settings.keep, self.settings.keep_every)

        if self.settings.background:
            self.writer.submit(lambda: (write(), publish() if trainer.is_main else None))
        else:
            self._together(write, undo=lambda: abort(tmp))
            self._on_main(trainer, publish)
        self.saved = (step, trainer.consumed)

    def roll_back(self, trainer: "Trainer") -> Path | None:
        """Load the newest good checkpoint of this run, keep the place in the data, and write that state in its stead.

        Returns what was loaded, None where there is none. Collective.
        """
        self._together(self.writer.wait)
        for step in reversed(self._on_main(trainer, lambda: list_steps(self.root))):
            path = step_path(self.root, step)
            if not self._problems(trainer, path):
                break
        else:
            return None
        consumed = trainer.consumed
        with Checkpoint(path) as checkpoint:
            state = self._load(trainer, checkpoint)
        trainer.guard.rolled_back(state.get("guard", {}))
        trainer.consumed = consumed
        # A run that is killed and started again must not meet the same data again.
        self.router_sums = None
        self.save(trainer)
        return path

    def _load(self, trainer: "Trainer", checkpoint: Checkpoint) -> dict[str, Any]:
        state = checkpoint.state
        load_state(trainer.engine, checkpoint, int(state["optimizer_step"]))
        trainer.step, trainer.consumed = int(state["step"]), int(state["consumed_samples"])
        self.modules = checkpoint.modules or self.modules
        return state

    def _resume(self, trainer: "Trainer", path: Path) -> None:
        path = self._verified(trainer, path)
        with Checkpoint(path) as checkpoint:
            check_adapters(checkpoint, trainer.config.tune, begins=False)
            check_model(checkpoint, global_shapes(trainer.model))
            check_resumable(checkpoint)
            check_trained(checkpoint, missing_state(trainer.engine, checkpoint))
            check_batches(checkpoint.state, trainer.config)
            state = self._load(trainer, checkpoint)
        trainer.guard.restore(state.get("guard", {}))
        self.resumed_from = path
        own = path.parent.resolve() == self.root.resolve()
        self.saved = (trainer.step, trainer.consumed) if own else None

    def _start_from(self, trainer: "Trainer", path: Path) -> None:
        path = self._verified(trainer, self._on_main(trainer, lambda: resolve(path)))
        with Checkpoint(path) as checkpoint:
            check_adapters(checkpoint, trainer.config.tune, begins=True)
            shapes = global_shapes(trainer.model)
            if adapters_of(checkpoint) is None:
                shapes = {key: shape for key, shape in shapes.items() if not is_adapter(key)}
            check_model(checkpoint, shapes)
            load_weights(trainer.model, checkpoint)
            refresh_masters(trainer.engine)
            self.modules = checkpoint.modules or self.modules

    def _verified(self, trainer: "Trainer", path: Path) -> Path:
        """The path itself if every byte is right, the one before if that was asked for; else DamagedCheckpoint."""
        problems = self._problems(trainer, path)
        if not problems:
            return path
        found = problems[0]
        before = self._on_main(trainer, lambda: _earlier(path))
        if self.settings.previous_on_damage and before is not None:
            if trainer.is_main:
                print(f"megamf: {path / found[0]} {found[1]}; resuming from {before} instead", flush=True)
            return before
        advice = (
            f"The good one before is {before}: set checkpoint.previous_on_damage=true"
            if before
            else ("There is no good one before it")
        )
        raise DamagedCheckpoint(path, found[0], found[1], advice)

    def _problems(self, trainer: "Trainer", path: Path) -> list[tuple[str, str]]:
        """(file, what is wrong) of a checkpoint, found by all ranks together, the same on all."""
        problems = verify(path, rank=trainer.mesh.rank, num_ranks=trainer.mesh.world, progress=lambda _: beat("verify"))
        everyone: list[Any] = [None] * trainer.mesh.world
        dist.all_gather_object(everyone, [(problem.file, problem.what) for problem in problems])
        return [item for share in everyone for item in share]

    def _note_load(self, step: int, sums: Packed) -> None:
        rows = {(record["layer"], record["kind"]): record["load"] for record in module_load(sums)}
        self.modules = [
            row.model_copy(update={"load": {"step": step, "share": rows[row.layer, row.kind][row.index]}})
            for row in self.modules
        ]

    def _together(self, action: Any, undo: Any = None) -> Any:
        """Run on every rank; if it fails on one, all undo and raise."""
        value, failure = None, None
        try:
            value = action()
        except Exception as error:
            failure = error
        failures: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(failures, None if failure is None else str(failure))
        first = next(((rank, text) for rank, text in enumerate(failures) if text is not None), None)
        if first is None:
            return value
        if undo is not None:
            undo()
        if failure is not None:
            raise failure
        raise UserError(f"rank {first[0]}: {first[1]}")

    def _on_main(self, trainer: "Trainer", action: Any) -> Any:
        """Run on rank 0 and give its result to all; if it fails, all raise."""
        value = self._together(lambda: action() if trainer.is_main else None)
        return broadcast(value)


def find_resume(resume: str, root: Path) -> Path | None:
    """What `checkpoint.resume` means for a run whose checkpoints are in `root`."""
    newest = latest(root)
    if resume == "auto":
        return newest
    if resume == "never":
        if newest is not None:
            raise UserError(
                f"checkpoint.resume=never, but {root} already holds {newest.name}: "
                "choose another run.dir, or checkpoint.resume=auto to go on"
            )
        return None
    # An interrupted run that once started from elsewhere goes on from its own checkpoints.
    return newest or resolve(Path(resume))


def check_resumable(checkpoint: Checkpoint) -> None:
    """Weights alone (an import, a merge) are no run to go on with; raises UserError."""
    if "optimizer_step" not in checkpoint.state or not checkpoint.names("exp_avg"):
        raise UserError(
            f"{checkpoint.path} holds weights without the state of a run: it cannot be resumed; "
            f"start a new run from it with checkpoint.init_from={checkpoint.path} and checkpoint.resume=auto"
        )


def check_trained(checkpoint: Checkpoint, missing: list[str]) -> None:
    """A run that trains more than the checkpoint's did is another run; raises UserError."""
    if missing:
        strategy = checkpoint.state.get("config", {}).get("tune", {}).get("strategy", "full")
        raise UserError(
            f"{checkpoint.path} has no moments for {len(missing)} of the tensors that this run trains, the first being "
            f"{missing[0]}: it was trained with tune.strategy={strategy}; keep its tune section, or start a new run "
            f"from its weights with checkpoint.init_from={checkpoint.path}"
        )


def inserted_modules(config: RunConfig) -> dict[tuple[int, str], int]:
    """(layer, kind) -> inserted modules of the checkpoint that this run starts or goes on from; empty unless tuned.

    Those of the last insertion, or of all (`tune.inserted`). Raises UserError where there is no such checkpoint, no
    such module, or one before a module that is none.
    """
    strategy = config.tune.strategy
    if strategy == "full":
        return {}
    path = find_resume(config.checkpoint.resume, config.run.dir / "checkpoints") or config.checkpoint.init_from
    if path is None and strategy == "lora":
        raise UserError(
            "tune.strategy=lora adapts a trained model, but this run starts from nothing: give checkpoint.init_from"
        )
    if strategy == "lora":
        return {}
    if path is None:
        raise UserError(
            f"tune.strategy={strategy} trains inserted modules, but this run starts from nothing: give "
            "checkpoint.init_from, a checkpoint made by `megamf modules insert`"
        )
    path, table = _table(resolve(path), config.checkpoint.previous_on_damage)
    rows = [row for row in table if row.provenance == "inserted"]
    first = 0 if config.tune.inserted == "all" else max((row.generation for row in rows), default=0)
    trained = {row.id for row in rows if row.generation >= first}
    found: dict[tuple[int, str], int] = {}
    for row in sorted(table, key=lambda row: (row.layer, row.kind, row.index)):
        place = row.layer, row.kind
        if row.id in trained:
            found[place] = found.get(place, 0) + 1
        elif place in found:
            raise UserError(
                f"{path}: module {row.id} comes after inserted ones of its layer; tune.strategy={strategy} needs the "
                "inserted modules last"
            )
    if not found:
        raise UserError(
            f"{path} has no inserted modules, which tune.strategy={strategy} would train: make some with "
            "`megamf modules insert`, or use tune.strategy=full"
        )
    return found


def _table(path: Path, previous_on_damage: bool) -> tuple[Path, list[Module]]:
    """The module table of a step, or of the good one before where that is what a damaged one is passed over for."""
    try:
        with Checkpoint(path) as checkpoint:
            return path, checkpoint.modules
    except DamagedCheckpoint:
        before = _earlier(path) if previous_on_damage else None
        if before is None:
            raise
        return _table(before, previous_on_damage)


def check_batches(state: dict[str, Any], config: RunConfig) -> None:
    """Steps and the place in the data count in global batches: another size would make another run of it."""
    for key in ("global_batch", "seq_len"):
        before, now = state["config"]["train"][key], getattr(config.train, key)
        if before != now:
            raise UserError(
                f"the checkpoint was trained with train.{key}={before}, this run says {now}: "
                "keep it, or start a new run from its weights with checkpoint.init_from"
            )


def training_state(trainer: "Trainer") -> dict[str, Any]:
    """state.json: everything beside tensors that a run needs to go on."""
    config = trainer.config
    return {
        "step": trainer.step,
        "consumed_samples": trainer.consumed,
        "consumed_tokens": trainer.tokens,
        "guard": trainer.guard.state(),
        "optimizer_step": optimizer_step(trainer.engine),
        "scheduler": {"kind": "function of the step", "schedule": config.optim.schedule, "steps": config.train.steps},
        "random_state": {"kind": "derived from (seed, step, rank) at every step", "seed": config.run.seed},
        "run_id": run_id(config.run.dir),
        "config": to_tree(config),
        "layout": {
            "world": trainer.mesh.world,
            "ep": trainer.mesh.ep,
            "context": trainer.mesh.context,
            "zero_stage": trainer.engine.zero_optimization_stage(),
        },
    }


def run_id(directory: Path) -> str:
    """Derived from `run.dir` as it was given, so that all checkpoints of one run share it."""
    return uuid.uuid5(uuid.NAMESPACE_URL, str(directory)).hex


def broadcast(value: Any) -> Any:
    """Rank 0's value on every rank. Only values of this run's own processes travel here, never file contents."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _fresh_modules(config: RunConfig) -> list[Module]:
    model = config.model
    if not model.sparse:
        return []
    attention, mlp = ([model.num_experts(i, kind) for i in range(model.n_layer)] for kind in ("attention", "mlp"))
    return module_table(model.n_layer, attention, mlp)


def _earlier(path: Path) -> Path | None:
    return newest_good(path.parent, before=int(path.name.removeprefix("step-")))

"""What a run leaves behind to look at: metrics.jsonl, TensorBoard, Weights & Biases. Rank 0 writes."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from megamf.callbacks.base import Callback
from megamf.callbacks.hottest import hottest_rank
from megamf.callbacks.module_load import load_summary, module_load
from megamf.config import ConfigError, RunConfig, to_tree
from megamf.plan import mfu, peak_flops, train_flops_per_token

if TYPE_CHECKING:
    from megamf.trainer import StepResult, Trainer


class Metrics(Callback):
    """One JSON object a logged step (and one an evaluation) to metrics.jsonl and to the sinks."""

    def __init__(self, config: RunConfig) -> None:
        self.path = config.run.dir / "metrics.jsonl"
        self.config = config
        self.sinks: list[Sink] = []
        self.file: TextIO | None = None
        self.tokens_since, self.seconds_since = 0, 0.0

    def on_train_start(self, trainer: "Trainer") -> None:
        self.flops_per_token = train_flops_per_token(self.config.model, self.config.train.seq_len)
        if not trainer.is_main:
            return
        # All ranks of a CPU run share one machine's cores in the usual case; the peak is that of this process.
        dtype = next(trainer.model.parameters()).dtype
        self.peak = peak_flops(trainer.device, dtype) * trainer.mesh.world
        self.path.parent.mkdir(parents=True, exist_ok=True)
        forget_after(self.path, trainer.step, trainer.consumed)
        self.file = self.path.open("a", encoding="utf-8")
        if self.config.logging.tensorboard:
            self.sinks.append(TensorBoard(self.config.run.dir / "tensorboard", trainer.step))
        if self.config.logging.wandb:
            self.sinks.append(WandB(self.config))

    def on_step_end(self, trainer: "Trainer", result: "StepResult") -> None:
        self.tokens_since += self.config.train.global_batch * self.config.train.seq_len
        self.seconds_since += result.seconds
        last = result.step == self.config.train.steps
        if result.step % self.config.logging.every and not last:
            return
        hottest = hottest_rank(trainer)
        if self.file is None:
            return
        speed = self.tokens_since / self.seconds_since
        record: dict[str, Any] = {
            "step": result.step,
            "tokens": result.tokens,
            "loss": result.loss,
            "aux_loss": result.aux_loss,
            "lr": result.lr,
            "grad_norm": result.grad_norm,
            "tokens_per_second": speed,
            "mfu": mfu(speed, self.flops_per_token, self.peak),
            **hottest,
        }
        self.tokens_since, self.seconds_since = 0, 0.0
        every = self.config.logging.module_load_every
        if every and result.router_sums is not None and (result.step % every == 0 or last):
            records = module_load(result.router_sums)
            record |= load_summary(records) | {"module_load": records}
        self._write(record, "train", result.step)

    def on_skip(self, trainer: "Trainer", result: "StepResult") -> None:
        # The batch took its time, and no token of it counts.
        self.seconds_since += result.seconds
        figures = {"skipped_loss": result.loss, "skipped_grad_norm": result.grad_norm}
        self._event(trainer, "skip", reason=result.skipped, **figures)

    def on_rollback(self, trainer: "Trainer", from_step: int, path: Path) -> None:
        self.tokens_since, self.seconds_since = 0, 0.0
        if self.file is not None:
            self.file.close()
            forget_after(self.path, trainer.step, trainer.consumed)
            self.file = self.path.open("a", encoding="utf-8")
        self._event(trainer, "rollback", from_step=from_step, checkpoint=path.name)

    def on_event(self, trainer: "Trainer", event: str, text: str, facts: dict[str, Any]) -> None:
        self._event(trainer, event, **facts)

    def _event(self, trainer: "Trainer", event: str, **facts: Any) -> None:
        """A line of its own in metrics.jsonl: `event`, the step that the weights stand at, the place in the data."""
        if self.file is None:
            return
        facts = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in facts.items()}
        record = {"step": trainer.step, "event": event, "consumed_samples": trainer.consumed, **facts}
        print(json.dumps(record), file=self.file, flush=True)

    def on_evaluation(self, trainer: "Trainer", evaluation: dict[str, float]) -> None:
        if self.file is not None:
            record = {"step": trainer.step, **{f"valid_{key}": value for key, value in evaluation.items()}}
            self._write(record, "valid", trainer.step)

    def on_train_end(self, trainer: "Trainer") -> None:
        if self.file is not None:
            self.file.close()
        for sink in self.sinks:
            sink.close()

    def _write(self, record: dict[str, Any], kind: str, step: int) -> None:
        print(json.dumps(record), file=self.file, flush=True)
        scalars = {key: value for key, value in record.items() if isinstance(value, int | float) and key != "step"}
        for sink in self.sinks:
            sink.write({f"{kind}/{key.removeprefix('valid_')}": value for key, value in scalars.items()}, step)


def forget_after(path: Path, step: int, consumed: int) -> None:
    """Drop the lines of steps after `step`: a run that resumes there will write them again.

    Events stay unless they are of data after `consumed` samples: the others do not happen again.
    """
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue  # the last line of a killed run may be torn
        known = record["consumed_samples"] <= consumed if "event" in record else record["step"] <= step
        if known:
            kept.append(line + "\n")
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    temporary.replace(path)


class Sink:
    """Somewhere scalars go."""

    def write(self, scalars: dict[str, float], step: int) -> None:
        """Record scalars of one step."""
        raise TypeError(f"{type(self).__name__} does not say how to write")

    def close(self) -> None:
        """Flush."""


class TensorBoard(Sink):
    """Event files in the run directory; events after the resumed step are purged from view."""

    def __init__(self, directory: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(directory), purge_step=step + 1)

    def write(self, scalars: dict[str, float], step: int) -> None:
        for key, value in scalars.items():
            self.writer.add_scalar(key, value, step)

    def close(self) -> None:
        self.writer.close()


class WandB(Sink):
    """Weights & Biases, when asked for."""

    def __init__(self, config: RunConfig) -> None:
        require_wandb(config)
        import wandb

        name = str(config.run.dir).replace("/", "-")
        self.run = wandb.init(project=config.logging.wandb, name=name, config=to_tree(config), dir=str(config.run.dir))

    def write(self, scalars: dict[str, float], step: int) -> None:
        self.run.log(scalars, step=step)

    def close(self) -> None:
        self.run.finish()


def require_wandb(config: RunConfig) -> None:
    """Raise ConfigError, before any work, where W&B was asked for and is not installed."""
    from importlib.util import find_spec

    if config.logging.wandb and find_spec("wandb") is None:
        raise ConfigError(f"logging.wandb={config.logging.wandb} needs the package wandb: pip install 'megamf[wandb]'")

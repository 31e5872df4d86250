"""What a person sees of a run: a progress bar with ETA on a terminal, plain lines in a log file."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from megamf.callbacks.base import Callback

if TYPE_CHECKING:
    from megamf.trainer import StepResult, Trainer

SECONDS_BETWEEN_LINES = 20.0


class ProgressDisplay(Callback):
    """Rank 0 only. Without a terminal, or where no bar is wanted: a line every 20 seconds; evaluations always."""

    def __init__(self, show_bar: bool) -> None:
        self.show_bar = show_bar
        self.console = Console(stderr=True, highlight=False)
        self.bar: Progress | None = None
        self.last_line = 0.0

    def on_train_start(self, trainer: "Trainer") -> None:
        if not trainer.is_main:
            return
        total, done = trainer.config.train.steps, trainer.step
        self.began, self.first_step = time.monotonic(), done
        if self.show_bar and self.console.is_terminal:
            columns = (TextColumn("step"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[status]}"))
            times = (TimeElapsedColumn(), TextColumn("eta"), TimeRemainingColumn())
            self.bar = Progress(*columns, *times, console=self.console)
            self.task = self.bar.add_task("train", total=total, completed=done, status="")
            self.bar.start()
        tune = trainer.config.tune.strategy
        if tune != "full":
            sizes = [(parameter.numel(), parameter.requires_grad) for parameter in trainer.model.parameters()]
            trained, total_size = sum(size for size, moves in sizes if moves), sum(size for size, _ in sizes)
            self._say(f"tune.strategy={tune}: {trained:,} of {total_size:,} parameters are trained, the others frozen")
        if done:
            self._say(f"resumed at step {done} of {total}")

    def on_step_end(self, trainer: "Trainer", result: "StepResult") -> None:
        if not trainer.is_main:
            return
        speed = trainer.config.train.global_batch * trainer.config.train.seq_len / result.seconds
        status = f"loss {result.loss:.3f} | {speed:,.0f} tokens/s"
        now = time.monotonic()
        if self.bar is not None:
            self.bar.update(self.task, completed=result.step, status=status)
        elif now - self.last_line > SECONDS_BETWEEN_LINES or result.step == trainer.config.train.steps:
            self.last_line = now
            left = (now - self.began) / (result.step - self.first_step) * (trainer.config.train.steps - result.step)
            self._say(
                f"step {result.step}/{trainer.config.train.steps} | {status} | lr {result.lr:.2e} | "
                f"grad norm {result.grad_norm:.2f} | eta {duration(left)}"
            )

    def on_skip(self, trainer: "Trainer", result: "StepResult") -> None:
        if trainer.is_main:
            self._say(f"step {trainer.step + 1} skipped, update not made | {result.skipped}")

    def on_rollback(self, trainer: "Trainer", from_step: int, path: Path) -> None:
        if not trainer.is_main:
            return
        self.began, self.first_step = time.monotonic(), trainer.step
        if self.bar is not None:
            self.bar.update(self.task, completed=trainer.step)
        samples = trainer.config.train.global_batch
        self._say(
            f"rolled back from step {from_step} to {path}, and over the data up to sample {trainer.consumed} "
            f"({trainer.consumed // samples - trainer.step} batches without an update so far)"
        )

    def on_event(self, trainer: "Trainer", event: str, text: str, facts: dict[str, Any]) -> None:
        if trainer.is_main:
            self._say(text)

    def on_evaluation(self, trainer: "Trainer", evaluation: dict[str, float]) -> None:
        if trainer.is_main:
            self._say(f"step {trainer.step} | {describe(evaluation)}")

    def on_train_end(self, trainer: "Trainer") -> None:
        if self.bar is not None:
            self.bar.stop()

    def _say(self, line: str) -> None:
        # One line stays one line in a log file, however long.
        self.console.print(line, soft_wrap=True)


def describe(evaluation: dict[str, float]) -> str:
    """One line for a person."""
    each = ", ".join(f"{key.removeprefix('loss/')} {evaluation[key]:.4f}" for key in evaluation if "loss/" in key)
    parts = [
        f"valid loss {evaluation['loss']:.4f}" + (f" ({each})" if each else ""),
        f"perplexity {evaluation['perplexity']:.2f}",
    ]
    if "bits_per_byte" in evaluation:
        parts.append(f"{evaluation['bits_per_byte']:.3f} bits/byte")
    for kind in ("attention", "mlp"):
        if f"{kind}_entropy" in evaluation:
            entropy, dead = evaluation[f"{kind}_entropy"], evaluation[f"{kind}_dead_fraction"]
            parts.append(f"{kind} load {entropy:.0%} even, {dead:.0%} dead")
    return " | ".join(parts)


def duration(seconds: float) -> str:
    """1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"

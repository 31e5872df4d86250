"""What a callback may hook into."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from megamf.trainer import StepResult, Trainer


class Callback:
    """Every hook runs on every rank, in the order of the list; collectives inside a hook are therefore allowed.

    `pending`: a stop left something of the last step undone, so that the run is to be started again for it.
    `failing`: something beside the loop went wrong on this rank; all ranks meet in `on_failure` with the next step.
    """

    pending = False
    failing = False

    def on_train_start(self, trainer: "Trainer") -> None:
        """Before the first step of this process."""

    def on_step_end(self, trainer: "Trainer", result: "StepResult") -> None:
        """After every update; not where a step was skipped."""

    def on_skip(self, trainer: "Trainer", result: "StepResult") -> None:
        """In place of `on_step_end` where the update was not made; `result.skipped` says why."""

    def on_rollback(self, trainer: "Trainer", from_step: int, path: "Path") -> None:
        """After the run went back from `from_step` to `trainer.step`, to the checkpoint `path`."""

    def on_evaluation(self, trainer: "Trainer", evaluation: dict[str, float]) -> None:
        """After every evaluation."""

    def on_event(self, trainer: "Trainer", event: str, text: str, facts: dict[str, Any]) -> None:
        """Something worth a line that changes nothing: `text` for a person, `event` and `facts` for metrics.jsonl."""

    def on_failure(self, trainer: "Trainer") -> None:
        """Before a step, where `failing` was seen on any rank: the callbacks concerned raise, on every rank."""

    def on_train_end(self, trainer: "Trainer") -> None:
        """After the last update of this process, also when it stops early."""

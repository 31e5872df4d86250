"""What a callback may hook into."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megamf.trainer import StepResult, Trainer


class Callback:
    """Every hook runs on every rank, in the order of the list; collectives inside a hook are therefore allowed."""

    def on_train_start(self, trainer: "Trainer") -> None:
        """Before the first step of this process."""

    def on_step_end(self, trainer: "Trainer", result: "StepResult") -> None:
        """After every update."""

    def on_evaluation(self, trainer: "Trainer", evaluation: dict[str, float]) -> None:
        """After every evaluation."""

    def on_train_end(self, trainer: "Trainer") -> None:
        """After the last update of this process, also when it stops early."""

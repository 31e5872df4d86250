"""What follows on an update that was not made: going on, going back to a checkpoint, or giving up."""

from typing import TYPE_CHECKING

from megamf.callbacks.base import Callback
from megamf.callbacks.checkpointing import Checkpointing
from megamf.config.run import Guards
from megamf.errors import TrainingFailed

if TYPE_CHECKING:
    from megamf.trainer import StepResult, Trainer


class Guarding(Callback):
    """A skipped update costs its batch and no more. After too many of them within a window the run goes back to its
    newest good checkpoint and on with the data that comes now: what was read since that checkpoint is jumped over.
    After too many of these it ends, with exit code 1. Every rank comes to the same answer."""

    def __init__(self, settings: Guards, checkpointing: Checkpointing) -> None:
        self.settings = settings
        self.checkpointing = checkpointing

    def on_skip(self, trainer: "Trainer", result: "StepResult") -> None:
        where = f"step {trainer.step + 1}: {result.skipped}"
        if not self.settings.skip_nonfinite and result.skipped.startswith("not finite"):
            raise TrainingFailed(
                f"{where}. guards.skip_nonfinite=false ends the run here; the update was not made and the newest "
                "checkpoint is from before it. Lower optim.lr or look at this step's data"
            )
        if not trainer.guard.too_many:
            return
        skips = f"{sum(trainer.guard.skips)} of the last {len(trainer.guard.skips)} batches were skipped"
        if trainer.guard.rollbacks >= self.settings.max_rollbacks:
            raise TrainingFailed(
                f"{where}; {skips}, more than guards.max_skips={self.settings.max_skips}, after "
                f"{trainer.guard.rollbacks} rollbacks (guards.max_rollbacks={self.settings.max_rollbacks}). "
                "Lower optim.lr or look at the data; the newest checkpoint can be resumed"
            )
        before = trainer.step
        path = self.checkpointing.roll_back(trainer)
        if path is None:
            raise TrainingFailed(
                f"{where}; {skips}, more than guards.max_skips={self.settings.max_skips}, and there is no good "
                f"checkpoint below {self.checkpointing.root} to go back to. Lower optim.lr or look at the data"
            )
        for callback in trainer.callbacks:
            callback.on_rollback(trainer, before, path)

"""Guards against training on silently."""

import math
from typing import TYPE_CHECKING

from megamf.callbacks.base import Callback

if TYPE_CHECKING:
    from megamf.trainer import StepResult, Trainer


class NonFiniteGuard(Callback):
    """Ends the run when loss or gradient norm is not finite. Both are the same on all ranks, so all end together."""

    def on_step_end(self, trainer: "Trainer", result: "StepResult") -> None:
        if not (math.isfinite(result.loss) and math.isfinite(result.grad_norm)):
            raise RuntimeError(
                f"step {result.step}: loss {result.loss}, gradient norm {result.grad_norm}. The run ends before this "
                "state is saved; the newest checkpoint is from before it. Lower optim.lr or look at this step's data"
            )

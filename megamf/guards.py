"""Which updates are worth making: a rule on figures that all ranks agree on, so that all come to the same verdict."""

import math
import statistics
from collections import deque
from collections.abc import Sequence
from typing import Any

from megamf.config.run import Guards

# Losses that hardly differ have hardly a deviation: below this share of their median it is taken for noise.
LEAST_DEVIATION = 1e-3


def robust_zscore(value: float, window: Sequence[float]) -> float:
    """(value - median) / (1.4826 x median absolute deviation): standard deviations, were the window normal.

    The deviation counts as at least a thousandth of the median's size.
    """
    median = statistics.median(window)
    deviation = 1.4826 * statistics.median(abs(loss - median) for loss in window)
    return (value - median) / max(deviation, LEAST_DEVIATION * abs(median), 1e-12)


class UpdateGuard:
    """Judges every step before its update. What it remembers is part of a checkpoint."""

    def __init__(self, settings: Guards) -> None:
        self.settings = settings
        self.losses: deque[float] = deque(maxlen=settings.spike_window)
        self.skips: deque[int] = deque(maxlen=settings.skip_window)
        self.rollbacks = 0

    def judge(self, loss: float, aux_loss: float, grad_norm: float) -> str | None:
        """Why this update must not be made, or None. A loss that passes joins the window of the next ones."""
        reason = self._reason(loss, aux_loss, grad_norm)
        self.skips.append(int(reason is not None))
        if reason is None:
            self.losses.append(loss)
        return reason

    def _reason(self, loss: float, aux_loss: float, grad_norm: float) -> str | None:
        if not (math.isfinite(loss) and math.isfinite(aux_loss) and math.isfinite(grad_norm)):
            return f"not finite: loss {loss}, auxiliary loss {aux_loss}, gradient norm {grad_norm}"
        if self.settings.spike_zscore and len(self.losses) == self.losses.maxlen:
            score = robust_zscore(loss, self.losses)
            if score > self.settings.spike_zscore:
                return (
                    f"loss spike: {loss:.4f} is {score:.1f} robust deviations above the median "
                    f"{statistics.median(self.losses):.4f} of the last {len(self.losses)} losses"
                )
        return None

    @property
    def too_many(self) -> bool:
        """Whether the last `skip_window` batches hold more than `max_skips` skipped ones."""
        return sum(self.skips) > self.settings.max_skips

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {"losses": list(self.losses), "skips": list(self.skips), "rollbacks": self.rollbacks}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state()`; from {} as if new."""
        self.losses = deque(state.get("losses", ()), maxlen=self.settings.spike_window)
        self.skips = deque(state.get("skips", ()), maxlen=self.settings.skip_window)
        self.rollbacks = int(state.get("rollbacks", 0))

    def rolled_back(self, state: dict[str, Any]) -> None:
        """The run is back where `state` was taken: its losses again, no skips, one rollback more than ever."""
        rollbacks = self.rollbacks
        self.restore(state)
        self.skips.clear()
        self.rollbacks = rollbacks + 1

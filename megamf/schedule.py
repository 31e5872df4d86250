"""Learning-rate schedules as pure functions of the step: nothing to save, nothing to resume."""

import math

from megamf.config.run import Optim


def learning_rate(optim: Optim, step: int, num_steps: int) -> float:
    """The rate of update number `step` (0-based) of `num_steps`.

    Linear warm-up to `lr` over `warmup_steps`; then cosine or linear to `min_lr` at the last update, constant, or
    warmup-stable-decay: `lr` until the last `decay_steps`, which fall as 1 - sqrt to `min_lr`.
    """
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    if optim.schedule == "constant":
        return optim.lr
    first = num_steps - optim.decay_steps if optim.schedule == "wsd" else optim.warmup_steps
    if step < first:
        return optim.lr
    # The last update runs at min_lr exactly.
    progress = (step - first + 1) / (num_steps - first)
    shape = {
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
        "linear": 1.0 - progress,
        "wsd": 1.0 - math.sqrt(progress),
    }[optim.schedule]
    return optim.min_lr + (optim.lr - optim.min_lr) * shape

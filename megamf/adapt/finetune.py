"""The training of a prepared model: AdamW, warm-up, two passes through different copies.

The loop is plain: one process, one device. Everything random (draws of copies, order of examples, dropout) follows
from the seed; draws of copies from (seed, step, pass) alone.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from megamf.adapt.adamix import pairs_of, route
from megamf.adapt.scores import evaluate
from megamf.adapt.tasks import Example, Task, batches, shuffled
from megamf.errors import TrainingFailed, UserError

# Numbers of the forward passes that draw copies; see `mixture.draw`.
FIRST, SECOND, EVALUATION = 0, 1, 2


@dataclass(frozen=True)
class Recipe:
    """How a model is trained.

    epochs: over the training examples. batch_size: examples a step. lr: after the warm-up, which takes the share
    `warmup` of all steps; from there it falls linearly to 0. consistency: weight of the distance between two passes;
    0 means one pass only. clip: largest norm of the gradient. Raises UserError for values out of range.
    """

    epochs: int = 3
    batch_size: int = 16
    lr: float = 3e-4
    warmup: float = 0.06
    weight_decay: float = 0.1
    clip: float = 1.0
    consistency: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 0 or self.batch_size < 1:
            raise UserError(f"epochs={self.epochs} must be at least 0 and batch_size={self.batch_size} at least 1")
        if not self.lr > 0 or not self.clip > 0:
            raise UserError(f"lr={self.lr} and clip={self.clip} must be above zero")
        if not 0 <= self.warmup <= 1:
            raise UserError(f"warmup={self.warmup} is outside 0..1: it is a share of all steps")
        if self.weight_decay < 0 or self.consistency < 0:
            raise UserError(f"weight_decay={self.weight_decay} and consistency={self.consistency} must not be negative")
        if self.seed < 0:
            raise UserError(f"seed={self.seed} must not be negative")


def learning_rate(step: int, steps: int, recipe: Recipe) -> float:
    """Of step `step`, counted from 0: linear warm-up, then linear decay that would reach 0 after the last step."""
    warm = math.ceil(recipe.warmup * steps)
    if step < warm:
        return recipe.lr * (step + 1) / warm
    return recipe.lr * (steps - step) / max(1, steps - warm)


def train(
    model: nn.Module,
    task: Task,
    examples: Sequence[Example],
    recipe: Recipe,
    on_step: Callable[[int, int, dict[str, float]], None] = lambda step, steps, values: None,
) -> list[dict[str, float]]:
    """Train what is trainable, in place; calls `on_step(done, of, values)` after every step and returns all values:
    loss (of the task, first pass), consistency (not weighted), lr.

    A copy that no pass of a step drew has no gradient and is left alone by the optimizer in that step: neither decay
    nor momentum moves it. Raises TrainingFailed for a loss that is not finite.
    """
    pairs = pairs_of(model)
    device = next(model.parameters()).device
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=recipe.lr, weight_decay=recipe.weight_decay)
    steps = recipe.epochs * math.ceil(len(examples) / recipe.batch_size)
    history: list[dict[str, float]] = []
    torch.manual_seed(recipe.seed)
    model.train()
    for epoch in range(recipe.epochs):
        for part in batches(shuffled(examples, recipe.seed, epoch), recipe.batch_size):
            step = len(history)
            batch = task.batch(part, device)
            route(pairs, "random", seed=recipe.seed, step=step, number=FIRST)
            first, label_N = task.outputs(model, batch)
            loss = total = task.loss(first, label_N)
            distance = torch.zeros(())
            if recipe.consistency:
                route(pairs, "random", seed=recipe.seed, step=step, number=SECOND)
                distance = task.consistency(first, task.outputs(model, batch)[0])
                total = loss + recipe.consistency * distance
            if not torch.isfinite(total):
                raise TrainingFailed(
                    f"the loss of step {step} is {float(total)}: training cannot go on. Lower --lr={recipe.lr}"
                )
            optimizer.zero_grad(set_to_none=True)
            total.backward()
            nn.utils.clip_grad_norm_(trained, recipe.clip)
            lr = learning_rate(step, steps, recipe)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            history.append({"loss": float(loss.detach()), "consistency": float(distance.detach()), "lr": lr})
            on_step(len(history), steps, history[-1])
    route(pairs, "merged")
    model.eval()
    return history


def scores_by_mode(
    model: nn.Module, task: Task, examples: Sequence[Example], batch_size: int, modes: Sequence[str], seed: int
) -> dict[str, Any]:
    """Scores for each way to use the copies: `merged`, `random` (a fresh draw for every batch) and `fixed` (a list:
    every copy by itself). A model without several copies has `merged` only. Leaves the average chosen."""
    pairs = pairs_of(model)
    copies = max((max(len(pair.down), len(pair.up)) for pair in pairs), default=1)
    results: dict[str, Any] = {}
    for mode in modes if copies > 1 else ["merged"]:
        if mode == "fixed":
            results[mode] = []
            for index in range(copies):
                route(pairs, mode, index=index)
                results[mode].append(evaluate(model, task, examples, batch_size))
        elif mode == "random":
            draw = lambda number: route(pairs, "random", seed=seed, step=number, number=EVALUATION)  # noqa: E731
            results[mode] = evaluate(model, task, examples, batch_size, draw)
        else:
            route(pairs, mode)
            results[mode] = evaluate(model, task, examples, batch_size)
    route(pairs, "merged")
    return results

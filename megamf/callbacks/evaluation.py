"""Evaluation inside the loop: loss on fixed validation samples, the same for every layout."""

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from megamf.callbacks.base import Callback
from megamf.callbacks.module_load import load_summary, module_load
from megamf.points import reach

if TYPE_CHECKING:
    from megamf.data.loader import StepLoader
    from megamf.trainer import StepResult, Trainer


class Part(NamedTuple):
    """One source of the evaluation, and its share of the whole."""

    name: str
    share: float
    loader: "StepLoader"


class Evaluation(Callback):
    """Every `train.eval_every` steps and after the last one: mean cross entropy, perplexity, bits per byte.

    Of several sources each is measured by itself, on `train.eval_batches` global batches of its own, so that what is
    lost on one is not hidden by what is won on another; together they count by their weights.
    """

    def __init__(self, parts: Sequence[Part], bytes_per_token: float | None) -> None:
        self.parts = parts
        self.bytes_per_token = bytes_per_token

    def on_step_end(self, trainer: "Trainer", result: "StepResult") -> None:
        if self._due(trainer):
            self._evaluate_and_tell(trainer)

    def on_train_start(self, trainer: "Trainer") -> None:
        # A run that was stopped between a checkpoint and the end of the evaluation after it has that left to do.
        if trainer.step and self._due(trainer):
            known = trainer.is_main and evaluated(trainer.config.run.dir / "metrics.jsonl", trainer.step)
            if not trainer.total(torch.tensor(float(known))).item():
                self._evaluate_and_tell(trainer)

    def _due(self, trainer: "Trainer") -> bool:
        every = trainer.config.train.eval_every
        return bool(every and trainer.step % every == 0) or trainer.step == trainer.config.train.steps

    def _evaluate_and_tell(self, trainer: "Trainer") -> None:
        evaluation = None if trainer.stopping else self.evaluate(trainer)
        self.pending = evaluation is None
        if evaluation is not None:
            for callback in trainer.callbacks:
                callback.on_evaluation(trainer, evaluation)

    @torch.no_grad()
    def evaluate(self, trainer: "Trainer") -> dict[str, float] | None:
        """`loss` in nats per token, `perplexity`, `bits_per_byte` (where the data's raw size is known), module load;
        of several sources also `loss/NAME` of each.

        None where the ranks agreed to stop: each looks up before every batch.
        """
        began = time.perf_counter()
        trainer.engine.eval()
        losses, routers = {}, None
        for part in self.parts:
            sums = torch.zeros(2, dtype=torch.float64)
            for batch_index in range(trainer.config.train.eval_batches):
                reach("evaluation")
                if trainer.agree_to_stop():
                    return None
                for batch in part.loader.step(batch_index * trainer.config.train.global_batch):
                    loss, packed, _ = trainer.objective(*trainer.on_device(batch))
                    sums += torch.tensor([loss.item(), float((batch.label_BT != -100).sum())], dtype=torch.float64)
                    if packed is not None:
                        routers = packed if routers is None else routers.with_flat(routers.flat() + packed.flat())
            total = trainer.total(sums)
            losses[part.name] = (total[0] / total[1]).item()
        loss = sum(part.share * losses[part.name] for part in self.parts)
        evaluation = {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "seconds": time.perf_counter() - began}
        if len(losses) > 1:
            evaluation |= {f"loss/{name}": value for name, value in losses.items()}
        if self.bytes_per_token:
            evaluation["bits_per_byte"] = loss / math.log(2) / self.bytes_per_token
        if routers is not None:
            evaluation |= load_summary(module_load(routers.with_flat(trainer.total(routers.flat()))))
        return evaluation


def evaluated(path: Path, step: int) -> bool:
    """Whether metrics.jsonl holds an evaluation of `step`."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return any("valid_loss" in record and record["step"] == step for record in map(json.loads, lines))

"""Several copies of a linear map in the place of one, and the drawing of the copies that serve a batch.

Shapes: X any leading dimensions, I input width, O output width, M copies, P pairs (down, up) in a model.
Source: AdaMix (arXiv 2205.12410): in every layer M copies of an adaptation module stand in parallel; one index drawn
uniformly for the whole batch serves the projection down, another one the projection up; afterwards the copies are
averaged into one module of the cost of a single one.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

MODES = ("merged", "random", "fixed")


class Mixture(nn.Module):
    """M linear maps of one shape. It acts, and looks to others (`weight`, `bias`), like the one that is chosen.

    chosen: index of the copy that is used, or None for the average of all. The average is that of the weights, not
    of the outputs: for a linear map both are the same, inside a bottleneck they are not.
    """

    def __init__(self, copies: list[nn.Linear]) -> None:
        super().__init__()
        assert copies, "a mixture needs a copy"
        self.copies = nn.ModuleList(copies)
        self.chosen: int | None = None

    def __len__(self) -> int:
        return len(self.copies)

    def _pick(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        if self.chosen is not None:
            return tensors[self.chosen]
        return tensors[0] if len(tensors) == 1 else torch.stack(tensors).mean(0)

    @property
    def weight(self) -> torch.Tensor:
        """weight_OI of the chosen copy, or of the average."""
        return self._pick([one.weight for one in self.copies])

    @property
    def bias(self) -> torch.Tensor | None:
        """bias_O of the chosen copy, or of the average; None for maps without."""
        if self.copies[0].bias is None:
            return None
        return self._pick([one.bias for one in self.copies])

    def forward(self, x_XI: torch.Tensor) -> torch.Tensor:
        """x_XI -> y_XO."""
        return F.linear(x_XI, self.weight, self.bias)

    @torch.no_grad()
    def average(self) -> nn.Linear:
        """The copies' average as an ordinary linear map with tensors of its own."""
        kept, self.chosen = self.chosen, None
        try:
            one = copy.deepcopy(self.copies[0])
            one.weight.copy_(self.weight)
            if one.bias is not None:
                one.bias.copy_(self.bias)
        finally:
            self.chosen = kept
        return one


def mixture_of(template: nn.Linear, copies: int, reset: Callable[[nn.Linear], None] | None = None) -> Mixture:
    """`template` and copies - 1 more of it: equal ones, or with values of their own drawn by `reset`."""
    every = [template] + [copy.deepcopy(template) for _ in range(copies - 1)]
    if reset is not None:
        for one in every[1:]:
            reset(one)
    return Mixture(every)


@dataclass(frozen=True)
class Pair:
    """The two projections of one adaptation module. For LoRA `down` is A and `up` is B."""

    name: str
    down: Mixture
    up: Mixture


def draw(seed: int, step: int, number: int, pairs: int, copies: int) -> np.ndarray:
    """choice_P2: indices of down and up for every pair, uniform and independent, from these five numbers alone.

    step: of training, or the batch of an evaluation. number: which of the forward passes of that step.
    """
    return np.random.default_rng((seed, step, number)).integers(copies, size=(pairs, 2))


def choose(pairs: list[Pair], choice_P2: np.ndarray) -> None:
    """Let every pair use these copies; a side with one (shared) copy uses that."""
    for pair, (down, up) in zip(pairs, choice_P2, strict=True):
        pair.down.chosen = int(down) if len(pair.down) > 1 else 0
        pair.up.chosen = int(up) if len(pair.up) > 1 else 0


def choose_fixed(pairs: list[Pair], index: int) -> None:
    """Let every pair use the copy `index` on both sides."""
    choose(pairs, np.full((len(pairs), 2), index))


def choose_average(pairs: list[Pair]) -> None:
    """Let every pair use the average of its copies."""
    for pair in pairs:
        pair.down.chosen = pair.up.chosen = None


def mixtures_in(model: nn.Module) -> Iterator[tuple[nn.Module, str, str, Mixture]]:
    """Parent module, name in it, full name and mixture, for all mixtures of a model."""
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, Mixture)]
    for name, module in found:
        parent, _, child = name.rpartition(".")
        yield model.get_submodule(parent), child, name, module


def merge(model: nn.Module) -> int:
    """Replace every mixture by the average of its copies, in place. Returns how many there were."""
    number = 0
    for parent, child, _, mixture in list(mixtures_in(model)):
        if isinstance(parent, nn.ModuleDict):
            parent[child] = mixture.average()
        else:
            setattr(parent, child, mixture.average())
        number += 1
    return number

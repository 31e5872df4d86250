"""What of a model a run trains, and what it adds to it, by formula (`config.tune`).

Letters as in `megamf.plan.flops`; `I` inserted modules of a layer and kind.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from megamf.adapt.lora import adapter_shapes
from megamf.config import ModelConfig, RunConfig
from megamf.model.tuning import Inserted
from megamf.plan.flops import ParameterCounts


@dataclass(frozen=True)
class Trained:
    """Parameters by whether they stand beside experts or outside of them.

    shared, experts: those that are trained, adapters among them. added_shared, added_experts: adapters, which the model
    does not have. copied: (layer, kind) with inserted modules; there a GPU joins frozen and trained experts into one
    tensor before every product.
    """

    shared: int
    experts: int
    added_shared: int = 0
    added_experts: int = 0
    copied: tuple[tuple[int, str], ...] = ()

    @property
    def total(self) -> int:
        return self.shared + self.experts

    @property
    def added(self) -> int:
        return self.added_shared + self.added_experts


def trained_parameters(config: RunConfig, counts: ParameterCounts, inserted: Inserted | None) -> Trained | None:
    """What `config.tune` trains of a model with these counts on one rank; None: everything, or that is not known.

    inserted: (layer, kind) -> I of the checkpoint that the run starts from; what trains inserted modules cannot be
    counted without.
    """
    tune, model = config.tune, config.model
    if tune.strategy == "full" or (tune.strategy != "lora" and inserted is None):
        return None
    ends = counts.embedding + counts.head if tune.embeddings else 0
    if tune.strategy == "lora":
        shapes = adapter_shapes(model, tune).values()
        shared, experts = (sum(prod(shape) for shape in shapes if len(shape) == rank) for rank in (2, 3))
        return Trained(ends + shared, experts, shared, experts)
    modules, rows = (sum(sizes) for sizes in zip(*_inserted_sizes(model, inserted), strict=True))
    routers = counts.routers if tune.strategy == "inserted" else rows
    return Trained(ends + routers, modules, copied=tuple(sorted(inserted)))


def _inserted_sizes(model: ModelConfig, inserted: Inserted) -> Iterator[tuple[int, int]]:
    """Parameters of the experts and of the routers' rows, place by place."""
    row = model.n_embd if model.gate_type == "linear" else model.gating_size
    for (_, kind), count in inserted.items():
        hidden = model.att_hidden if kind == "attention" else model.ffd_hidden
        yield count * 2 * model.n_embd * hidden, count * row

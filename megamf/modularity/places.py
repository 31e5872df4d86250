"""Where modules stand: a layer and a kind, and the tensors that belong there.

Shapes: E experts of a layer and kind, D width, F expert hidden or attention width, G router width.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from megamf.config import ModelConfig
from megamf.errors import UserError

Kind = Literal["attention", "mlp"]
KINDS: tuple[Kind, ...] = ("attention", "mlp")
PARTS = ("experts", "output_experts")


@dataclass(frozen=True, order=True)
class Place:
    """One layer's modules of one kind."""

    layer: int
    kind: Kind

    @property
    def prefix(self) -> str:
        """What the state_dict keys of these modules and their router begin with."""
        return f"transformer.h.{self.layer}.{'attn.q_proj' if self.kind == 'attention' else 'mlpf'}"

    def expert_keys(self) -> tuple[str, str]:
        """The expert tensors [E, D, F] and [E, F, D]."""
        return f"{self.prefix}.experts.weight", f"{self.prefix}.output_experts.weight"

    def rows_key(self, model: ModelConfig) -> str:
        """The router's matrix with one row a module: A [E, G] of the `mlp` gate, its likes of the others."""
        name = {
            "mlp": "w_gate.3.weight",
            "linear": "w_gate.0.weight",
            "gmm": "expert_centroids",
            "tanh": "w_gate.2.weight",
        }[model.gate_type]
        return f"{self.prefix}.gate.{name}"

    def __str__(self) -> str:
        return f"layer {self.layer}, {self.kind}"


def places(model: ModelConfig) -> Iterator[Place]:
    """Every place, layer by layer, attention before MLP. Raises UserError for a model without modules."""
    if not model.sparse:
        raise UserError(f"a dense model (kind={model.kind}) has no modules")
    for layer in range(model.n_layer):
        for kind in KINDS:
            yield Place(layer, kind)


def top_k(model: ModelConfig, kind: Kind) -> int:
    """Modules a token uses: no place may have fewer."""
    return model.k_att if kind == "attention" else model.k_mlp


def module_size(model: ModelConfig, kind: Kind) -> int:
    """Parameters that go with one module: its two matrices and its row in the router."""
    hidden = model.att_hidden if kind == "attention" else model.ffd_hidden
    row = model.n_embd if model.gate_type == "linear" else model.gating_size
    return 2 * model.n_embd * hidden + row


def with_counts(model: ModelConfig, counts: dict[Place, int]) -> ModelConfig:
    """`model` with other numbers of modules; lists of numbers only where layers differ.

    Raises UserError, naming the place, where fewer are left than a token uses.
    """
    for place, count in sorted(counts.items()):
        if count < top_k(model, place.kind):
            raise UserError(
                f"{place}: {count} modules would be left, but a token uses {top_k(model, place.kind)} of them"
            )
    fields: dict[str, object] = {}
    for kind, name in (("attention", "n_att_experts"), ("mlp", "n_mlp_experts")):
        numbers = [counts[Place(layer, kind)] for layer in range(model.n_layer)]
        fields[name] = max(numbers)
        fields[f"{name}_per_layer"] = None if len(set(numbers)) == 1 else numbers
    return ModelConfig.model_validate(model.model_dump() | fields)

"""A dense model's feed-forward layers into experts: split, routers, sparse layers in the places of the dense ones.

Shapes: N tokens, D input width, M neurons of a layer, E experts, F neurons of one expert.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import nn

from megamf.compress.moefication.portable.sparse_ffn import SparseFfn, replace
from megamf.compress.moefication.routers import MlpRouter, centres, recovered, train_mlp_router, truth
from megamf.compress.moefication.split import (
    Split,
    cluster_split,
    coactivation_split,
    num_experts,
    random_split,
)
from megamf.compress.moefication.statistics import Coactivation, DenseLayer, activity, coactivation
from megamf.errors import UserError

Router = Literal["truth", "similarity", "mlp"]


@dataclass(frozen=True)
class Choices:
    """How a model is converted. `share`: of the experts of a layer, computed for a token (rounded down, at least one).

    `edges`: how the weights of the co-activation graph are defined. `weighted`: see `SparseFfn`. `by_magnitude`: allow
    activations other than ReLU, whose neurons are small rather than zero (beyond the method).
    """

    expert_size: int = 32
    share: float = 0.25
    split: Split = "coactivation"
    edges: Coactivation = "product"
    router: Router = "mlp"
    weighted: bool = False
    by_magnitude: bool = False
    epochs: int = 30
    seed: int = 0

    def num_selected(self, experts: int) -> int:
        """K of E. Raises UserError for a share outside (0, 1] and one that leaves no expert."""
        count = int(self.share * experts + 1e-9)
        if not 0 < self.share <= 1 or count < 1:
            raise UserError(
                f"a share of {self.share} of {experts} experts leaves {max(count, 0)} for a token; expected "
                f"{1 / experts:.4f} (one expert) to 1 (all)"
            )
        return count


@dataclass(frozen=True)
class LayerReport:
    """What became of one layer. active: mean share of neurons that were not zero; recovered: share of the activation
    in the chosen experts, by the layer's router and by the ground truth, on the tokens that were looked at."""

    name: str
    neurons: int
    experts: int
    selected: int
    active: float
    recovered: float
    recovered_truth: float


def check(layers: Sequence[DenseLayer], choices: Choices) -> None:
    """Raise UserError, before any work, where the choices do not fit the model."""
    sizes = {layer.num_neurons for layer in layers}
    for size in sorted(sizes):
        choices.num_selected(num_experts(size, choices.expert_size))
    if len(sizes) > 1 and len({num_experts(size, choices.expert_size) for size in sizes}) > 1:
        raise UserError(f"feed-forward layers of different widths ({sorted(sizes)}) are not supported")
    kinds = {layer.activation for layer in layers}
    if len(kinds) > 1:
        raise UserError(
            f"feed-forward layers with different activations ({', '.join(sorted(kinds))}) are not supported"
        )
    if not kinds <= {"relu", "relu2"} and not choices.by_magnitude:
        raise UserError(
            f"the feed-forward layers use {', '.join(sorted(kinds))}, whose neurons are never zero: continue training "
            "with ReLU (--relufy-steps), or choose experts by magnitude (--by-magnitude, beyond the published method)"
        )


def settings(layers: Sequence[DenseLayer], choices: Choices) -> dict[str, Any]:
    """What a folder's config.json says about its sparse layers."""
    experts = num_experts(layers[0].num_neurons, choices.expert_size)
    return {
        "expert_size": choices.expert_size,
        "num_selected": choices.num_selected(experts),
        "router": choices.router,
        "weighted": choices.weighted,
        "activation": layers[0].activation,
        "split": choices.split,
    }


def make_split(layer: DenseLayer, h_NM: torch.Tensor, choices: Choices) -> torch.Tensor:
    """label_M of one layer; h_NM: its activations on text (used by co-activation alone)."""
    if choices.split == "random":
        return random_split(layer.num_neurons, choices.expert_size, choices.seed)
    if choices.split == "clustering":
        return cluster_split(layer.gate_DM.t(), choices.expert_size, choices.seed)
    edges_MM = coactivation(h_NM, choices.edges, layer.activation == "relu")
    return coactivation_split(edges_MM, choices.expert_size, choices.seed)


@torch.no_grad()
def sparse_layer(
    layer: DenseLayer,
    label_M: torch.Tensor,
    about: dict[str, Any],
    router: MlpRouter | None = None,
) -> SparseFfn:
    """The sparse layer with the weights of the dense one, neurons of an expert in ascending order."""
    order_M = label_M.argsort(stable=True)
    given = {"gate": layer.gate_bias_M, "up": layer.up_bias_M, "out": layer.out_bias_O}
    biases = [name for name, bias in given.items() if bias is not None]
    (D, M), O = layer.gate_DM.shape, layer.out_MO.shape[1]
    sparse = SparseFfn.of_sizes(D, M, O, layer.up_DM is not None, biases, about).to(layer.gate_DM)
    E, D, size = sparse.gate_EDF.shape

    def by_expert(weight_DM: torch.Tensor) -> torch.Tensor:
        return weight_DM[:, order_M].reshape(D, E, size).transpose(0, 1)

    sparse.gate_EDF.copy_(by_expert(layer.gate_DM))
    sparse.out_EFO.copy_(layer.out_MO[order_M].view(sparse.out_EFO.shape))
    if sparse.up_EDF is not None:
        sparse.up_EDF.copy_(by_expert(layer.up_DM))
    for name, bias in (("gate_bias_EF", layer.gate_bias_M), ("up_bias_EF", layer.up_bias_M)):
        if bias is not None:
            getattr(sparse, name).copy_(bias[order_M].view(E, size))
    if layer.out_bias_O is not None:
        sparse.out_bias_O.copy_(layer.out_bias_O)
    if sparse.centre_ED is not None:
        sparse.centre_ED.copy_(centres(layer, label_M))
    if sparse.router is not None:
        assert router is not None
        sparse.router[0].weight.copy_(router.first_ED)
        sparse.router[2].weight.copy_(router.last_EE)
    return sparse.eval()


def convert(
    model: nn.Module,
    layers: Sequence[DenseLayer],
    inputs: Sequence[torch.Tensor],
    choices: Choices,
    on_layer: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, Any], list[LayerReport]]:
    """Replace every layer of the model by its sparse form, in place.

    inputs: x_ND of every layer on text (`capture_inputs`). Returns the settings and what became of each layer.
    Raises UserError where the choices do not fit; the model is unchanged then.
    """
    check(layers, choices)
    about = settings(layers, choices)
    made, reports = [], []
    for number, (layer, x_ND) in enumerate(zip(layers, inputs, strict=True)):
        sparse, report = convert_layer(layer, x_ND, about, choices)
        made.append(sparse)
        reports.append(report)
        if on_layer is not None:
            on_layer(number + 1, len(layers))
    for layer, sparse in zip(layers, made):
        replace(model, layer.name, layer.holder, layer.form, sparse)
    return about, reports


def convert_layer(
    layer: DenseLayer, x_ND: torch.Tensor, about: dict[str, Any], choices: Choices
) -> tuple[SparseFfn, LayerReport]:
    """Split, router and sparse layer of one dense layer; nothing is replaced."""
    with torch.no_grad():
        h_NM = layer.hidden(x_ND.to(layer.gate_DM.dtype)).float()
    label_M = make_split(layer, h_NM, choices)
    score_NE = truth(h_NM, label_M)
    top_k = about["num_selected"]
    router = None
    if choices.router == "mlp":
        router = train_mlp_router(
            x_ND, score_NE, centres(layer, label_M), top_k, seed=choices.seed, epochs=choices.epochs
        )
    sparse = sparse_layer(layer, label_M, about, router)
    with torch.no_grad():
        guess_NE = sparse.scores(x_ND.to(layer.gate_DM.dtype)).float()
    report = LayerReport(
        layer.name,
        layer.num_neurons,
        score_NE.shape[1],
        top_k,
        activity(h_NM),
        recovered(score_NE, guess_NE, top_k),
        recovered(score_NE, score_NE, top_k),
    )
    return sparse, report


def sparse_layers(model: nn.Module) -> list[SparseFfn]:
    """The sparse layers of a converted model, in its order."""
    return [module for module in model.modules() if isinstance(module, SparseFfn)]


def report_tree(reports: Sequence[LayerReport]) -> list[dict[str, Any]]:
    """For JSON."""
    return [asdict(report) for report in reports]

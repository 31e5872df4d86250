"""What feed-forward layers see and how their neurons answer, on text.

Shapes: N tokens, D input width, M neurons of a whole layer, O output width, W windows, T time.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from megamf.compress.moefication.models import outputs
from megamf.compress.moefication.portable.sparse_ffn import ACTIVATIONS, FORMS, find_layers, matrix, part
from megamf.errors import UserError

Coactivation = Literal["product", "binary"]


class Full(Exception):
    """Raised out of a forward pass when no layer wants more rows."""


@dataclass
class DenseLayer:
    """A feed-forward layer as it stands in a model, and its weights as [in, out] (views, not copies)."""

    name: str
    holder: nn.Module
    form: dict[str, Any]
    activation: str
    gate_DM: torch.Tensor
    up_DM: torch.Tensor | None
    out_MO: torch.Tensor
    gate_bias_M: torch.Tensor | None
    up_bias_M: torch.Tensor | None
    out_bias_O: torch.Tensor | None

    @property
    def num_neurons(self) -> int:
        """M."""
        return self.gate_DM.shape[1]

    def hidden(self, x_ND: torch.Tensor) -> torch.Tensor:
        """Activations of all neurons, h_NM: act(W1 x + b), in gated units times (U x + c)."""
        h_NM = x_ND @ self.gate_DM
        h_NM = ACTIVATIONS[self.activation](h_NM if self.gate_bias_M is None else h_NM + self.gate_bias_M)
        if self.up_DM is None:
            return h_NM
        u_NM = x_ND @ self.up_DM
        return h_NM * (u_NM if self.up_bias_M is None else u_NM + self.up_bias_M)

    def output(self, x_ND: torch.Tensor) -> torch.Tensor:
        """y_NO of the dense layer."""
        y_NO = self.hidden(x_ND) @ self.out_MO
        return y_NO if self.out_bias_O is None else y_NO + self.out_bias_O


def dense_layers(model: nn.Module) -> list[DenseLayer]:
    """Every feed-forward layer of a known form, in the model's order.

    Raises UserError for a model without one and for an activation that is not supported, naming what is.
    """
    found = []
    for name, holder, form in find_layers(model):
        parts = {key: part(holder, form[key]) if form[key] else None for key in ("gate", "up", "out")}
        weight = {key: None if value is None else matrix(value).detach() for key, value in parts.items()}
        bias = {key: getattr(value, "bias", None) for key, value in parts.items()}
        bias = {key: None if value is None else value.detach() for key, value in bias.items()}
        activation = activation_name(part(holder, form["act"]), f"{name} ({type(holder).__name__})")
        found.append(
            DenseLayer(
                name, holder, form, activation,
                weight["gate"], weight["up"], weight["out"], bias["gate"], bias["up"], bias["out"],
            )
        )  # fmt: skip
    if not found:
        kinds = sorted({type(module).__name__ for module in model.modules()})
        raise UserError(
            f"{type(model).__name__} has no feed-forward layer of a known form. Supported: "
            f"{'; '.join(_described(name, form) for name, form in FORMS.items())}. Its modules: {', '.join(kinds)}"
        )
    return found


def _described(name: str, form: dict[str, Any]) -> str:
    return f"{name} ({', '.join(form[key] for key in ('gate', 'up', 'out') if form[key])})"


def activation_name(function: Any, where: str = "a layer") -> str:
    """Which of ACTIVATIONS a function is, by what it does. Raises UserError for another one."""
    x = torch.linspace(-6, 6, 97, dtype=torch.float64)
    with torch.no_grad():
        y = function(x)
    errors = {name: (known(x) - y).abs().max().item() for name, known in ACTIVATIONS.items()}
    best = min(errors, key=lambda name: errors[name])
    if errors[best] > 1e-4:
        raise UserError(f"{where}: its activation {function} is none of {', '.join(ACTIVATIONS)}")
    return best


def capture_inputs(
    model: nn.Module, layers: list[DenseLayer], windows_WT: torch.Tensor, max_tokens: int, batch: int = 8
) -> list[torch.Tensor]:
    """x_ND of every layer, float32 on the CPU: its inputs on the first `max_tokens` tokens that it sees."""
    rows: list[list[torch.Tensor]] = [[] for _ in layers]
    counts = [0] * len(layers)

    def hook(index: int) -> Any:
        def keep(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            x_ND = arguments[0].detach().reshape(-1, arguments[0].shape[-1])
            x_ND = x_ND[: max_tokens - counts[index]]
            if len(x_ND):
                rows[index].append(x_ND.float().cpu().clone())
                counts[index] += len(x_ND)

        return part(layers[index].holder, layers[index].form["gate"]).register_forward_pre_hook(keep)

    hooks = [hook(index) for index in range(len(layers))]
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for ids_BT in windows_WT.split(batch):
                outputs(model, ids_BT.to(next(model.parameters()).device))
                if min(counts) >= max_tokens:
                    break
    finally:
        model.train(training)
        for handle in hooks:
            handle.remove()
    return [torch.cat(parts) for parts in rows]


def active(h_NM: torch.Tensor, relu: bool) -> torch.Tensor:
    """bool [N, M]: which neurons answer. With ReLU those above zero; else those above the token's mean |h|."""
    return h_NM != 0 if relu else h_NM.abs() > h_NM.abs().mean(-1, keepdim=True)


def coactivation(h_NM: torch.Tensor, definition: Coactivation, relu: bool, batch: int = 8) -> torch.Tensor:
    """Weights of the graph of neurons, w_MM float32, symmetric with a zero diagonal.

    product: sum over tokens of |h_n| |h_m| where both are active (the paper's definition). binary: the number of
    batches of `batch` tokens in which n and m are active on the same token at least once (the published code's).
    """
    on_NM = active(h_NM, relu).to(h_NM.dtype)
    if definition == "product":
        a_NM = h_NM.abs() * on_NM
        w_MM = a_NM.t() @ a_NM
    else:
        w_MM = torch.zeros(h_NM.shape[1], h_NM.shape[1])
        for on_BM in on_NM.split(batch):
            w_MM += (on_BM.t() @ on_BM).clamp_(max=1)
    return w_MM.fill_diagonal_(0)


def activity(h_NM: torch.Tensor) -> float:
    """Mean share of neurons that are not exactly zero."""
    return (h_NM != 0).float().mean().item()

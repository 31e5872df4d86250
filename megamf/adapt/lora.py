"""LoRA: frozen weights W, and beside each adapted one a trained product of rank r: W + (alpha / r) A B.

Shapes: L experts, D input width, F output width, r rank, R rows grouped by expert.
Source: Hu et al., LoRA: Low-Rank Adaptation of Large Language Models (arXiv 2106.09685), section 4.1: A is drawn at
random, B is zero at first, so that a run starts from the outputs of the model it adapts.

Linear layers (all of a dense model; projections of keys and values) are adapted by PEFT, which puts its own layer in
their place. Experts have their own code. PEFT does take a stacked parameter (`target_parameters`), but it adds the
product A B to all experts' weights before every call: a second copy of them in every layer, their whole gradient in
the backward pass, from which it makes those of A and B. Here rows go through A and B on the side: nothing of the size
of W is made, and no gradient of it is computed. (An adapter is the same thing in both; see `megamf.adapt.peft_folder`.)
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from megamf.config import ModelConfig
from megamf.config.run import Tune
from megamf.errors import UserError
from megamf.model import ModuleFormer
from megamf.model.dispatch import Dispatcher, Plan
from megamf.model.experts import ExpertLinear
from megamf.model.init import generator
from megamf.ops.grouped_linear import routed_linear

NAMES = ("lora_A", "lora_B")
_KEY = re.compile(r"(.+)\.lora_[AB]")


@dataclass(frozen=True)
class Target:
    """One adapted weight: state_dict key of its layer (without `.weight`), widths, and of stacked ones the experts."""

    prefix: str
    in_features: int
    out_features: int
    num_experts: int | None = None

    def shapes(self, rank: int) -> dict[str, tuple[int, ...]]:
        """Logical key -> shape: [L, D, r] and [L, r, F] of experts, [r, D] and [F, r] of a linear layer."""
        if self.num_experts is None:
            pair = (rank, self.in_features), (self.out_features, rank)
        else:
            pair = (self.num_experts, self.in_features, rank), (self.num_experts, rank, self.out_features)
        return {f"{self.prefix}.{name}": shape for name, shape in zip(NAMES, pair)}


def targets(model: ModelConfig, chosen: str) -> Iterator[Target]:
    """What `tune.lora_targets` stands for in this architecture, in the order of the layers."""
    width, hidden = model.n_embd, model.ffd_hidden
    for layer in range(model.n_layer):
        prefix = f"transformer.h.{layer}"
        if chosen in ("attention", "all"):
            yield from _attention_targets(model, layer, f"{prefix}.attn")
        if chosen in ("mlp", "all") and model.sparse:
            count = model.num_experts(layer, "mlp")
            yield Target(f"{prefix}.mlpf.experts", width, hidden, count)
            yield Target(f"{prefix}.mlpf.output_experts", hidden, width, count)
        elif chosen in ("mlp", "all"):
            yield Target(f"{prefix}.mlpf.fc1", width, hidden)
            yield Target(f"{prefix}.mlpf.fc2", hidden, width)


def _attention_targets(model: ModelConfig, layer: int, prefix: str) -> Iterator[Target]:
    width, attention = model.n_embd, model.att_hidden
    if model.kind == "gpt_neox":
        yield Target(f"{prefix}.qkv_proj", width, 3 * attention)
    elif model.sparse:
        count = model.num_experts(layer, "attention")
        yield Target(f"{prefix}.q_proj.experts", width, attention, count)
        yield Target(f"{prefix}.q_proj.output_experts", attention, width, count)
    else:
        yield Target(f"{prefix}.q_proj", width, attention)
    if model.kind != "gpt_neox" and not model.shares_kv:
        yield Target(f"{prefix}.k_proj", width, attention)
        yield Target(f"{prefix}.v_proj", width, attention)
    if not model.sparse:
        yield Target(f"{prefix}.o_proj", attention, width)


def adapter_shapes(model: ModelConfig, tune: Tune) -> dict[str, tuple[int, ...]]:
    """Logical key -> shape of every adapter tensor of a run with this `tune` section."""
    found: dict[str, tuple[int, ...]] = {}
    for target in targets(model, tune.lora_targets):
        found |= target.shapes(tune.lora_rank)
    return found


def is_adapter(key: str) -> bool:
    """Whether a logical key is that of an adapter tensor."""
    return _KEY.fullmatch(key) is not None


def scaling(tune: Tune) -> float:
    """alpha / r."""
    return tune.lora_alpha / tune.lora_rank


class ExpertAdapter(nn.Module):
    """A low-rank pair for each expert: lora_A_LDr, lora_B_LrF."""

    def __init__(self, layer: ExpertLinear, rank: int, scale: float) -> None:
        super().__init__()
        num_local, in_features, out_features = layer.shape
        self.dispatcher: Dispatcher = layer.dispatcher
        # What multiplies whole experts may not take matrices this narrow.
        self.backend = "auto" if layer.backend == "megablocks" else layer.backend
        self.scale = scale
        self.lora_A = nn.Parameter(layer.weight.new_empty(num_local, in_features, rank))
        self.lora_B = nn.Parameter(layer.weight.new_zeros(num_local, rank, out_features))

    def forward(
        self, x: torch.Tensor, plan: Plan, fans: tuple[int, int] | None = None, gate_NK: torch.Tensor | None = None
    ) -> torch.Tensor:
        """What the adapter adds to the layer's result for the same arguments."""
        if fans is None:
            h_Rr = self.dispatcher.linear(x, self.lora_A, plan, self.backend)
            return self.scale * self.dispatcher.linear(h_Rr, self.lora_B, plan, self.backend)
        in_fan, out_fan = fans
        h_Rr = routed_linear(x, self.lora_A, plan.count_L, plan.order_R, in_fan=in_fan, out_fan=0)
        return self.scale * routed_linear(
            h_Rr, self.lora_B, plan.count_L, plan.order_R, in_fan=0, out_fan=out_fan, gate_NK=gate_NK
        )


def attach(model: ModuleFormer, tune: Tune, seed: int) -> None:
    """Put adapters into a model whose other parameters are marked as trained or not; no effect unless strategy=lora.

    All experts must be here. A is U(-1/sqrt(D), 1/sqrt(D)), the same for every layout, B zero: outputs stay as they
    are. Raises UserError where linear layers are to be adapted and PEFT is not installed.
    """
    if tune.strategy != "lora":
        return
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    linear = []
    for target in targets(model.config, tune.lora_targets):
        if target.num_experts is None:
            linear.append(target.prefix)
            continue
        layer = model.get_submodule(target.prefix)
        layer.adapter = ExpertAdapter(layer, tune.lora_rank, scaling(tune))
        for expert, value_Dr in enumerate(layer.adapter.lora_A.detach()):
            _draw(value_Dr, target.in_features, seed, f"{target.prefix}.lora_A.{expert}")
    if linear:
        _attach_linear(model, linear, tune, seed)
    for name, parameter in model.named_parameters():
        # PEFT freezes what it finds, and calls what it wraps by another name.
        parameter.requires_grad_(trained.get(name, "lora_" in name))


def _attach_linear(model: ModuleFormer, names: list[str], tune: Tune, seed: int) -> None:
    require_peft()
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=tune.lora_rank, lora_alpha=tune.lora_alpha, lora_dropout=0.0, target_modules=names)
    inject_adapter_in_model(config, model)
    for name in names:
        down = model.get_submodule(name).lora_A["default"]
        _draw(down.weight.detach(), down.in_features, seed, f"{name}.lora_A")


def require_peft() -> None:
    """Raise UserError where PEFT, which adapts linear layers, is not installed."""
    try:
        import peft  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError(
            f"tune.strategy=lora adapts linear layers with PEFT, but {error}: pip install megamf[adapt]"
        ) from None


def needs_peft(model: ModelConfig, tune: Tune) -> bool:
    """Whether a run adapts linear layers."""
    return tune.strategy == "lora" and any(t.num_experts is None for t in targets(model, tune.lora_targets))


@torch.no_grad()
def _draw(value: torch.Tensor, in_features: int, seed: int, name: str) -> None:
    bound = 1.0 / math.sqrt(in_features)
    value.copy_(torch.empty(value.shape).uniform_(-bound, bound, generator=generator(seed, name)))

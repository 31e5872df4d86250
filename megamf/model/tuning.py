"""Continual learning: which parameters stay as they are, and which parts of stacked ones are trained alone.

Shapes: E experts of a layer and kind, I inserted ones (the last of them), D width, F expert width, G router width.
Source: the ModuleFormer paper, section on inserting new modules. Strategy 1 trains the inserted modules and the whole
router (A, B and A'), strategy 2 the inserted modules and A', the router's rows of the inserted modules.

A stacked tensor of which a part is trained becomes two parameters, the trained one under another name; `logical_parts`
says what they are of the whole.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from megamf.config.run import Tune
from megamf.model.experts import ExpertLinear, RoutedExperts
from megamf.model.moduleformer import ModuleFormer

_ADAPTER = re.compile(r"(\.lora_[AB])\.default\.weight$")

Inserted = Mapping[tuple[int, str], int]
"""(layer, `attention` or `mlp`) -> I, the number of inserted modules."""


def specialise(model: ModuleFormer, tune: Tune, inserted: Inserted) -> None:
    """Freeze what `tune.strategy` does not train and split what it trains in part. All experts must be here.

    With strategy lora everything is frozen (but embeddings, where those are trained): adapters are put in afterwards.

    Raises ValueError where a layer has fewer modules than are said to be inserted.
    """
    if tune.strategy == "full":
        return
    model.requires_grad_(False)
    if tune.embeddings:
        for parameter in (model.transformer.wte.weight, model.lm_head.weight):
            parameter.requires_grad_(True)
    if tune.strategy == "lora":
        return
    for layer, kind, experts in routed(model):
        count = inserted.get((layer, kind), 0)
        if count > experts.num_experts:
            raise ValueError(f"layer {layer} has {experts.num_experts} {kind} modules, {count} cannot be inserted ones")
        experts.gate.num_inserted = count
        if tune.strategy == "inserted":
            experts.gate.requires_grad_(True)
        if count:
            frozen = experts.num_experts - count
            experts.experts.train_from(frozen)
            experts.output_experts.train_from(frozen)
            if tune.strategy == "router_rows":
                experts.gate.train_rows_from(frozen)


def routed(model: nn.Module) -> Iterator[tuple[int, str, RoutedExperts]]:
    """(layer, kind, module) of every place with experts."""
    for layer, block in enumerate(model.transformer.h):
        for kind, experts in (("attention", getattr(block.attn, "q_proj", None)), ("mlp", block.mlpf)):
            if isinstance(experts, RoutedExperts):
                yield layer, kind, experts


@dataclass(frozen=True)
class Part:
    """What a parameter of this process is of the logical tensor `key` (a state_dict key of the whole model).

    experts: of an expert tensor, the global indices of the experts here; everywhere: those in all processes together.
    rows: of a router matrix that is split, its rows. A parameter with neither is the whole.
    adapter: it is no part of the model but trained beside it, and new where a run begins.
    """

    key: str
    experts: range | None = None
    everywhere: range | None = None
    rows: range | None = None
    adapter: bool = False


def logical_parts(model: nn.Module) -> dict[str, Part]:
    """Name of every parameter -> what it is."""
    parts = {name: _plain_part(name) for name, _ in model.named_parameters()}
    for prefix, module in model.named_modules():
        if not isinstance(module, RoutedExperts):
            continue
        for child, layer in module.named_children():
            if isinstance(layer, ExpertLinear):
                parts |= _expert_parts(f"{prefix}.{child}", layer, module)
        if module.gate.inserted_rows is not None:
            frozen = module.num_experts - module.gate.num_inserted
            key = f"{prefix}.gate.{module.gate.rows_name}"
            parts[key] = Part(key, rows=range(frozen))
            parts[f"{prefix}.gate.inserted_rows"] = Part(key, rows=range(frozen, module.num_experts))
    return parts


def _plain_part(name: str) -> Part:
    """PEFT keeps a layer that it adapts as `base_layer`, and its own matrices by the name of the adapter."""
    return Part(_ADAPTER.sub(r"\1", name.replace(".base_layer.", ".")), adapter=".lora_" in name)


def _expert_parts(prefix: str, layer: ExpertLinear, module: RoutedExperts) -> dict[str, Part]:
    key = f"{prefix}.weight"
    here, everywhere = module.local_experts, range(module.num_experts)
    if layer.adapter is not None:
        names = [name for name, _ in layer.adapter.named_parameters()]
        found = {f"{prefix}.adapter.{name}": Part(f"{prefix}.{name}", here, everywhere, None, True) for name in names}
        return {key: Part(key, here, everywhere)} | found
    if layer.inserted is None:
        return {key: Part(key, here, everywhere)}
    frozen = range(layer.weight.shape[0])
    trained = range(len(frozen), module.num_experts)
    return {key: Part(key, frozen, frozen), f"{prefix}.inserted": Part(key, trained, trained)}

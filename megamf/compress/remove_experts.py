"""Neurons and modules taken out of a ModuleFormer.

Shapes: E experts, D width, F hidden channels of an expert.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from megamf.compress.neurons import NeuronGroup
from megamf.hf.configuration import to_model_config
from megamf.hf.portable.modeling_pruned_moduleformer import PrunedModuleFormerConfig, PrunedModuleFormerForCausalLM
from megamf.modularity.places import Place, places, with_counts

Masks = Mapping[NeuronGroup, torch.Tensor]


def remove_from_moduleformer(model: nn.Module, keep: Masks) -> nn.Module:
    """Without whole modules first (router rows included), then without neurons of the modules that are left."""
    gone = {group: mask.cpu() for group, mask in keep.items() if not mask.all()}
    state = dict(model.state_dict())
    config = to_model_config(model.config)
    counts, left = {}, {}
    for place in places(config):
        group = next((g for g in gone if g.kind == f"{place.kind}_module" and g.layer == place.layer), None)
        kept = (
            torch.arange(config.num_experts(place.layer, place.kind)) if group is None else gone[group].nonzero()[:, 0]
        )
        counts[place], left[place] = len(kept), kept
        if group is not None:
            for key in (*place.expert_keys(), place.rows_key(config)):
                state[key] = state[key][kept.to(state[key].device)]
    small = with_counts(config, counts)
    tree = model.config.to_dict() | {"n_att_experts": small.n_att_experts, "n_mlp_experts": small.n_mlp_experts}
    for name in ("n_att_experts_per_layer", "n_mlp_experts_per_layer"):
        tree[name] = getattr(small, name)
    kinds = {group.kind for group in gone} - {"attention_module", "mlp_module"}
    if not kinds:
        return _filled(model, type(model.config), type(model), tree, state)
    entries = [_cut_layer(layer, left, gone, state) for layer in range(config.n_layer)]
    widths = {size for entry in entries for size in entry["ffn"] or [config.ffd_hidden]}
    if kinds == {"ffn"} and len(widths) == 1 and min(widths) > 0:
        tree["ffd_hidden"] = widths.pop()
        for layer in range(config.n_layer):
            at = f"transformer.h.{layer}.mlpf."
            D, E = config.n_embd, counts[Place(layer, "mlp")]
            inner, outer = f"{at}experts.weight", f"{at}output_experts.weight"
            if state[inner].dim() == 2:
                state[inner] = state[inner].view(D, E, -1).transpose(0, 1).contiguous()
                state[outer] = state[outer].view(E, -1, D)
        return _filled(model, type(model.config), type(model), tree, state)
    tree["pruned_layers"] = entries
    return _filled(model, PrunedModuleFormerConfig, PrunedModuleFormerForCausalLM, tree, state)


def _cut_layer(layer: int, left: Mapping[Place, torch.Tensor], gone: Masks, state: dict[str, torch.Tensor]) -> dict:
    """Cut the experts' tensors of one layer in `state` -> its entry of `pruned_layers`."""
    sizes: dict[str, list[int] | None] = {"ffn": None, "queries": None, "outputs": None}
    masks = {(g.kind, g.expert): mask for g, mask in gone.items() if g.layer == layer and g.expert is not None}
    at = f"transformer.h.{layer}."
    for kind, name, place, parts in (
        ("ffn", "ffn", Place(layer, "mlp"), ((f"{at}mlpf.experts", True), (f"{at}mlpf.output_experts", False))),
        ("qk", "queries", Place(layer, "attention"), ((f"{at}attn.q_proj.experts", True),)),
        ("vo", "outputs", Place(layer, "attention"), ((f"{at}attn.q_proj.output_experts", False),)),
    ):
        if not any(of == kind for of, _ in masks):
            continue
        for key, inner in parts:
            weight = state[f"{key}.weight"]
            hidden = weight.shape[2 if inner else 1]
            channels = [
                masks.get((kind, int(expert)), torch.ones(hidden, dtype=torch.bool)).nonzero().flatten()
                for expert in left[place]
            ]
            cut = [one.index_select(1 if inner else 0, c.to(one.device)) for one, c in zip(weight, channels)]
            state[f"{key}.weight"] = torch.cat(cut, dim=1 if inner else 0)
            if kind != "ffn":
                state[f"{key}.channels"] = torch.cat(channels).to(weight.device)
            sizes[name] = [len(c) for c in channels]
    return sizes


def _filled(model: nn.Module, config_class: type, cls: type, tree: dict[str, Any], state: dict) -> nn.Module:
    """A model of this class with copies of these tensors."""
    config = config_class(**{name: value for name, value in tree.items() if name != "model_type"})
    with torch.device("meta"):
        small = cls(config)
    small.load_state_dict({name: tensor.clone() for name, tensor in state.items()}, assign=True)
    for parameter in small.parameters():
        parameter.requires_grad_(True)
    small.generation_config = copy.deepcopy(model.generation_config)
    return small.train(model.training)

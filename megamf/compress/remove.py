"""Neurons taken out of the weights: smaller matrices, equal in value to the same neurons set to zero.

Shapes: U positions that a neuron takes, C neurons of a group.

A model keeps its architecture where that can express the sizes: for Llama-like models equal feed-forward widths in all
layers and equal numbers of heads, for GPT-NeoX equal feed-forward widths, for a ModuleFormer equal widths of all MLP
experts, and any numbers of modules. Otherwise it becomes one of the classes of `portable/modeling_pruned.py`, or of
`megamf/hf/portable/modeling_pruned_moduleformer.py`.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from megamf.compress.neurons import Keep, NeuronGroup, Shape, check_mask, pieces, shape_of
from megamf.compress.portable import modeling_pruned
from megamf.compress.remove_experts import remove_from_moduleformer
from megamf.errors import UserError

PRUNED = {
    "llama": (modeling_pruned.PrunedLlamaConfig, modeling_pruned.PrunedLlamaForCausalLM),
    "mistral": (modeling_pruned.PrunedMistralConfig, modeling_pruned.PrunedMistralForCausalLM),
    "qwen2": (modeling_pruned.PrunedQwen2Config, modeling_pruned.PrunedQwen2ForCausalLM),
    "gpt_neox": (modeling_pruned.PrunedGPTNeoXConfig, modeling_pruned.PrunedGPTNeoXForCausalLM),
}


@torch.no_grad()
def remove_neurons(model: nn.Module, keep: Mapping[NeuronGroup, torch.Tensor]) -> nn.Module:
    """A model of its own without the neurons that `keep` marks False; groups not named stay whole.

    The result has the class of `model` where that can express the sizes, and is in its mode. Of a ModuleFormer's whole
    modules the router rows go too: gates of the modules left grow (see `megamf.modularity.prune`); in every other case
    the result computes what `zero_neurons` leaves. Raises UserError for masks that fit no group of the model, or that
    leave nothing of one.
    """
    for group, keep_C in keep.items():
        check_mask(group, keep_C)
        if int(keep_C.sum()) < group.least:
            raise UserError(f"{group}: {int(keep_C.sum())} of {group.count} neurons would stay, at least {group.least}")
    shape = shape_of(model)
    if shape.family == "moduleformer":
        return remove_from_moduleformer(model, keep)
    state = dict(model.state_dict())
    sizes = [_cut_layer(model, shape, layer, keep, state) for layer in range(shape.layers)]
    config = _plain_config(model, shape, keep, sizes)
    if config is not None:
        return _filled(type(model), config, state, model)
    kind = model.config.model_type
    tree = model.config.to_dict()
    config = PRUNED[kind][0](**{name: value for name, value in tree.items() if name != "model_type"})
    config._attn_implementation = model.config._attn_implementation
    config.pruned_layers = sizes
    return _filled(PRUNED[kind][1], config, state, model)


def _cut_layer(model: nn.Module, shape: Shape, layer: int, keep: Mapping, state: dict[str, torch.Tensor]) -> dict:
    """Cut the tensors of one layer in `state` -> its entry of `pruned_layers`."""
    own = {group: mask for group, mask in keep.items() if group.layer == layer and not mask.all()}
    ffn = [group for group in own if group.kind == "ffn"]
    for group in ffn:
        for piece in pieces(model, group):
            index = piece.index_CU[own[group].cpu()].flatten().to(state[piece.name].device)
            state[piece.name] = state[piece.name].index_select(piece.dim, index)
    attention = {group: mask.cpu() for group, mask in own.items() if group.kind != "ffn"}
    name = (
        "gpt_neox.layers.{}.mlp.dense_h_to_4h.weight"
        if shape.family == "gpt_neox"
        else ("model.layers.{}.mlp.up_proj.weight")
    )
    sizes: dict[str, Any] = {"ffn": state[name.format(layer)].shape[0], "attention": None}
    if attention:
        sizes["attention"] = _cut_attention(model, shape, layer, attention, state)
    return sizes


def _cut_attention(
    model: nn.Module, shape: Shape, layer: int, masks: Keep, state: dict[str, torch.Tensor]
) -> dict[str, list[int]]:
    """Cut the projections of one attention layer, separate ones for GPT-NeoX too, in the order of PrunedAttention."""
    half, C, R = shape.rotary // 2, shape.channels, shape.repeats
    kept = {(group.kind, group.head): mask.nonzero().flatten() for group, mask in masks.items()}
    heads = kept.get(("head", None), torch.arange(shape.groups)).tolist()
    sizes: dict[str, list[int]] = {"pairs": [], "plain": [], "values": []}
    query, key, value, output, pairs = [], [], [], [], []
    for head in heads:
        pair = kept.get(("qk", head), torch.arange(half))
        plain = kept.get(("qk_plain", head), torch.arange(C - shape.rotary)) + shape.rotary
        own = torch.cat([pair, pair + half, plain])
        channel = kept.get(("vo", head), torch.arange(C))
        key.append(head * C + own)
        value.append(head * C + channel)
        pairs.append(pair)
        for reader in range(head * R, (head + 1) * R):
            query.append(reader * C + own)
            output.append(reader * C + channel)
        for name, size in (("pairs", pair), ("plain", plain), ("values", channel)):
            sizes[name].append(len(size))
    rows = {"q_proj": torch.cat(query), "k_proj": torch.cat(key), "v_proj": torch.cat(value)}
    at = f"model.layers.{layer}.self_attn."
    if shape.family == "gpt_neox":
        at = f"gpt_neox.layers.{layer}.attention."
        _split_fused(shape, at, state)
    for name, index in rows.items():
        for part in ("weight", "bias"):
            if (tensor := state.get(f"{at}{name}.{part}")) is not None:
                state[f"{at}{name}.{part}"] = tensor[index.to(tensor.device)]
    weight = state[f"{at}o_proj.weight"]
    state[f"{at}o_proj.weight"] = weight[:, torch.cat(output).to(weight.device)]
    state[f"{at}pairs"] = torch.cat(pairs).to(weight.device)
    return sizes


def _split_fused(shape: Shape, at: str, state: dict[str, torch.Tensor]) -> None:
    """Separate projections in the place of the fused ones of GPT-NeoX."""
    for part in ("weight", "bias"):
        fused = state.pop(f"{at}query_key_value.{part}", None)
        if fused is not None:
            per_head = fused.view(shape.heads, 3, shape.channels, *fused.shape[1:])
            for i, name in enumerate(("q_proj", "k_proj", "v_proj")):
                state[f"{at}{name}.{part}"] = per_head[:, i].flatten(0, 1)
        dense = state.pop(f"{at}dense.{part}", None)
        if dense is not None:
            state[f"{at}o_proj.{part}"] = dense


def _plain_config(model: nn.Module, shape: Shape, keep: Mapping, sizes: Sequence[dict]) -> Any | None:
    """The configuration of the model's own architecture with these sizes, or None where it cannot express them."""
    widths = {size["ffn"] for size in sizes}
    parts = {group.kind for group, mask in keep.items() if not mask.all() and group.kind != "ffn"}
    heads = {shape.groups if size["attention"] is None else len(size["attention"]["pairs"]) for size in sizes}
    if len(widths) > 1 or parts - {"head"} or len(heads) > 1 or (parts and shape.family != "llama"):
        return None
    config = copy.deepcopy(model.config)
    config.intermediate_size = widths.pop()
    left = heads.pop()
    if left != shape.groups:
        # The Llama configuration refuses a width that is no multiple of the number of heads.
        if shape.width % (left * shape.repeats):
            return None
        config.num_key_value_heads, config.num_attention_heads = left, left * shape.repeats
        config.head_dim = shape.channels
    return config


def _filled(cls: type, config: Any, state: Mapping[str, torch.Tensor], model: nn.Module) -> nn.Module:
    """A model of this class with copies of these tensors."""
    with torch.device("meta"):
        small = cls(config)
    known = small.state_dict()
    small.load_state_dict({name: tensor.clone() for name, tensor in state.items() if name in known}, assign=True)
    for name, module in model.named_modules():
        if name.endswith("rotary_emb"):
            # Its frequencies are in no state dict.
            small.set_submodule(name, copy.deepcopy(module))
    small.tie_weights()
    for name, parameter in small.named_parameters():
        parameter.requires_grad_(True)
        assert not parameter.is_meta, name
    small.generation_config = copy.deepcopy(model.generation_config)
    return small.train(model.training)

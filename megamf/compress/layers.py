"""Whole layers: how much each changes the hidden states, and models with fewer of them.

The influence of a block is 1 - cos(hidden state before it, hidden state after it), in the mean over tokens: ShortGPT's
"block influence" (arXiv 2403.03853). Layers with the lowest influence go.

Shapes: B batch, T time, D width.
"""

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from megamf.compress.documents import check_ids, padded_batches
from megamf.compress.neurons import layers_of
from megamf.errors import UserError

# Configuration lists with one entry a layer.
PER_LAYER = ("layer_types", "n_att_experts_per_layer", "n_mlp_experts_per_layer")


@torch.no_grad()
def block_influence(model: nn.Module, tokens: Sequence[torch.Tensor], *, batch: int = 4) -> torch.Tensor:
    """float64 [layers]: mean over all tokens of 1 - cos(input, output) of every block.

    Where a hidden state is zero the cosine counts as 0. Cosines are taken in float32, float64 for float64 models.
    """
    blocks = layers_of(model)
    check_ids(model, tokens)
    device = next(model.parameters()).device
    sums = torch.zeros(len(blocks), dtype=torch.float64)
    real_BT = torch.empty(0)

    def watch(index: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            before_BTD = args[0] if args else kwargs["hidden_states"]
            after_BTD = output[0] if isinstance(output, tuple) else output
            wide = torch.float64 if after_BTD.dtype == torch.float64 else torch.float32
            cos_BT = F.cosine_similarity(before_BTD.to(wide), after_BTD.to(wide), dim=-1)
            sums[index] += (1 - cos_BT)[real_BT].double().sum().cpu()

        return hook

    hooks = [block.register_forward_hook(watch(i), with_kwargs=True) for i, block in enumerate(blocks)]
    training = model.training
    model.eval()
    try:
        for ids_BT, mask_BT in padded_batches(tokens, batch):
            real_BT = mask_BT.to(device)
            model(input_ids=ids_BT.to(device), use_cache=False)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return sums / sum(len(row) for row in tokens)


def block_sizes(model: nn.Module) -> list[int]:
    """The parameters of every block."""
    return [sum(p.numel() for p in block.parameters()) for block in layers_of(model)]


def choose_layers(scores: Sequence[float], sizes: Sequence[int], target: float) -> list[int]:
    """Indices of the blocks to remove: in the order of their scores, lowest first, until the parameters that go are as
    near to `target` as they get. At least one block stays. Of equal scores the later block goes first.

    Raises UserError for a target that not even removing all blocks but one comes near to.
    """
    order = sorted(range(len(sizes)), key=lambda i: (float(scores[i]), -i))
    gone = [0]
    for index in order[:-1]:
        gone.append(gone[-1] + sizes[index])
    if target > sum(sizes):
        raise UserError(f"{target:.0f} parameters are to go, all {len(sizes)} layers have {sum(sizes)}")
    count = min(range(len(gone)), key=lambda n: (abs(gone[n] - target), n))
    return sorted(order[:count])


def remove_layers(model: nn.Module, layers: Iterable[int]) -> nn.Module:
    """A copy of the model without these blocks: the same architecture, saved by `save_pretrained` as a plain folder.

    Raises UserError for indices that do not exist and where no block would be left.
    """
    count, gone = len(layers_of(model)), set(layers)
    if outside := sorted(i for i in gone if not 0 <= i < count):
        raise UserError(f"layer {outside[0]} does not exist: the model has layers 0 to {count - 1}")
    if len(gone) == count:
        raise UserError(f"all {count} layers would go: at least one must stay")
    kept = [i for i in range(count) if i not in gone]
    small = copy.deepcopy(model)
    blocks = layers_of(small)
    for index in sorted(gone, reverse=True):
        del blocks[index]
    for index, block in enumerate(blocks):
        for module in block.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index  # the place in the key/value cache
    config = small.config
    for name in PER_LAYER:
        values = getattr(config, name, None)
        if values is not None:
            setattr(config, name, [values[i] for i in kept])
    config.num_hidden_layers = len(kept)
    for name in ("n_att_experts", "n_mlp_experts"):
        if getattr(config, f"{name}_per_layer", None) is not None:
            setattr(config, name, max(getattr(config, f"{name}_per_layer")))
    return small

"""What Cus-Prun is compared with, under one definition of the ratio: random, magnitude, gradient, layers, slicing.

* `random`: neurons drawn evenly.
* `magnitude`: neurons with the smallest weights (root mean square over all their parameters).
* `gradient`: neurons with the smallest first-order change of the loss, |weight * gradient| summed over the coupled
  structure: the criterion of LLM-Pruner (arXiv 2305.11627), which prunes every layer alike and may spare the first and
  last ones (`protect`; 4 and 2 of 32 in its experiments).
* `layers`: the blocks with the lowest influence (ShortGPT, `megamf.compress.layers`).
* `slicing`: a narrower residual stream (SliceGPT, `megamf.compress.slicing`).

The ratio is by how much the number of parameters falls, as a share of those of all neurons (in `neuron_groups`: the
matrices of attention and feed-forward layers) or of all parameters. Layers and widths are whole numbers: what was
reached is reported.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from megamf.compress.cus_prune import OF
from megamf.compress.documents import IGNORED, check_ids, padded_batches, token_windows
from megamf.compress.layers import block_influence, block_sizes, choose_layers, remove_layers
from megamf.compress.neurons import NeuronGroup, choose, layers_of, neuron_groups, neuron_sums, prunable_parameters
from megamf.compress.remove import remove_neurons
from megamf.compress.slicing import slice_model, sliced_config, width_for
from megamf.errors import UserError

Scores = dict[NeuronGroup, torch.Tensor]
NEURON_METHODS = ("random", "magnitude", "gradient")
METHODS = (*NEURON_METHODS, "layers", "slicing")


@dataclass(frozen=True)
class Pruned:
    """A smaller model. `reached`: by what share of `whole` parameters it is smaller; `ratio`: what was asked.

    `detail`: what went, for a report: {"neurons": {kind: number}}, {"layers": [index], "influence": [of all layers]}
    or {"width": dimensions left}.
    """

    model: nn.Module
    method: str
    ratio: float
    reached: float
    whole: int
    detail: dict[str, Any]


def prune_baseline(
    method: str,
    model: nn.Module,
    tokens: Sequence[torch.Tensor],
    ratio: float,
    *,
    seed: int = 0,
    of: str = "prunable",
    attention: str = "neurons",
    experts: str = "neurons",
    budget: str = "layer",
    multiple: int = 1,
    protect: tuple[int, int] = (0, 0),
    length: int = 256,
    batch: int = 4,
) -> Pruned:
    """A smaller copy of `model` by one of METHODS; `tokens` are calibration documents of token ids.

    `of`: what the ratio is a share of: the matrices of attention and feed-forward layers (`prunable`), or the model.
    `attention`, `experts`: which neurons there are (`neuron_groups`); `budget`: the same share from every group
    (`layer`) or one threshold (`global`); `protect`: how many of the first and of the last layers lose no neuron.
    `budget`, `protect` and `seed` matter to the methods of neurons only. `multiple`: sizes are multiples of it, of the
    stream too. `length`: of the windows of tokens that slicing is fitted on. Raises UserError for an unknown method, a
    ratio outside [0, 1) or that leaves nothing, and models that the method does not support.
    """
    if method not in METHODS:
        raise UserError(f"method {method!r} is not one of {', '.join(METHODS)}")
    if not 0 <= ratio < 1:
        raise UserError(f"ratio={ratio} is outside [0, 1): it is the share of parameters that goes")
    if of not in OF:
        raise UserError(f"of={of!r} is not one of {', '.join(OF)}")
    every = neuron_groups(model, attention=attention, experts=experts)
    before = count_parameters(model)
    whole = before if of == "all" else prunable_parameters(neuron_groups(model))
    if method in NEURON_METHODS:
        groups = unprotected(model, every, protect)
        scores = neuron_scores(method, model, tokens, groups, seed, batch)
        keep = choose(scores, groups, ratio, budget, multiple, of=whole)
        small = remove_neurons(model, keep)
        gone: dict[str, int] = {}
        for group, mask in keep.items():
            gone[group.kind] = gone.get(group.kind, 0) + int((~mask).sum())
        detail: dict[str, Any] = {"neurons": gone}
    elif method == "layers":
        influence = block_influence(model, tokens, batch=batch)
        layers = choose_layers(influence.tolist(), block_sizes(model), ratio * whole)
        small = remove_layers(model, layers)
        detail = {"layers": layers, "influence": influence.tolist()}
    else:
        width = width_for(sliced_config(model, 1), before - round(ratio * whole), multiple)
        end = getattr(model.config, "eos_token_id", None)
        windows_UT = token_windows(tokens, length, end if isinstance(end, int) else None)
        small = slice_model(model, windows_UT, width, batch=batch)
        detail = {"width": width}
    return Pruned(small, method, ratio, (before - count_parameters(small)) / whole, whole, detail)


def neuron_scores(
    method: str,
    model: nn.Module,
    tokens: Sequence[torch.Tensor],
    groups: Sequence[NeuronGroup],
    seed: int = 0,
    batch: int = 4,
) -> Scores:
    """group -> float32 [count] by one of NEURON_METHODS; low goes. Only `gradient` looks at the tokens."""
    if method == "random":
        return random_scores(groups, seed)
    if method == "magnitude":
        return magnitude_scores(model, groups)
    return gradient_scores(model, tokens, groups, batch=batch)


def random_scores(groups: Sequence[NeuronGroup], seed: int) -> Scores:
    """Uniform in [0, 1), from the seed and the group's place alone."""
    found = {}
    for group in groups:
        digest = hashlib.blake2b(f"{seed}:{group}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        found[group] = torch.rand(group.count, generator=generator)
    return found


@torch.no_grad()
def magnitude_scores(model: nn.Module, groups: Sequence[NeuronGroup]) -> Scores:
    """Root mean square of a neuron's parameters, so that neurons of unlike size compare."""

    def squares(name: str) -> torch.Tensor:
        return model.get_parameter(name).float().square()

    return {group: (neuron_sums(model, group, squares) / group.parameters).sqrt() for group in groups}


def gradient_scores(
    model: nn.Module, tokens: Sequence[torch.Tensor], groups: Sequence[NeuronGroup], *, batch: int = 4
) -> Scores:
    """Mean of |weight * gradient| over a neuron's parameters; the gradient is that of the mean loss a token.

    Divided by the size of the neuron, because a global threshold asks what a removed parameter costs. The model's own
    gradients are left as they were. Raises UserError where the documents have nothing to predict.
    """
    gradients = loss_gradients(model, tokens, batch=batch)

    def salience(name: str) -> torch.Tensor:
        gradient = gradients.get(name)
        weight = model.get_parameter(name).detach().float()
        return torch.zeros_like(weight) if gradient is None else (weight * gradient.float()).abs()

    return {group: neuron_sums(model, group, salience) / group.parameters for group in groups}


def loss_gradients(model: nn.Module, tokens: Sequence[torch.Tensor], *, batch: int = 4) -> dict[str, torch.Tensor]:
    """Name -> gradient of the mean loss over all predicted tokens, in evaluation mode.

    Parameters that the loss does not reach are left out.
    """
    check_ids(model, tokens)
    predicted = sum(len(row) - 1 for row in tokens)
    if predicted < 1:
        raise UserError(f"{len(tokens)} documents of one token or none: there is nothing to predict")
    parameters = dict(model.named_parameters())
    wanted = {name: parameter.requires_grad for name, parameter in parameters.items()}
    device = next(model.parameters()).device
    sums: dict[str, torch.Tensor] = {}
    training = model.training
    model.eval()
    try:
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        for ids_BT, mask_BT in padded_batches(tokens, batch):
            if ids_BT.shape[1] < 2:
                continue
            label_BT = ids_BT.masked_fill(~mask_BT, IGNORED)[:, 1:].to(device)
            with torch.enable_grad():
                logits_BTV = model(input_ids=ids_BT.to(device), use_cache=False).logits[:, :-1]
                wide = logits_BTV if logits_BTV.dtype == torch.float64 else logits_BTV.float()
                loss = F.cross_entropy(wide.flatten(0, 1), label_BT.flatten(), ignore_index=IGNORED, reduction="sum")
                found = torch.autograd.grad(loss / predicted, list(parameters.values()), allow_unused=True)
            for name, gradient in zip(parameters, found):
                if gradient is not None:
                    sums[name] = gradient if name not in sums else sums[name].add_(gradient)
    finally:
        model.train(training)
        for name, parameter in parameters.items():
            parameter.requires_grad_(wanted[name])
    return sums


def unprotected(model: nn.Module, groups: Sequence[NeuronGroup], protect: tuple[int, int]) -> list[NeuronGroup]:
    """The groups outside the first and last layers given. Raises UserError where no layer is left."""
    count = len(layers_of(model))
    first, last = protect
    if min(first, last) < 0 or first + last >= count:
        raise UserError(f"protect={first},{last} leaves no layer to prune: the model has {count}")
    return [group for group in groups if first <= group.layer < count - last]


def count_parameters(model: nn.Module) -> int:
    """Parameters of a model; shared ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())

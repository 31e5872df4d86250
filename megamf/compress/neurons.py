"""The neurons of a model: what is removed together, where it lies in the weights, zeroing, and the choice by score.

A neuron here is the smallest structure that can go without changing what stays:

* `ffn`: one hidden unit of a feed-forward layer: rows of up and gate projection (with biases), column of the down one.
* `qk`: one rotary pair of a key head, with the same pair of every query head that reads it. GPT-NeoX rotates a part of
  a head only; its other channels are single neurons of kind `qk_plain`.
* `vo`: one value channel, with the columns of the output projection of every query head that reads it.
* `head`: a key/value head with its query heads, whole.
* In a ModuleFormer `ffn`, `qk` and `vo` are neurons inside one expert (query column, output row: keys and values are
  shared by the experts and stay); `mlp_module` and `attention_module` are whole experts.

Source: Cus-Prun (arXiv 2506.02561): a neuron is a row or column of any weight matrix; the coupling of rows and columns
that makes the removal exact is chosen here.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import gcd

import torch
from torch import nn

from megamf.errors import UserError

LLAMA_LIKE = ("llama", "mistral", "qwen2")
SUPPORTED = (*LLAMA_LIKE, "gpt_neox", "moduleformer")
ATTENTION = ("neurons", "heads", "none")
EXPERTS = ("neurons", "modules")
LAYERS = {"llama": "model.layers", "gpt_neox": "gpt_neox.layers", "moduleformer": "transformer.h"}


@dataclass(frozen=True)
class NeuronGroup:
    """Neurons of one kind in one place: scores and masks are given by group.

    `parameters`: of one neuron. `unit`: channels of a head or hidden layer that one neuron takes (a rotary pair: 2).
    `head`: the key/value head, `expert`: the module; None where there is none. `least`: how many must stay.
    """

    layer: int
    kind: str
    count: int
    expert: int | None
    parameters: int
    unit: int = 1
    head: int | None = None
    least: int = 1

    def __str__(self) -> str:
        inside = "" if self.head is None else f" head {self.head}"
        inside += "" if self.expert is None else f" expert {self.expert}"
        return f"layer {self.layer} {self.kind}{inside}"


@dataclass(frozen=True)
class Piece:
    """Where the neurons of a group lie in one parameter: neuron n takes positions index_CU[n] of dimension `dim`.

    With `expert` the parameter is a stack of experts and `dim` counts the dimensions of one of them.
    """

    name: str
    dim: int
    index_CU: torch.Tensor
    expert: int | None = None


Scores = Mapping[NeuronGroup, torch.Tensor]
Keep = dict[NeuronGroup, torch.Tensor]


@dataclass(frozen=True)
class Shape:
    """What of an architecture matters here: `heads` query heads and `groups` key/value heads of `channels` each."""

    family: str
    layers: int
    width: int
    heads: int
    groups: int
    channels: int
    rotary: int

    @property
    def repeats(self) -> int:
        """Query heads that read one key/value head."""
        return self.heads // self.groups


def shape_of(model: nn.Module) -> Shape:
    """Raises UserError for a model that is not supported, naming what is."""
    config = getattr(model, "config", None)
    kind = getattr(config, "model_type", type(model).__name__)
    if kind not in SUPPORTED or not hasattr(model, "lm_head"):
        raise UserError(
            f"{type(model).__name__} (model_type {kind!r}) is not supported: neurons are known for causal language "
            f"models of model_type {', '.join(SUPPORTED)}"
        )
    if kind == "moduleformer":
        heads, width = config.n_head, config.n_embd
        return Shape(kind, config.n_layer, width, heads, heads, config.att_hidden // heads, 0)
    heads, width = config.num_attention_heads, config.hidden_size
    rope = getattr(config, "rope_parameters", None) or {}
    part = rope.get("partial_rotary_factor", 1.0)
    if kind == "gpt_neox":
        return Shape(kind, config.num_hidden_layers, width, heads, heads, width // heads, int(width // heads * part))
    channels = getattr(config, "head_dim", None) or width // heads
    if part != 1.0:
        raise UserError(f"model_type {kind!r} with partial_rotary_factor {part} is not supported, only 1.0")
    return Shape("llama", config.num_hidden_layers, width, heads, config.num_key_value_heads, channels, channels)


def neuron_groups(model: nn.Module, *, attention: str = "neurons", experts: str = "neurons") -> list[NeuronGroup]:
    """The groups of a Llama-like, GPT-NeoX-like or ModuleFormer causal language model (Hugging Face classes).

    `attention`: `neurons` (qk and vo), `heads` (whole key/value heads; not for ModuleFormer, whose heads share keys
    and values between experts) or `none`. `experts`: of a ModuleFormer, `neurons` inside them or whole `modules`.
    Raises UserError for other models and values.
    """
    if attention not in ATTENTION:
        raise UserError(f"attention={attention!r} is not one of {', '.join(ATTENTION)}")
    if experts not in EXPERTS:
        raise UserError(f"experts={experts!r} is not one of {', '.join(EXPERTS)}")
    shape = shape_of(model)
    if shape.family == "moduleformer":
        if attention == "heads":
            raise UserError("attention='heads' is not for a ModuleFormer: take experts='modules', or attention='none'")
        return _moduleformer_groups(model, attention, experts)
    found = []
    for layer in range(shape.layers):
        found.append(_group(model, layer, "ffn", _hidden(model, shape, layer)))
        for head in range(shape.groups):
            if attention == "neurons":
                if shape.rotary:
                    found.append(_group(model, layer, "qk", shape.rotary // 2, unit=2, head=head))
                if plain := shape.channels - shape.rotary:
                    least = 0 if shape.rotary else 1
                    found.append(_group(model, layer, "qk_plain", plain, head=head, least=least))
                found.append(_group(model, layer, "vo", shape.channels, head=head))
        if attention == "heads":
            found.append(_group(model, layer, "head", shape.groups, unit=shape.channels))
    return found


def _moduleformer_groups(model: nn.Module, attention: str, experts: str) -> list[NeuronGroup]:
    found = []
    for layer, block in enumerate(model.transformer.h):
        for kind, routed in (("attention", block.attn.q_proj), ("mlp", block.mlpf)):
            count, _, hidden = routed.experts.weight.shape
            if kind == "attention" and attention == "none":
                continue
            if experts == "modules":
                found.append(_group(model, layer, f"{kind}_module", count, unit=hidden, least=routed.gate.top_k))
                continue
            for expert in range(count):
                for name in ("qk", "vo") if kind == "attention" else ("ffn",):
                    found.append(_group(model, layer, name, hidden, expert=expert, least=0))
    return found


def _group(
    model: nn.Module,
    layer: int,
    kind: str,
    count: int,
    *,
    unit: int = 1,
    head: int | None = None,
    expert: int | None = None,
    least: int = 1,
) -> NeuronGroup:
    empty = NeuronGroup(layer, kind, count, expert, 0, unit, head, least)
    parameters = 0
    for piece in pieces(model, empty):
        weight = model.get_parameter(piece.name)
        shape = weight.shape if piece.expert is None else weight.shape[1:]
        parameters += piece.index_CU.shape[1] * (shape.numel() // shape[piece.dim])
    return NeuronGroup(layer, kind, count, expert, parameters, unit, head, least)


def _hidden(model: nn.Module, shape: Shape, layer: int) -> int:
    mlp = layers_of(model)[layer].mlp
    return (mlp.up_proj if shape.family == "llama" else mlp.dense_h_to_4h).out_features


def layers_of(model: nn.Module) -> nn.ModuleList:
    """The layers of a supported model."""
    return model.get_submodule(LAYERS[shape_of(model).family])


def pieces(model: nn.Module, group: NeuronGroup) -> list[Piece]:
    """Every place in the weights that the neurons of a group take, biases included."""
    shape = shape_of(model)
    if shape.family == "moduleformer":
        return _moduleformer_pieces(group)
    return _llama_pieces(model, shape, group) if shape.family == "llama" else _neox_pieces(model, shape, group)


def _linear(model: nn.Module, name: str, index_CU: torch.Tensor, dim: int) -> list[Piece]:
    """Rows (dim 0, with their biases) or columns (dim 1) of a linear layer."""
    found = [Piece(f"{name}.weight", dim, index_CU)]
    if dim == 0 and model.get_submodule(name).bias is not None:
        found.append(Piece(f"{name}.bias", 0, index_CU))
    return found


def _channels(shape: Shape, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Channels of a head that the neurons of a kind take: of queries and keys [C, U], of values [C, U]."""
    none = torch.empty(0, dtype=torch.long)
    every = torch.arange(shape.channels)
    half = torch.arange(shape.rotary // 2)
    if kind == "qk":
        return torch.stack([half, half + shape.rotary // 2], dim=1), none
    if kind == "qk_plain":
        return every[shape.rotary :, None], none
    if kind == "vo":
        return none, every[:, None]
    raise AssertionError(kind)


def _head_rows(shape: Shape, head: int) -> torch.Tensor:
    """First channels of the query heads that read key/value head `head`: [repeats, 1] in units of channels."""
    return (head * shape.repeats + torch.arange(shape.repeats))[:, None]


def _llama_pieces(model: nn.Module, shape: Shape, group: NeuronGroup) -> list[Piece]:
    at = f"model.layers.{group.layer}"
    if group.kind == "ffn":
        index = torch.arange(group.count)[:, None]
        rows = [piece for name in ("gate_proj", "up_proj") for piece in _linear(model, f"{at}.mlp.{name}", index, 0)]
        return rows + _linear(model, f"{at}.mlp.down_proj", index, 1)
    C = shape.channels
    if group.kind == "head":
        key = torch.arange(shape.groups * C).view(shape.groups, C)
        query = torch.arange(shape.heads * C).view(shape.groups, -1)
        parts = [("q_proj", query, 0), ("k_proj", key, 0), ("v_proj", key, 0), ("o_proj", query, 1)]
    else:
        qk_CU, vo_CU = _channels(shape, group.kind)
        own = group.head * C
        heads = _head_rows(shape, group.head) * C
        if group.kind == "vo":
            parts = [("v_proj", own + vo_CU, 0), ("o_proj", (heads + vo_CU.T).T, 1)]
        else:
            query = (heads[:, :, None] + qk_CU[None]).permute(1, 0, 2).flatten(1)
            parts = [("q_proj", query, 0), ("k_proj", own + qk_CU, 0)]
    return [piece for name, index, dim in parts for piece in _linear(model, f"{at}.self_attn.{name}", index, dim)]


def _neox_pieces(model: nn.Module, shape: Shape, group: NeuronGroup) -> list[Piece]:
    at = f"gpt_neox.layers.{group.layer}"
    if group.kind == "ffn":
        index = torch.arange(group.count)[:, None]
        return _linear(model, f"{at}.mlp.dense_h_to_4h", index, 0) + _linear(model, f"{at}.mlp.dense_4h_to_h", index, 1)
    C = shape.channels
    fused, out = f"{at}.attention.query_key_value", f"{at}.attention.dense"
    if group.kind == "head":
        return _linear(model, fused, torch.arange(shape.heads * 3 * C).view(shape.heads, -1), 0) + _linear(
            model, out, torch.arange(shape.heads * C).view(shape.heads, -1), 1
        )
    qk_CU, vo_CU = _channels(shape, group.kind)
    own = group.head * 3 * C
    if group.kind == "vo":
        return _linear(model, fused, own + 2 * C + vo_CU, 0) + _linear(model, out, group.head * C + vo_CU, 1)
    return _linear(model, fused, torch.cat([own + qk_CU, own + C + qk_CU], dim=1), 0)


def _moduleformer_pieces(group: NeuronGroup) -> list[Piece]:
    place = "attn.q_proj" if group.kind in ("qk", "vo", "attention_module") else "mlpf"
    at = f"transformer.h.{group.layer}.{place}"
    index = torch.arange(group.count)[:, None]
    if group.expert is None:
        return [Piece(f"{at}.experts.weight", 0, index), Piece(f"{at}.output_experts.weight", 0, index)]
    found = []
    if group.kind in ("ffn", "qk"):
        found.append(Piece(f"{at}.experts.weight", 1, index, group.expert))
    if group.kind in ("ffn", "vo"):
        found.append(Piece(f"{at}.output_experts.weight", 0, index, group.expert))
    return found


def neuron_sums(model: nn.Module, group: NeuronGroup, values: Callable[[str], torch.Tensor]) -> torch.Tensor:
    """Sum over each neuron's parameters of a quantity given by parameter name, in its shape -> [count], float32."""
    total = torch.zeros(group.count)
    for piece in pieces(model, group):
        tensor = values(piece.name)
        tensor = tensor if piece.expert is None else tensor[piece.expert]
        others = [dim for dim in range(tensor.dim()) if dim != piece.dim]
        along = tensor.float().sum(others) if others else tensor.float()
        total += along.cpu()[piece.index_CU].sum(1)
    return total


@torch.no_grad()
def zero_neurons(model: nn.Module, keep: Mapping[NeuronGroup, torch.Tensor]) -> None:
    """Set every parameter of the neurons that `keep` marks False to zero, in place.

    A whole module of a ModuleFormer gives nothing then, but its router still chooses it.
    """
    for group, keep_C in keep.items():
        check_mask(group, keep_C)
        for piece in pieces(model, group):
            weight = model.get_parameter(piece.name)
            weight = weight if piece.expert is None else weight[piece.expert]
            gone = piece.index_CU[~keep_C.cpu()].flatten().to(weight.device)
            weight.index_fill_(piece.dim, gone, 0)


def check_mask(group: NeuronGroup, keep_C: torch.Tensor) -> None:
    """Raises UserError for a mask of another length or dtype."""
    if keep_C.shape != (group.count,) or keep_C.dtype != torch.bool:
        raise UserError(
            f"{group}: the mask is {keep_C.dtype} {list(keep_C.shape)}, expected torch.bool [{group.count}]"
        )


def prunable_parameters(groups: Sequence[NeuronGroup]) -> int:
    """Parameters of all neurons of these groups."""
    return sum(group.count * group.parameters for group in groups)


def removed_parameters(keep: Mapping[NeuronGroup, torch.Tensor]) -> int:
    """Parameters of the neurons that `keep` marks False."""
    return sum(int((~mask).sum()) * group.parameters for group, mask in keep.items())


def choose(
    scores: Scores,
    groups: Sequence[NeuronGroup],
    ratio: float,
    budget: str = "global",
    multiple: int = 1,
    of: int | None = None,
) -> Keep:
    """The neurons that stay when the lowest-scored ones go.

    ratio: the share of parameters that goes, in [0, 1), of the neurons of `groups`, or of `of` parameters where that is
    given (the whole model's, say). It is met to the nearest block of neurons.
    budget: `global` sets one threshold for all scores; `layer` takes the same share from every group, so that all
    layers keep the same sizes. multiple: every group that loses neurons keeps a multiple of so many channels.
    Raises UserError where the ratio would leave nothing, and for scores that do not fit the groups.
    """
    _check_choice(scores, groups, ratio, budget, multiple)
    target = ratio * (prunable_parameters(groups) if of is None else of)
    possible = sum(sum(_blocks(group, multiple)) * group.parameters for group in groups)
    if target > possible + max((group.parameters for group in groups), default=0) / 2:
        whole = prunable_parameters(groups) if of is None else of
        raise UserError(
            f"ratio={ratio:g} of {whole:,} parameters leaves nothing of some layer: with these neurons and "
            f"multiple={multiple} at most {possible / whole:.4f} can go"
        )
    if budget == "layer":
        gone = _by_layer(groups, target, multiple)
    else:
        gone = _by_threshold(scores, groups, target, multiple)
    keep = {}
    for group in groups:
        mask = torch.ones(group.count, dtype=torch.bool)
        order = scores[group].argsort(stable=True)
        mask[order[: gone[group]]] = False
        keep[group] = mask
    return keep


def _check_choice(scores: Scores, groups: Sequence[NeuronGroup], ratio: float, budget: str, multiple: int) -> None:
    if not 0 <= ratio < 1:
        raise UserError(f"ratio={ratio} is outside [0, 1): it is the share of parameters that goes")
    if budget not in ("global", "layer"):
        raise UserError(f"budget={budget!r} is not one of global, layer")
    if multiple < 1:
        raise UserError(f"multiple={multiple} is below 1")
    for group in groups:
        values = scores.get(group)
        if values is None or values.shape != (group.count,):
            found = "no scores" if values is None else f"scores of shape {list(values.shape)}"
            raise UserError(f"{group} has {found}, expected [{group.count}]")
        if not torch.isfinite(values).all():
            raise UserError(f"{group} has scores that are not finite numbers")


def _blocks(group: NeuronGroup, multiple: int) -> list[int]:
    """Sizes of the blocks that can go one after another, so that a multiple of `multiple` channels stays after each."""
    step = multiple // gcd(multiple, group.unit)
    stays = -(-max(group.least, 0) // step) * step
    first = group.count % step
    free = group.count - stays
    sizes = [first] if 0 < first <= free else []
    return sizes + [step] * max(0, (free - sum(sizes)) // step)


def _by_layer(groups: Sequence[NeuronGroup], target: float, multiple: int) -> dict[NeuronGroup, int]:
    share = target / max(prunable_parameters(groups), 1)
    gone = {}
    for group in groups:
        cuts = [0]
        for size in _blocks(group, multiple):
            cuts.append(cuts[-1] + size)
        gone[group] = min(cuts, key=lambda cut, want=share * group.count: (abs(cut - want), cut))
    return gone


def _by_threshold(
    scores: Scores, groups: Sequence[NeuronGroup], target: float, multiple: int
) -> dict[NeuronGroup, int]:
    """Blocks in the order of their highest score, until the next one would lead further from the target."""
    blocks = []
    for place, group in enumerate(groups):
        ordered = scores[group].sort().values.tolist()
        end = 0
        for size in _blocks(group, multiple):
            end += size
            blocks.append((ordered[end - 1], place, end, size * group.parameters))
    gone = dict.fromkeys(groups, 0)
    removed = 0
    for _, place, end, cost in sorted(blocks):
        if abs(removed + cost - target) >= abs(removed - target):
            break
        removed += cost
        gone[groups[place]] = end
    return gone

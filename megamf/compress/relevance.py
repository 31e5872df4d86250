"""How much each neuron matters to a document: the change of its layer's output when the neuron is zeroed.

Shapes: T tokens of a document, D width, H query heads, G key/value heads, R = H/G, C channels of a head (or neurons of
a group), U channels of a neuron, P neurons at a time, F hidden width, E experts, K top-k, N routed tokens.

Source: Cus-Prun (arXiv 2506.02561) with the parallel forms of its sibling PLND (arXiv 2402.18815). The layer is the
attention or feed-forward layer, whose output is added to the residual stream; its input is that of the whole model. All
neurons of a layer are measured in one pass and not one at a time:

* feed-forward: neuron k adds h_k(t) times column k of the down projection, so that the change is |h_k| |W_k|;
* values: channel c adds the products of every reading head with its own column of the output projection; the norm of
  their sum is taken through the Gram matrices of the columns and of the heads' outputs;
* queries and keys: without the pair the logits lose q1 k1 + q2 k2; the softmax (stick-breaking in a ModuleFormer) is
  taken again and carried through values and output projection. This is exact and costs 2 H T^2 C + 2 T H C^2 R for
  every pair of a head instead of once, so that it is done for the first `qk_tokens` tokens of a document only.

`tests/compress/test_relevance.py` compares all of them with literal zeroing. Changes are root mean squares over tokens
of the norm over D, so that documents of different lengths compare.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from megamf.compress.documents import check_ids
from megamf.compress.neurons import NeuronGroup, Shape, layers_of, shape_of
from megamf.compress.relevance_experts import attention_changes, mlp_changes
from megamf.errors import UserError

# Attention weights that are held at one time while pairs are left out.
WEIGHTS_IN_MEMORY = 1 << 22
QK_TOKENS = 128

Watch = Callable[[int, int], None]
Take = Callable[[NeuronGroup, torch.Tensor], None]


NORMS = ("document", "token")


@dataclass
class Impacts:
    """values: group -> changes [documents, count], float32. stream: norms [2, documents, layers] after each layer.

    The first norm is the root mean square over a document's tokens, as the changes are; the second the median token's.
    They differ where a model has massive activations: the first token's norm is 37 to 178 times the median (in
    SmolLM2-135M from layer 11 to 27, where the first norm jumps from 148 to 2110).
    """

    values: dict[NeuronGroup, torch.Tensor]
    stream: torch.Tensor

    def relative(self, norm: str = "document") -> dict[NeuronGroup, torch.Tensor]:
        """The changes as shares of the norm, one of NORMS, of the stream that they are made in."""
        stream = self.stream[NORMS.index(norm)]
        return {group: value / stream[:, group.layer, None] for group, value in self.values.items()}


@dataclass
class _Document:
    """What is collected while one document goes through the model."""

    values: dict[NeuronGroup, torch.Tensor] = field(default_factory=dict)
    stream: dict[int, torch.Tensor] = field(default_factory=dict)

    def take(self, group: NeuronGroup, change_C: torch.Tensor) -> None:
        self.values[group] = change_C.float().cpu()


@torch.no_grad()
def impacts(
    model: nn.Module,
    groups: Sequence[NeuronGroup],
    documents: Sequence[torch.Tensor],
    *,
    qk_tokens: int = QK_TOKENS,
    on_document: Watch | None = None,
) -> Impacts:
    """The change of its layer's output that zeroing each neuron of `groups` makes, for each document.

    documents: token ids [T], int64. qk_tokens: how many tokens of each are looked at for queries and keys. The model is
    run in evaluation mode and left as it was. Raises UserError for documents of no token, token ids that the model does
    not know, and documents longer than an attention window of the model.
    """
    if not documents or any(not len(document) for document in documents):
        raise UserError(f"{len(documents)} documents, some of them without a token: there is nothing to measure")
    if qk_tokens < 2:
        raise UserError(f"qk_tokens={qk_tokens}: a query needs at least 2 tokens to have a choice")
    check_ids(model, documents)
    _check_window(model, max(map(len, documents)))
    device, training = next(model.parameters()).device, model.training
    rows = []
    model.eval()
    try:
        for done, document in enumerate(documents, start=1):
            found = _Document()
            with _watched(model, groups, found, qk_tokens):
                model(input_ids=document[None].to(device), use_cache=False)
            rows.append(found)
            if on_document is not None:
                on_document(done, len(documents))
    finally:
        model.train(training)
    values = {group: torch.stack([row.values[group] for row in rows]) for group in groups}
    stream = torch.stack([torch.stack([row.stream[i] for i in range(len(row.stream))], 1) for row in rows], 1)
    return Impacts(values, stream)


def _check_window(model: nn.Module, longest: int) -> None:
    window = getattr(model.config, "sliding_window", None)
    if window is not None and longest > window:
        raise UserError(f"a document has {longest} tokens, the model attends to {window}: give shorter documents")


@contextmanager
def _watched(model: nn.Module, groups: Sequence[NeuronGroup], found: _Document, qk_tokens: int) -> Iterator[None]:
    """Hooks that put the changes of every group into `found` while the model runs."""
    shape = shape_of(model)
    own: dict[int, list[NeuronGroup]] = {}
    for group in groups:
        own.setdefault(group.layer, []).append(group)
    handles = []
    try:
        for index, layer in enumerate(layers_of(model)):
            handles.append(layer.register_forward_hook(_stream_hook(index, found)))
            wanted = own.get(index, [])
            if shape.family == "moduleformer":
                handles += _moduleformer_hooks(layer, wanted, found.take, qk_tokens)
            else:
                handles += _dense_hooks(layer, shape, wanted, found.take, qk_tokens)
        yield
    finally:
        for handle in handles:
            handle.remove()


def _stream_hook(index: int, found: _Document) -> Callable[..., None]:
    def hook(_module: nn.Module, _arguments: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        square_T = promote(hidden).flatten(0, 1).square().sum(1)
        found.stream[index] = torch.stack([root_mean(square_T), square_T.median().sqrt()]).float().cpu()

    return hook


def _moduleformer_hooks(layer: nn.Module, groups: list[NeuronGroup], take: Take, qk_tokens: int) -> list[Any]:
    def attention(module: nn.Module, arguments: tuple) -> None:
        attention_changes(module, arguments[0], groups, take, qk_tokens)

    def mlp(module: nn.Module, arguments: tuple) -> None:
        mlp_changes(module, arguments[0], groups, take)

    return [layer.attn.register_forward_pre_hook(attention), layer.mlpf.register_forward_pre_hook(mlp)]


def _dense_hooks(layer: nn.Module, shape: Shape, groups: list[NeuronGroup], take: Take, qk_tokens: int) -> list[Any]:
    neox = shape.family == "gpt_neox"
    attention = layer.attention if neox else layer.self_attn
    out = attention.dense if neox else attention.o_proj
    down = layer.mlp.dense_4h_to_h if neox else layer.mlp.down_proj
    by_kind: dict[str, list[NeuronGroup]] = {}
    for group in groups:
        by_kind.setdefault(group.kind, []).append(group)

    def ffn(module: nn.Linear, arguments: tuple) -> None:
        h_TF = promote(arguments[0].flatten(0, -2))
        change_F = root_mean(h_TF.square()) * promote(module.weight).norm(dim=0)
        for group in by_kind["ffn"]:
            take(group, change_F)

    def values(module: nn.Linear, arguments: tuple) -> None:
        o_TGRC = promote(arguments[0].flatten(0, -2)).view(-1, shape.groups, shape.repeats, shape.channels)
        weight_DGRC = promote(module.weight).view(-1, shape.groups, shape.repeats, shape.channels)
        change_GC = value_changes(o_TGRC, weight_DGRC)
        for group in by_kind.get("vo", ()):
            take(group, change_GC[group.head])
        for group in by_kind.get("head", ()):
            y_GTD = torch.einsum("tgrc,dgrc->gtd", o_TGRC, weight_DGRC)
            take(group, root_mean(y_GTD.square().sum(2), 1))

    def queries(module: nn.Module, arguments: tuple, named: dict) -> None:
        hidden = named["hidden_states"] if "hidden_states" in named else arguments[0]
        q_HTC, k_GTC, v_GTC = heads_of(module, shape, hidden[0, :qk_tokens], named["position_embeddings"])
        weight_DHC = promote(out.weight).view(-1, shape.heads, shape.channels)
        for kind, index_PU in neuron_channels(shape).items():
            for group in by_kind.get(kind, ()):
                own = slice(group.head * shape.repeats, (group.head + 1) * shape.repeats)
                change_P = query_changes(
                    q_HTC[own], k_GTC[group.head], v_GTC[group.head], weight_DHC[:, own], index_PU, module.scaling
                )
                take(group, change_P)

    handles = []
    if "ffn" in by_kind:
        handles.append(down.register_forward_pre_hook(ffn))
    if {"vo", "head"} & by_kind.keys():
        handles.append(out.register_forward_pre_hook(values))
    if {"qk", "qk_plain"} & by_kind.keys():
        handles.append(attention.register_forward_pre_hook(queries, with_kwargs=True))
    return handles


def promote(x: torch.Tensor) -> torch.Tensor:
    """float32 for lower precisions, unchanged for float32 and float64."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def root_mean(x: torch.Tensor, dim: int = 0) -> torch.Tensor:
    """Root of the mean over the tokens, which are dimension `dim`."""
    return x.mean(dim).clamp_min(0).sqrt()


def value_changes(o_TGRC: torch.Tensor, weight_DGRC: torch.Tensor) -> torch.Tensor:
    """Outputs of the heads and their columns -> the change that each value channel makes, [G, C]."""
    outputs_GCRR = torch.einsum("tgrc,tgsc->gcrs", o_TGRC, o_TGRC)
    columns_GCRR = torch.einsum("dgrc,dgsc->gcrs", weight_DGRC, weight_DGRC)
    return ((outputs_GCRR * columns_GCRR).sum((2, 3)) / o_TGRC.shape[0]).clamp_min(0).sqrt()


def neuron_channels(shape: Shape) -> dict[str, torch.Tensor]:
    """Kind -> channels of a head that its neurons take, [neurons, U]."""
    half = torch.arange(shape.rotary // 2)
    return {
        "qk": torch.stack([half, half + shape.rotary // 2], dim=1),
        "qk_plain": torch.arange(shape.rotary, shape.channels)[:, None],
    }


def heads_of(
    module: nn.Module, shape: Shape, x_TD: torch.Tensor, positions: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries and keys with their rotary positions, and values, of an attention module: q_HTC, k_GTC, v_GTC."""
    T, C = x_TD.shape[0], shape.channels
    if shape.family == "gpt_neox":
        q, k, v = module.query_key_value(x_TD).view(T, shape.heads, 3, C).permute(2, 1, 0, 3)
    else:
        projections = (module.q_proj, module.k_proj, module.v_proj)
        q, k, v = (project(x_TD).view(T, -1, C).transpose(0, 1) for project in projections)
    cos_TC, sin_TC = (promote(part[0, :T]) for part in positions)
    return _rotate(promote(q), cos_TC, sin_TC), _rotate(promote(k), cos_TC, sin_TC), promote(v)


def _rotate(x_HTC: torch.Tensor, cos_TC: torch.Tensor, sin_TC: torch.Tensor) -> torch.Tensor:
    rotary = cos_TC.shape[-1]
    first, second = x_HTC[..., :rotary].chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return torch.cat([x_HTC[..., :rotary] * cos_TC + turned * sin_TC, x_HTC[..., rotary:]], dim=-1)


def query_changes(
    q_RTC: torch.Tensor,
    k_TC: torch.Tensor,
    v_TC: torch.Tensor,
    weight_DRC: torch.Tensor,
    index_PU: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """The change that leaving out the channels index_PU[p] of one key head's queries and keys makes, for every p.

    weight_DRC: the columns of the output projection for the heads that read this key head.
    """
    R, T, _ = q_RTC.shape
    hidden_TT = torch.ones(T, T, dtype=torch.bool, device=q_RTC.device).triu(1)
    logits_RTT = (q_RTC @ k_TC.T * scaling).masked_fill(hidden_TT, -torch.inf)
    whole_RTC = logits_RTT.softmax(-1) @ v_TC
    # |W x| = |R x| of W = Q R, which has no more rows than columns.
    factor = torch.linalg.qr(weight_DRC.flatten(1), mode="r").R
    changes = []
    for index_pU in index_PU.to(q_RTC.device).split(max(1, WEIGHTS_IN_MEMORY // (R * T * T))):
        query = q_RTC[:, :, index_pU].permute(2, 0, 1, 3)
        key = k_TC[:, index_pU].permute(1, 2, 0)
        left_pRTT = logits_RTT - query @ key[:, None] * scaling
        difference_pRTC = left_pRTT.softmax(-1) @ v_TC - whole_RTC
        y_pTD = difference_pRTC.permute(0, 2, 1, 3).flatten(2) @ factor.T
        changes.append(root_mean(y_pTD.square().sum(2), 1))
    return torch.cat(changes)

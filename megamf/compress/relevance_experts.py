"""The change that neurons and modules of a ModuleFormer make to their layer's output; see `relevance`.

Shapes: T tokens of a document, N of them that chose an expert, D width, G heads inside an expert, C channels of a head,
A = G*C attention width, F hidden width of an expert, E experts, K top-k, P neurons at a time.

Routing stays as it is: the router sees the layer's input, which zeroing in this layer does not change.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn
from torch.nn import functional as F

from megamf.compress.neurons import NeuronGroup

# Attention weights that are held at one time while channels are left out.
WEIGHTS_IN_MEMORY = 1 << 22

Take = Callable[[NeuronGroup, torch.Tensor], None]


def _promote(x: torch.Tensor) -> torch.Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def routed_rows(gate: nn.Module, x_TD: torch.Tensor, experts: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """For every expert the tokens that chose it, in order, and their gates: index_N, gate_N."""
    expert_TK, gate_TK = gate(x_TD)[:2]
    for expert in range(experts):
        index_N, slot_N = (expert_TK == expert).nonzero(as_tuple=True)
        yield index_N, gate_TK[index_N, slot_N]


def mlp_changes(module: nn.Module, x_BTD: torch.Tensor, groups: Sequence[NeuronGroup], take: Take) -> None:
    """Gives `take` the changes of the MLP experts' neurons, and of the experts as a whole, that `groups` ask for."""
    inner_EDF, outer_EFD = _promote(module.experts.weight), _promote(module.output_experts.weight)
    x_TD = x_BTD.flatten(0, 1)
    own = {group.expert: group for group in groups if group.kind == "ffn"}
    whole = [group for group in groups if group.kind == "mlp_module"]
    if not own and not whole:
        return
    sums_E = x_TD.new_zeros(inner_EDF.shape[0], dtype=inner_EDF.dtype)
    for expert, (index_N, gate_N) in enumerate(routed_rows(module.gate, x_TD, inner_EDF.shape[0])):
        h_NF = module.activation(_promote(x_TD[index_N]) @ inner_EDF[expert]) * gate_N[:, None]
        if expert in own:
            size_F = h_NF.square().sum(0).div(len(x_TD)).sqrt()
            take(own[expert], size_F * outer_EFD[expert].norm(dim=1))
        sums_E[expert] = (h_NF @ outer_EFD[expert]).square().sum()
    for group in whole:
        take(group, (sums_E / len(x_TD)).sqrt())


def attention_changes(
    module: nn.Module, x_BTD: torch.Tensor, groups: Sequence[NeuronGroup], take: Take, qk_tokens: int
) -> None:
    """Gives `take` the changes of the attention experts' neurons, and of the experts as a whole."""
    routed, G = module.q_proj, module.num_heads
    query_EDA, out_EAD = _promote(routed.experts.weight), _promote(routed.output_experts.weight)
    wanted = {(group.kind, group.expert): group for group in groups if group.kind in ("qk", "vo")}
    whole = [group for group in groups if group.kind == "attention_module"]
    if not wanted and not whole:
        return
    x_TD = x_BTD.flatten(0, 1)
    T, first = len(x_TD), min(len(x_TD), qk_tokens)
    keys, values = (
        _promote(x_TD if project is None else project(x_TD)).view(T, G, -1).transpose(0, 1)
        for project in (module.k_proj, module.v_proj)
    )
    sums_E = x_TD.new_zeros(query_EDA.shape[0], dtype=query_EDA.dtype)
    for expert, (index_N, gate_N) in enumerate(routed_rows(routed.gate, x_TD, query_EDA.shape[0])):
        q_GNC = (_promote(x_TD[index_N]) @ query_EDA[expert]).unflatten(1, (G, -1)).transpose(0, 1)
        logits_GNT = q_GNC @ keys.transpose(1, 2) * q_GNC.shape[-1] ** -0.5
        o_NGC = (stick_breaking(logits_GNT, index_N) @ values).transpose(0, 1)
        o_NA = o_NGC.flatten(1) * gate_N[:, None]
        sums_E[expert] = (o_NA @ out_EAD[expert]).square().sum()
        if ("vo", expert) in wanted:
            size_A = o_NA.square().sum(0).div(T).sqrt()
            take(wanted["vo", expert], size_A * out_EAD[expert].norm(dim=1))
        if ("qk", expert) in wanted:
            seen = index_N < first
            out_GCD = out_EAD[expert].view(G, -1, out_EAD.shape[2])
            sums_GC = torch.stack(
                [
                    query_changes(q[seen], k[:first], v[:first], out, index_N[seen], gate_N[seen])
                    for q, k, v, out in zip(q_GNC, keys, values, out_GCD)
                ]
            )
            take(wanted["qk", expert], (sums_GC.flatten() / first).sqrt())
    for group in whole:
        take(group, (sums_E / T).sqrt())


def query_changes(
    q_NC: torch.Tensor,
    k_TC: torch.Tensor,
    v_TC: torch.Tensor,
    out_CD: torch.Tensor,
    index_N: torch.Tensor,
    gate_N: torch.Tensor,
) -> torch.Tensor:
    """Summed squares of the change that leaving out each query channel of one head of an expert makes, [C].

    index_N: the positions of the queries among the T keys.
    """
    N, C = q_NC.shape
    if not N:
        return q_NC.new_zeros(C)
    logits_NT = q_NC @ k_TC.T * C**-0.5
    whole_NC = stick_breaking(logits_NT, index_N) @ v_TC
    # |x W| = |x R^T| of W^T = Q R, which has no more rows than columns.
    factor = torch.linalg.qr(out_CD.T, mode="r").R.T
    sums = []
    for channel_P in torch.arange(C, device=q_NC.device).split(max(1, WEIGHTS_IN_MEMORY // (N * len(k_TC)))):
        own_PNT = q_NC[:, channel_P].T[:, :, None] * k_TC[:, channel_P].T[:, None, :]
        left_PNT = stick_breaking(logits_NT - own_PNT * C**-0.5, index_N)
        difference_PND = (left_PNT @ v_TC - whole_NC) @ factor * gate_N[:, None]
        sums.append(difference_PND.square().sum((1, 2)))
    return torch.cat(sums)


def stick_breaking(logits_XNT: torch.Tensor, index_N: torch.Tensor) -> torch.Tensor:
    """Stick-breaking weights of queries at positions index_N over T keys, the own position included."""
    visible_NT = torch.arange(logits_XNT.shape[-1], device=logits_XNT.device) <= index_N[:, None]
    left = F.logsigmoid(-logits_XNT).masked_fill(~visible_NT, 0.0)
    later = F.pad(left[..., 1:], (0, 1)).flip(-1).cumsum(-1).flip(-1)
    return (F.logsigmoid(logits_XNT) + later).exp().masked_fill(~visible_NT, 0.0)

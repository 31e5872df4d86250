"""Stick-breaking attention: as a mixture of attention experts, and dense for the baselines.

Shapes: B batch, T query time, S key time, N = B*T tokens, D width, A attention width of one expert, K top-k,
G heads inside each expert (= key/value heads), H = K*G query heads, C = A/G head channels, R rows by local expert.
Source: the released ModuleFormer. Each expert owns a query and an output projection; keys and values are shared.
"""

import torch
from torch import nn

from megamf.config import ModelConfig
from megamf.model.backends import AUTOMATIC, Backends
from megamf.model.cache import LayerCache
from megamf.model.context import WHOLE, Context
from megamf.model.dispatch import Dispatcher
from megamf.model.experts import RoutedExperts
from megamf.model.router import RouterStats


class ExpertAttention(nn.Module):
    """Mixture of attention heads: sum over the chosen e of p_e * W_o^e Attn(W_q^e x, K, V).

    K = V = x where `config.shares_kv` (all released models), else linear maps with bias.
    """

    def __init__(
        self, config: ModelConfig, dispatcher: Dispatcher, backends: Backends = AUTOMATIC, context: Context = WHOLE
    ) -> None:
        super().__init__()
        self.num_heads = config.n_head
        self.backend = backends.attention
        self.context = context
        self.q_proj = RoutedExperts(config, config.n_att_experts, config.k_att, config.att_hidden, dispatcher, backends)
        if config.shares_kv:
            self.k_proj = self.v_proj = None
        else:
            self.k_proj = nn.Linear(config.n_embd, config.att_hidden)
            self.v_proj = nn.Linear(config.n_embd, config.att_hidden)

    def forward(
        self,
        x_BTD: torch.Tensor,
        start_BT: torch.Tensor | None = None,
        key_mask_BS: torch.Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> tuple[torch.Tensor, RouterStats]:
        """x_BTD -> y_BTD and the router's statistics. start_BT, key_mask_BS: see `stickbreaking_attention`."""
        B, T, _ = x_BTD.shape
        experts = self.q_proj
        x_ND = x_BTD.flatten(0, 1)
        routing = experts.gate(x_ND)
        plan = experts.dispatcher.plan(routing.expert_NK, experts.num_experts)
        fused = experts.fuses(x_ND, plan)
        # Tokens travel while keys and values are made, keys of other ranks while the queries are made.
        sent = None if fused else experts.dispatcher.send(x_ND, plan)
        k_BGSC, v_BGSC = self.keys_and_values(x_BTD)
        if cache is not None:
            k_BGSC, v_BGSC = cache.append(k_BGSC, v_BGSC)
        keys = self.context.share(k_BGSC, v_BGSC)

        if fused:
            q_NKA = experts.project_in(x_ND, plan, 1)
        else:
            q_RA = experts.experts(experts.dispatcher.receive(sent, plan), plan)
            q_NKA = experts.dispatcher.combine(q_RA, plan, None)
        q_BHTC = split_heads(q_NKA.view(B, T, -1), plan.top_k * self.num_heads)
        o_BHTC = self.context.attend(q_BHTC, keys, start_BT, key_mask_BS, self.backend)
        o_NKA = o_BHTC.transpose(1, 2).reshape(B * T, plan.top_k, -1)

        if fused:
            y_ND = experts.project_out(o_NKA.flatten(0, 1), plan, routing.gate_NK, 1)
        else:
            y_RD = experts.output_experts(experts.dispatcher.dispatch(o_NKA, plan), plan)
            y_ND = experts.dispatcher.combine(y_RD, plan, routing.gate_NK)
        return self.context.before_backward(y_ND, keys).view_as(x_BTD), routing.stats

    def keys_and_values(self, x_BTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x_BTD -> k_BGTC and v_BGTC, the same object where K = V."""
        if self.k_proj is None or self.v_proj is None:
            shared_BGTC = split_heads(x_BTD, self.num_heads)
            return shared_BGTC, shared_BGTC
        return split_heads(self.k_proj(x_BTD), self.num_heads), split_heads(self.v_proj(x_BTD), self.num_heads)


class DenseAttention(nn.Module):
    """Multi-head stick-breaking attention with dense projections."""

    def __init__(self, config: ModelConfig, backends: Backends = AUTOMATIC, context: Context = WHOLE) -> None:
        super().__init__()
        self.num_heads = config.n_head
        self.backend = backends.attention
        self.context = context
        self.q_proj = nn.Linear(config.n_embd, config.att_hidden, bias=False)
        self.k_proj = nn.Linear(config.n_embd, config.att_hidden)
        self.v_proj = nn.Linear(config.n_embd, config.att_hidden)
        self.o_proj = nn.Linear(config.att_hidden, config.n_embd, bias=False)

    def forward(
        self,
        x_BTD: torch.Tensor,
        start_BT: torch.Tensor | None = None,
        key_mask_BS: torch.Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> tuple[torch.Tensor, None]:
        """x_BTD -> y_BTD; a dense layer has no router statistics."""
        k_BHSC = split_heads(self.k_proj(x_BTD), self.num_heads)
        v_BHSC = split_heads(self.v_proj(x_BTD), self.num_heads)
        if cache is not None:
            k_BHSC, v_BHSC = cache.append(k_BHSC, v_BHSC)
        keys = self.context.share(k_BHSC, v_BHSC)
        q_BHTC = split_heads(self.q_proj(x_BTD), self.num_heads)
        o_BHTC = self.context.attend(q_BHTC, keys, start_BT, key_mask_BS, self.backend)
        y_BTD = self.o_proj(o_BHTC.transpose(1, 2).flatten(2))
        return self.context.before_backward(y_BTD, keys), None


def split_heads(x_BTA: torch.Tensor, num_heads: int) -> torch.Tensor:
    """x_BTA -> view [B, heads, T, A / heads]."""
    B, T, A = x_BTA.shape
    return x_BTA.view(B, T, num_heads, A // num_heads).transpose(1, 2)

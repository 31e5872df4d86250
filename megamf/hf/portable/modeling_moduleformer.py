"""ModuleFormer in plain torch: loads with `trust_remote_code=True`, trains and generates without compiled code.

Shapes: B batch, T query time, S key time, N = B*T tokens, D width, V vocabulary, E experts, K top-k, G heads inside
an attention expert (= key/value heads), A attention width = G*C, C head channels, F expert width, R router width.
Logits of attention are made for a slice of the queries at a time, so that memory grows with S and not with T*S.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
)
from transformers.utils import can_return_tuple

from .configuration_moduleformer import ModuleFormerConfig

# Attention logits in memory at one time, over the batch and all heads.
LOGITS_IN_MEMORY = 1 << 24

ACTIVATIONS = {
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
}


@dataclass
class ModuleFormerModelOutput(BaseModelOutputWithPast):
    """aux_loss: the sum of all routers' auxiliary losses, scalar."""

    aux_loss: torch.FloatTensor | None = None


@dataclass
class ModuleFormerCausalLMOutput(CausalLMOutputWithPast):
    """aux_loss: the sum of all routers' auxiliary losses, scalar; `loss` holds it times aux_loss_weight."""

    aux_loss: torch.FloatTensor | None = None


def promote(x):
    """float32 for lower precisions, unchanged for float32 and float64."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def stick_breaking_attention(q_BKGTC, k_BGSC, v_BGSC, key_mask_BS=None):
    """Stick-breaking attention of the last T of S positions -> o_BKGTC, in the dtype of q.

    Query i gives key j <= i the share z_ij * prod_{j < m <= i} (1 - z_im) with z = sigmoid(q k / sqrt(C)). Keys that
    key_mask_BS marks False get no share and take none. What is left of the stick is dropped.
    """
    B, K, G, T, _ = q_BKGTC.shape
    S = k_BGSC.shape[2]
    rows = max(1, LOGITS_IN_MEMORY // (B * K * G * S))
    k_BGSC = k_BGSC.unsqueeze(1)
    v_BGSC = v_BGSC.unsqueeze(1)
    if rows >= T:
        return _attend(q_BKGTC, k_BGSC, v_BGSC, key_mask_BS, S - T)
    parts = []
    for first in range(0, T, rows):
        arguments = (q_BKGTC[..., first : first + rows, :], k_BGSC, v_BGSC, key_mask_BS, S - T + first)
        if torch.is_grad_enabled():
            parts.append(checkpoint(_attend, *arguments, use_reentrant=False))
        else:
            parts.append(_attend(*arguments))
    return torch.cat(parts, dim=-2)


def _attend(q, k, v, key_mask_BS, first):
    """The queries at positions first, first + 1, ... against all keys."""
    logits = promote(q) @ promote(k).transpose(-1, -2) * q.shape[-1] ** -0.5
    query = torch.arange(first, first + q.shape[-2], device=q.device)
    visible = torch.arange(k.shape[-2], device=q.device) <= query[:, None]
    if key_mask_BS is not None:
        visible = visible & key_mask_BS[:, None, None, None, :]
    log_left = F.logsigmoid(-logits).masked_fill(~visible, 0.0)
    # Sum over the keys after j: shift by one, so that no difference of two large sums is taken.
    later = F.pad(log_left[..., 1:], (0, 1)).flip(-1).cumsum(-1).flip(-1)
    weights = (F.logsigmoid(logits) + later).exp().masked_fill(~visible, 0.0)
    return (weights.to(v.dtype) @ v).to(q.dtype)


class Router(nn.Module):
    """Softmax over all experts, then the k largest; the gates are the raw probabilities."""

    def __init__(self, config, num_experts, top_k):
        super().__init__()
        self.gate_type = config.gate_type
        self.top_k = top_k
        self.sample_topk = config.sample_topk
        self.loss_type = config.aux_loss_type
        if config.gate_type == "mlp":
            self.w_gate = nn.Sequential(
                nn.Linear(config.n_embd, config.gating_size),
                nn.GELU(),
                nn.Dropout(config.moe_pdrop),
                nn.Linear(config.gating_size, num_experts, bias=False),
            )
        elif config.gate_type == "linear":
            self.w_gate = nn.Sequential(nn.Linear(config.n_embd, num_experts, bias=False))
        elif config.gate_type == "tanh":
            self.w_gate = nn.Sequential(
                nn.Linear(config.n_embd, config.gating_size, bias=False),
                nn.Tanh(),
                nn.Linear(config.gating_size, num_experts, bias=False),
            )
        else:
            self.w_gate = nn.Linear(config.n_embd, config.gating_size, bias=False)
            self.expert_centroids = nn.Parameter(torch.empty(num_experts, config.gating_size))
            self.temperature = nn.Parameter(torch.empty(1))

    def forward(self, x_ND):
        """x_ND -> expert_NK, gate_NK and this router's auxiliary loss."""
        if self.gate_type == "gmm":
            h_NR = F.normalize(promote(self.w_gate(x_ND)), dim=-1)
            centroids_ER = F.normalize(promote(self.expert_centroids), dim=-1)
            logits_NE = promote(self.temperature).exp() * (h_NR @ centroids_ER.t())
        else:
            if self.gate_type == "tanh":
                x_ND = F.normalize(promote(x_ND), dim=-1).to(x_ND.dtype)
            logits_NE = F.linear(promote(self.w_gate[:-1](x_ND)), promote(self.w_gate[-1].weight))
        prob_NE = logits_NE.softmax(dim=-1)
        expert_NK = self.choose(prob_NE.detach())
        gate_NK = prob_NE.gather(1, expert_NK)
        if self.gate_type == "tanh":
            # The chosen experts are parts of one sum: their outputs are added up as they are.
            gate_NK = torch.ones_like(gate_NK)
        return expert_NK, gate_NK, self.auxiliary_loss(logits_NE, prob_NE, expert_NK)

    def choose(self, prob_NE):
        """The k experts of each token; in training the last `sample_topk` of them are drawn."""
        if not (self.training and self.sample_topk):
            return prob_NE.topk(self.top_k, dim=-1).indices
        sure_NK = prob_NE.topk(self.top_k - self.sample_topk, dim=-1).indices
        open_NE = (prob_NE + 1e-6).scatter(1, sure_NK, 0.0)
        return torch.cat([sure_NK, torch.multinomial(open_NE, self.sample_topk)], dim=1)

    def auxiliary_loss(self, logits_NE, prob_NE, expert_NK):
        """mi: H(m|x) - H(m). Otherwise: E * sum of probability share times load share, + 0.1 * mean logsumexp^2."""
        N, E = prob_NE.shape
        if self.loss_type == "mi":
            mean_E = prob_NE.mean(0)
            conditional = -(prob_NE * logits_NE.log_softmax(-1)).sum() / N
            return conditional + (mean_E * (mean_E + 1e-8).log()).sum()
        load_E = torch.zeros(E, dtype=prob_NE.dtype, device=prob_NE.device)
        load_E.scatter_add_(0, expert_NK.flatten(), torch.ones_like(expert_NK.flatten(), dtype=prob_NE.dtype))
        shares = F.normalize(prob_NE.sum(0), p=1, dim=0) * F.normalize(load_E, p=1, dim=0)
        return E * shares.sum() + 0.1 * logits_NE.logsumexp(-1).square().mean()


class ExpertLinear(nn.Module):
    """One linear map without bias for every expert: weight [expert, in, out]."""

    def __init__(self, num_experts, in_features, out_features):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, in_features, out_features))

    def forward(self, x_ND, expert_N):
        """Row n through expert expert_N[n]."""
        order_N = expert_N.argsort(stable=True)
        counts = expert_N.bincount(minlength=self.weight.shape[0]).tolist()
        groups = x_ND[order_N].split(counts)
        y_NF = torch.cat([rows @ weight for rows, weight in zip(groups, self.weight)])
        return y_NF[order_N.argsort()]


class RoutedExperts(nn.Module):
    """A router `gate` with its experts' input and output projections."""

    def __init__(self, config, num_experts, top_k, hidden):
        super().__init__()
        self.top_k = top_k
        self.gate = Router(config, num_experts, top_k)
        self.experts = ExpertLinear(num_experts, config.n_embd, hidden)
        self.output_experts = ExpertLinear(num_experts, hidden, config.n_embd)

    def project_in(self, x_ND, expert_NK):
        """x_ND through each of its K experts -> [N*K, F]."""
        return self.experts(x_ND.repeat_interleave(self.top_k, dim=0), expert_NK.flatten())

    def project_out(self, h, expert_NK, gate_NK):
        """[N*K, F] through the output projections, weighted by the gates and summed over K -> y_ND."""
        y = promote(self.output_experts(h, expert_NK.flatten())).view(*gate_NK.shape, -1)
        return (y * gate_NK.unsqueeze(-1)).sum(1).to(h.dtype)


class Attention(nn.Module):
    """Mixture of attention heads: each expert owns query and output projections; keys and values are shared."""

    def __init__(self, config):
        super().__init__()
        self.num_heads = config.n_head
        self.top_k = config.k_att
        self.q_proj = RoutedExperts(config, config.n_att_experts, config.k_att, config.att_hidden)
        self.k_proj = self.v_proj = None
        if not config.shares_kv:
            self.k_proj = nn.Linear(config.n_embd, config.att_hidden)
            self.v_proj = nn.Linear(config.n_embd, config.att_hidden)

    def forward(self, x_BTD, key_mask_BS, cache):
        """x_BTD -> y_BTD and the auxiliary loss."""
        B, T, D = x_BTD.shape
        x_ND = x_BTD.reshape(B * T, D)
        expert_NK, gate_NK, loss = self.q_proj.gate(x_ND)
        q = self.q_proj.project_in(x_ND, expert_NK)
        q_BKGTC = q.view(B, T, self.top_k, self.num_heads, -1).permute(0, 2, 3, 1, 4)
        if self.k_proj is None:
            k_BGSC = v_BGSC = x_BTD.unsqueeze(1)
        else:
            k_BGSC = self.k_proj(x_BTD).view(B, T, self.num_heads, -1).transpose(1, 2)
            v_BGSC = self.v_proj(x_BTD).view(B, T, self.num_heads, -1).transpose(1, 2)
        if cache is not None:
            k_BGSC, v_BGSC = cache.append(k_BGSC, v_BGSC)
        o_BKGTC = stick_breaking_attention(q_BKGTC, k_BGSC, v_BGSC, key_mask_BS)
        o = o_BKGTC.permute(0, 3, 1, 2, 4).reshape(B * T * self.top_k, -1)
        return self.q_proj.project_out(o, expert_NK, gate_NK).view(B, T, D), loss


class Mlp(RoutedExperts):
    """Sparse feed-forward layer."""

    def __init__(self, config):
        super().__init__(config, config.n_mlp_experts, config.k_mlp, config.ffd_hidden)
        self.activation = ACTIVATIONS[config.activation_function]

    def forward(self, x_BTD):
        """x_BTD -> y_BTD and the auxiliary loss."""
        x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
        expert_NK, gate_NK, loss = self.gate(x_ND)
        h = self.activation(self.project_in(x_ND, expert_NK))
        return self.project_out(h, expert_NK, gate_NK).view_as(x_BTD), loss


class Block(nn.Module):
    """One pre-norm layer."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlpf = Mlp(config)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, h_BTD, key_mask_BS, cache):
        """h_BTD -> h_BTD and the sum of the two routers' auxiliary losses."""
        y_BTD, attention_loss = self.attn(self.ln_1(h_BTD), key_mask_BS, cache)
        h_BTD = h_BTD + self.resid_dropout(y_BTD)
        y_BTD, mlp_loss = self.mlpf(self.ln_2(h_BTD))
        return h_BTD + self.resid_dropout(y_BTD), attention_loss + mlp_loss


class LayerView:
    """One layer of a transformers cache, as the blocks use it: keys and values [B, G, S, C].

    Where K = V, values without channels are stored: the cache holds one vector a token and layer. The past carries
    no gradient.
    """

    def __init__(self, cache, layer):
        self.cache, self.layer = cache, layer

    def append(self, k_BGTC, v_BGTC):
        """Add T positions; all keys and all values."""
        shared = k_BGTC is v_BGTC
        stored = k_BGTC[..., :0] if shared else v_BGTC
        k_BGSC, v_BGSC = self.cache.update(k_BGTC.detach(), stored.detach(), self.layer)
        k_BGSC = _with_gradient(k_BGSC, k_BGTC)
        return k_BGSC, k_BGSC if shared else _with_gradient(v_BGSC, v_BGTC)


def _with_gradient(whole_BGSC, new_BGTC):
    """Put the newest positions back as they were before they were detached."""
    if not (torch.is_grad_enabled() and new_BGTC.requires_grad):
        return whole_BGSC
    past = whole_BGSC.shape[2] - new_BGTC.shape[2]
    return torch.cat([whole_BGSC[:, :, :past], new_BGTC], dim=2)


class ModuleFormerPreTrainedModel(PreTrainedModel):
    """What all heads share: initial weights, and what is ignored in released checkpoints."""

    config_class = ModuleFormerConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012
    _skip_keys_device_placement = "past_key_values"
    # Released checkpoints carry two constant masks a layer; they are made on the fly here.
    _keys_to_ignore_on_load_unexpected = [r"\.attn\.mask$", r"\.attn\.cum_weight$"]  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module):
        """Linear and embedding N(0, initializer_range), expert tensors U(-1/in, 1/in), centroids N(0, 1)."""
        super()._init_weights(module)
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.dim() == 3:
            init.uniform_(weight, -1.0 / weight.shape[1], 1.0 / weight.shape[1])
        if hasattr(module, "expert_centroids"):
            init.normal_(module.expert_centroids)
            init.zeros_(module.temperature)


class ModuleFormerModel(ModuleFormerPreTrainedModel):
    """Embedding, blocks and final norm. There is no positional encoding, and no limit of the context."""

    def __init__(self, config):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList(self.make_block(config.of_layer(i)) for i in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    def make_block(self, config):
        """One layer: (h_BTD, key_mask_BS, cache) -> (h_BTD, auxiliary loss)."""
        return Block(config)

    def get_input_embeddings(self):
        return self.wte

    def set_input_embeddings(self, value):
        self.wte = value

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        past_key_values=None,
        attention_mask=None,
        token_type_ids=None,
        position_ids=None,
        inputs_embeds=None,
        use_cache=None,
        output_hidden_states=None,
        output_attentions=None,
    ):
        """input_ids [B, T], or inputs_embeds [B, T, D] -> last_hidden_state [B, T, D] and more.

        attention_mask [B, S] over cached and new tokens: 0 for padding, on any side. token_type_ids are embedded by
        the same matrix and added. position_ids are accepted and change nothing: the model has no positions.
        output_attentions=True raises ValueError: the weights are never whole in memory.
        """
        if output_attentions:
            raise ValueError("output_attentions=True: a ModuleFormer keeps no attention weights that it could return")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        h_BTD = self.wte(input_ids) if inputs_embeds is None else inputs_embeds
        if token_type_ids is not None:
            h_BTD = h_BTD + self.wte(token_type_ids)
        recompute = self.gradient_checkpointing and self.training
        use_cache = (self.config.use_cache if use_cache is None else use_cache) and not recompute
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        cache = past_key_values if use_cache else None
        past = 0 if cache is None else cache.get_seq_length()
        key_mask_BS = _key_mask(attention_mask, h_BTD.shape[0], past + h_BTD.shape[1])
        h_BTD = self.drop(h_BTD)
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        hidden, loss = [], 0.0
        for i, block in enumerate(self.h):
            hidden.append(h_BTD)
            if recompute:
                h_BTD, layer_loss = self._gradient_checkpointing_func(block.__call__, h_BTD, key_mask_BS, None)
            else:
                h_BTD, layer_loss = block(h_BTD, key_mask_BS, None if cache is None else LayerView(cache, i))
            loss = loss + layer_loss
        h_BTD = self.ln_f(h_BTD)
        return ModuleFormerModelOutput(
            last_hidden_state=h_BTD,
            past_key_values=cache,
            hidden_states=(*hidden, h_BTD) if wanted else None,
            aux_loss=loss,
        )


def _key_mask(attention_mask, batch, keys):
    """bool [B, S], or None where nothing is masked."""
    if attention_mask is None:
        return None
    if attention_mask.dim() != 2:
        raise ValueError(
            f"attention_mask has {attention_mask.dim()} dimensions, expected [batch, keys]; caches of fixed size "
            "(cache_implementation='static') are not supported"
        )
    if tuple(attention_mask.shape) != (batch, keys):
        raise ValueError(
            f"attention_mask is {list(attention_mask.shape)}, expected [{batch}, {keys}]: cached and new tokens"
        )
    mask_BS = attention_mask.bool()
    return None if mask_BS.all() else mask_BS


class ModuleFormerForCausalLM(ModuleFormerPreTrainedModel, GenerationMixin):
    """The language model: `transformer` and an untied `lm_head`."""

    backbone_class = ModuleFormerModel

    def __init__(self, config):
        super().__init__(config)
        self.transformer = self.backbone_class(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, value):
        self.lm_head = value

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        past_key_values=None,
        attention_mask=None,
        token_type_ids=None,
        position_ids=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        output_hidden_states=None,
        output_attentions=None,
        logits_to_keep=0,
    ):
        """As `ModuleFormerModel`, and logits [B, T, V] (of the last `logits_to_keep` positions, 0 for all).

        labels [B, T] (-100: ignored) are shifted here. loss = cross entropy + aux_loss_weight * aux_loss, in
        float32 or better.
        """
        output = self.transformer(
            input_ids=input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else slice(None)
        if isinstance(logits_to_keep, torch.Tensor):
            kept = logits_to_keep
        logits = self.lm_head(output.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            target = labels[:, 1:].reshape(-1).to(logits.device)
            loss = F.cross_entropy(promote(logits[:, :-1]).flatten(0, 1), target)
            if self.config.aux_loss_weight:
                loss = loss + self.config.aux_loss_weight * output.aux_loss
        return ModuleFormerCausalLMOutput(
            loss=loss,
            aux_loss=output.aux_loss,
            logits=logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
        )


class ModuleFormerForSequenceClassification(ModuleFormerPreTrainedModel):
    """A linear head `score` on the last token that is not padding."""

    backbone_class = ModuleFormerModel

    def __init__(self, config):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.transformer = self.backbone_class(config)
        self.score = nn.Linear(config.n_embd, config.num_labels, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        past_key_values=None,
        attention_mask=None,
        token_type_ids=None,
        position_ids=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        output_hidden_states=None,
        output_attentions=None,
    ):
        """As `ModuleFormerModel`, and logits [B, labels].

        Padding is what attention_mask says, else tokens equal to config.pad_token_id. Raises ValueError for a batch
        of more than one sequence where neither is known.
        """
        output = self.transformer(
            input_ids=input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
        )
        hidden_BTD = output.last_hidden_state
        B, T, _ = hidden_BTD.shape
        if attention_mask is not None:
            real_BT = attention_mask[:, -T:].bool()
        elif input_ids is not None and self.config.pad_token_id is not None:
            real_BT = input_ids != self.config.pad_token_id
        elif B == 1:
            real_BT = torch.ones(B, T, dtype=torch.bool, device=hidden_BTD.device)
        else:
            raise ValueError("a batch of several sequences needs attention_mask, or pad_token_id in the configuration")
        last_B = (real_BT * torch.arange(T, device=real_BT.device)).argmax(-1).to(hidden_BTD.device)
        logits = self.score(hidden_BTD[torch.arange(B, device=hidden_BTD.device), last_B])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
        )


__all__ = [
    "ModuleFormerForCausalLM",
    "ModuleFormerForSequenceClassification",
    "ModuleFormerModel",
    "ModuleFormerPreTrainedModel",
]

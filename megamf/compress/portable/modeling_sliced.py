"""A decoder with a sliced residual stream: loads with `trust_remote_code=True`, trains and generates.

Between embedding and last block the residual stream has W dimensions instead of D, in a basis of its own before every
norm; a small matrix on each residual connection leads from one basis to the next. The weights of the norms are part of
the matrices behind them.

Shapes: B batch, T query time, S key time, D hidden size, W stream size, H query heads, G key/value heads, C head
channels, R rotary channels, F feed-forward width, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .configuration_sliced import SlicedConfig


def promote(x):
    """float32 for lower precisions, unchanged for float32 and float64."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def normalise(x_BTW, size, eps):
    """Divided by its root mean square over `size` dimensions, of which those that were sliced off count as zero."""
    wide = promote(x_BTW)
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) / size + eps)).to(x_BTW.dtype)


def rotate(x, cos_BTR, sin_BTR):
    """Rotary position encoding of the first R of C channels of x [B, heads, T, C]; channel i pairs with i + R/2."""
    R = cos_BTR.shape[-1]
    turned, rest = x[..., :R], x[..., R:]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos_BTR[:, None] + torch.cat((-second, first), dim=-1) * sin_BTR[:, None]
    return torch.cat((turned, rest), dim=-1)


class Attention(nn.Module):
    """Grouped-query attention from the stream's basis before it to the basis after it."""

    def __init__(self, config, layer, width_out):
        super().__init__()
        self.layer, self.channels = layer, config.head_dim
        query, key = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.stream_size, query, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.stream_size, key, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.stream_size, key, bias=config.qkv_bias)
        self.o_proj = nn.Linear(query, width_out, bias=config.attention_output_bias)

    def heads(self, x_BTW, rotary, mask_BTS, cache):
        """What the output projection is given: [B, T, H*C]."""
        B, T, _ = x_BTW.shape
        q, k, v = (
            linear(x_BTW).view(B, T, -1, self.channels).transpose(1, 2)
            for linear in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, *rotary), rotate(k, *rotary)
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        repeats = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
        if mask_BTS is None:
            o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_BTS[:, None])
        return o.transpose(1, 2).reshape(B, T, -1)

    def forward(self, x_BTW, rotary, mask_BTS, cache):
        return self.o_proj(self.heads(x_BTW, rotary, mask_BTS, cache))


class Mlp(nn.Module):
    """The feed-forward layer, gated or not."""

    def __init__(self, config, width_out):
        super().__init__()
        self.gate_proj = None
        if config.gated:
            self.gate_proj = nn.Linear(config.stream_size, config.intermediate_size, bias=config.mlp_input_bias)
        self.up_proj = nn.Linear(config.stream_size, config.intermediate_size, bias=config.mlp_input_bias)
        self.down_proj = nn.Linear(config.intermediate_size, width_out, bias=config.mlp_output_bias)
        self.act = ACT2FN[config.hidden_act]

    def hidden(self, x_BTW):
        """What the down projection is given: [B, T, F]."""
        if self.gate_proj is None:
            return self.act(self.up_proj(x_BTW))
        return self.act(self.gate_proj(x_BTW)) * self.up_proj(x_BTW)

    def forward(self, x_BTW):
        return self.down_proj(self.hidden(x_BTW))


class Block(nn.Module):
    """Attention and feed-forward layer; the last block leads back to the D dimensions of the final norm."""

    def __init__(self, config, layer):
        super().__init__()
        self.parallel, self.size, self.eps = config.parallel_residual, config.hidden_size, config.norm_eps
        W = config.stream_size
        out = config.hidden_size if layer == config.num_hidden_layers - 1 else W
        self.attention = Attention(config, layer, out if self.parallel else W)
        self.mlp = Mlp(config, out)
        if not self.parallel:
            self.attention_shortcut = nn.Linear(W, W, bias=False)
        self.mlp_shortcut = nn.Linear(W, out, bias=False)

    def forward(self, h_BTW, rotary, mask_BTS, cache):
        x_BTW = normalise(h_BTW, self.size, self.eps)
        mixed = self.attention(x_BTW, rotary, mask_BTS, cache)
        if self.parallel:
            return self.mlp_shortcut(h_BTW) + mixed + self.mlp(x_BTW)
        h_BTW = self.attention_shortcut(h_BTW) + mixed
        return self.mlp_shortcut(h_BTW) + self.mlp(normalise(h_BTW, self.size, self.eps))


class RmsNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        return self.weight * normalise(x, x.shape[-1], self.eps)


class SlicedPreTrainedModel(PreTrainedModel):
    """What the classes of this file share."""

    config_class = SlicedConfig
    base_model_prefix = "model"
    _no_split_modules = ["Block"]  # noqa: RUF012
    _supports_sdpa = True

    def _init_weights(self, module):
        if isinstance(module, nn.Linear | nn.Embedding):
            init.normal_(module.weight, std=self.config.initializer_range)
            if getattr(module, "bias", None) is not None:
                init.zeros_(module.bias)
        elif isinstance(module, RmsNorm | nn.LayerNorm):
            init.ones_(module.weight)
            if getattr(module, "bias", None) is not None:
                init.zeros_(module.bias)


class SlicedModel(SlicedPreTrainedModel):
    """Embedding, blocks and final norm."""

    def __init__(self, config):
        super().__init__(config)
        D, W = config.hidden_size, config.stream_size
        self.embed_tokens = nn.Embedding(config.vocab_size, D if config.tie_word_embeddings else W)
        self.project_in = nn.Linear(D, W, bias=False) if config.tie_word_embeddings else None
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        norm = RmsNorm if config.final_norm == "rms" else nn.LayerNorm
        self.norm = norm(D, eps=config.norm_eps)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed_tokens

    def set_input_embeddings(self, value):
        self.embed_tokens = value

    def embed(self, input_ids):
        """input_ids [B, T] -> the stream before the first block [B, T, W]."""
        x = self.embed_tokens(input_ids)
        return x if self.project_in is None else self.project_in(x)

    def rotary(self, position_BT, dtype):
        """Cosines and sines [B, T, R], computed in float32."""
        frequencies = torch.tensor(self.config.inverse_frequencies, dtype=torch.float32, device=position_BT.device)
        angle = position_BT[..., None].float() * frequencies
        angle = torch.cat((angle, angle), dim=-1)
        scaling = self.config.rotary_scaling
        return (angle.cos() * scaling).to(dtype), (angle.sin() * scaling).to(dtype)

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=None,
    ):
        """input_ids [B, T], or inputs_embeds [B, T, W] in the basis of the first block -> last_hidden_state [B, T, D].

        attention_mask [B, S] over cached and new tokens: 0 for padding, on any side. position_ids [B, T] or [1, T];
        without them positions count from 0, padding included.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        h_BTW = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        cache = past_key_values if use_cache else None
        past = 0 if cache is None else cache.get_seq_length()
        B, T, _ = h_BTW.shape
        if position_ids is None:
            position_ids = torch.arange(past, past + T, device=h_BTW.device)[None]
        rotary = self.rotary(position_ids, h_BTW.dtype)
        mask_BTS = visible_keys(attention_mask, B, T, past, h_BTW.device)
        for block in self.layers:
            h_BTW = block(h_BTW, rotary, mask_BTS, cache)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(h_BTW), past_key_values=cache)


def visible_keys(attention_mask, batch, queries, past, device):
    """bool [B, T, S]: which keys a query sees; None for all up to itself of a text without padding or cache.

    A padded query sees itself, so that no row is empty.
    """
    keys = past + queries
    if attention_mask is not None and tuple(attention_mask.shape) != (batch, keys):
        raise ValueError(
            f"attention_mask is {list(attention_mask.shape)}, expected [{batch}, {keys}]: cached and new tokens"
        )
    whole = attention_mask is None or bool(attention_mask.all())
    if whole and not past:
        return None
    query = torch.arange(past, keys, device=device)[:, None]
    key = torch.arange(keys, device=device)
    visible = (key <= query)[None].expand(batch, -1, -1)
    return visible if whole else visible & attention_mask[:, None, :].bool() | (key == query)


class SlicedForCausalLM(SlicedPreTrainedModel, GenerationMixin):
    """The language model."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config):
        super().__init__(config)
        self.model = SlicedModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.head_bias)
        self.post_init()

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, value):
        self.lm_head = value

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
    ):
        """As `SlicedModel`, and logits [B, T, V] (of the last `logits_to_keep` positions, 0 for all).

        labels [B, T] (-100: ignored) are shifted here.
        """
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
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
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=output.past_key_values)


__all__ = ["SlicedForCausalLM", "SlicedModel", "SlicedPreTrainedModel"]

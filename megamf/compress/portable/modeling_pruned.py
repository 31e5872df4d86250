"""Llama-like and GPT-NeoX models whose layers lost neurons: loads with `trust_remote_code=True`.

Shapes: B batch, T time, D width, H query heads, G key/value heads, W channels of a head as it is computed, P rotary
pairs of a head as it is computed.

`config.pruned_layers` has one entry a layer: `ffn`, the width of the feed-forward layer; `attention`, null for a layer
that was left whole, else three lists with one number for each key/value head that is left: `pairs` (rotary pairs of
queries and keys), `plain` (their channels that are not rotated) and `values`. Weights hold what is left and nothing
else; inside the attention heads are filled up with zeros to one width, so that every attention kernel takes them.
"""

import torch
from torch import nn
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward


class PrunedLlamaConfig(LlamaConfig):
    model_type = "pruned_llama"
    pruned_layers: list | None = None


class PrunedMistralConfig(MistralConfig):
    model_type = "pruned_mistral"
    pruned_layers: list | None = None


class PrunedQwen2Config(Qwen2Config):
    model_type = "pruned_qwen2"
    pruned_layers: list | None = None


class PrunedGPTNeoXConfig(GPTNeoXConfig):
    model_type = "pruned_gpt_neox"
    pruned_layers: list | None = None


class PrunedAttention(nn.Module):
    """Takes the place of an attention module, `old`, of which it keeps the numbers and not the weights."""

    def __init__(self, old, sizes):
        super().__init__()
        self.config, self.layer_idx, self.scaling = old.config, old.layer_idx, old.scaling
        self.attention_dropout, self.is_causal = old.attention_dropout, True
        fused = hasattr(old, "query_key_value")
        channels = old.head_size if fused else old.head_dim
        self.num_key_value_groups = 1 if fused else old.num_key_value_groups
        self.rotary = old.rotary_ndims if fused else channels
        window = getattr(old.config, "sliding_window", None)
        self.sliding_window = getattr(old, "sliding_window", window)
        self.sizes = {name: list(sizes[name]) for name in ("pairs", "plain", "values")}
        self.pairs_wide, self.plain_wide = max(self.sizes["pairs"]), max(self.sizes["plain"])
        self.wide = max(2 * self.pairs_wide + self.plain_wide, *self.sizes["values"])
        self._places = {}
        first, last = (old.query_key_value, old.dense) if fused else (old.q_proj, old.o_proj)
        inner = first if fused else old.v_proj
        width, repeats = first.in_features, self.num_key_value_groups
        keys = 2 * sum(self.sizes["pairs"]) + sum(self.sizes["plain"])
        values = sum(self.sizes["values"])
        self.q_proj = nn.Linear(width, keys * repeats, bias=first.bias is not None)
        self.k_proj = nn.Linear(width, keys, bias=inner.bias is not None)
        self.v_proj = nn.Linear(width, values, bias=inner.bias is not None)
        self.o_proj = nn.Linear(values * repeats, width, bias=last.bias is not None)
        # Which pair of the whole head each pair is, head after head.
        self.register_buffer("pairs", torch.zeros(sum(self.sizes["pairs"]), dtype=torch.int64))

    def places(self, kind, device):
        """Where the channels that are left stand among the heads of `wide` channels each."""
        key = kind, str(device)
        if key not in self._places:
            heads, found = 0, []
            for pairs, plain, values in zip(*self.sizes.values()):
                for _ in range(self.num_key_value_groups if kind in ("queries", "outputs") else 1):
                    start = heads * self.wide
                    if kind in ("values", "outputs"):
                        found.append(torch.arange(values) + start)
                    else:
                        rest = 2 * self.pairs_wide
                        found += [
                            torch.arange(size) + start + offset
                            for offset, size in ((0, pairs), (self.pairs_wide, pairs), (rest, plain))
                        ]
                    heads += 1
            self._places[key] = torch.cat(found).to(device)
        return self._places[key]

    def spread(self, x_BTA, kind):
        """The channels of a projection as heads [B, heads, T, W], zero where channels are gone."""
        B, T, A = x_BTA.shape
        heads = len(self.sizes["pairs"]) * (self.num_key_value_groups if kind == "queries" else 1)
        if heads * self.wide != A:
            whole = x_BTA.new_zeros(B, T, heads * self.wide)
            x_BTA = whole.index_copy(2, self.places(kind, x_BTA.device), x_BTA)
        return x_BTA.view(B, T, heads, self.wide).transpose(1, 2)

    def rotate(self, x_BHTW, cos_BGTP, sin_BGTP):
        """Rotary positions for the pairs that are left."""
        repeats = x_BHTW.shape[1] // cos_BGTP.shape[1]
        cos, sin = (part.repeat_interleave(repeats, dim=1) for part in (cos_BGTP, sin_BGTP))
        P = self.pairs_wide
        first, second = x_BHTW[..., :P], x_BHTW[..., P : 2 * P]
        return torch.cat([first * cos - second * sin, second * cos + first * sin, x_BHTW[..., 2 * P :]], dim=-1)

    def angles(self, whole_BTC):
        """cos or sin of a whole head's pairs -> those of each key/value head's own pairs, [B, G, T, P]."""
        index_GP = self.pairs.new_zeros(len(self.sizes["pairs"]), self.pairs_wide)
        for row, own in zip(index_GP, self.pairs.split(self.sizes["pairs"])):
            row[: len(own)] = own
        return whole_BTC[..., : self.rotary // 2][..., index_GP].permute(0, 2, 1, 3)

    def forward(
        self,
        hidden_states,
        position_embeddings=None,
        attention_mask=None,
        past_key_values=None,
        layer_past=None,
        **kwargs,
    ):
        """As the attention that it stands for: hidden_states [B, T, D] -> the same shape, and the weights."""
        cache = layer_past if past_key_values is None else past_key_values
        cos_BGTP, sin_BGTP = (self.angles(part) for part in position_embeddings)
        query = self.rotate(self.spread(self.q_proj(hidden_states), "queries"), cos_BGTP, sin_BGTP)
        key = self.rotate(self.spread(self.k_proj(hidden_states), "keys"), cos_BGTP, sin_BGTP)
        value = self.spread(self.v_proj(hidden_states), "values")
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output_BTHW, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        output = output_BTHW.reshape(*hidden_states.shape[:-1], -1)
        if output.shape[-1] != self.o_proj.in_features:
            output = output[..., self.places("outputs", output.device)]
        return self.o_proj(output), weights


def narrow(model):
    """Give the layers of a new model the sizes that its configuration names."""
    neox = hasattr(model, "gpt_neox")
    layers = model.gpt_neox.layers if neox else model.model.layers
    sizes = model.config.pruned_layers
    if sizes is None or len(sizes) != len(layers):
        found = "none" if sizes is None else len(sizes)
        raise ValueError(f"config.pruned_layers has {found} entries, the model has {len(layers)} layers")
    for layer, size in zip(layers, sizes):
        names = ("dense_h_to_4h",) if neox else ("gate_proj", "up_proj")
        for name in names:
            old = getattr(layer.mlp, name)
            setattr(layer.mlp, name, nn.Linear(old.in_features, size["ffn"], bias=old.bias is not None))
        name = "dense_4h_to_h" if neox else "down_proj"
        old = getattr(layer.mlp, name)
        setattr(layer.mlp, name, nn.Linear(size["ffn"], old.out_features, bias=old.bias is not None))
        if size["attention"] is not None:
            name = "attention" if neox else "self_attn"
            setattr(layer, name, PrunedAttention(getattr(layer, name), size["attention"]))


class PrunedLlamaForCausalLM(LlamaForCausalLM):
    config_class = PrunedLlamaConfig

    def __init__(self, config):
        super().__init__(config)
        narrow(self)


class PrunedMistralForCausalLM(MistralForCausalLM):
    config_class = PrunedMistralConfig

    def __init__(self, config):
        super().__init__(config)
        narrow(self)


class PrunedQwen2ForCausalLM(Qwen2ForCausalLM):
    config_class = PrunedQwen2Config

    def __init__(self, config):
        super().__init__(config)
        narrow(self)


class PrunedGPTNeoXForCausalLM(GPTNeoXForCausalLM):
    config_class = PrunedGPTNeoXConfig

    def __init__(self, config):
        super().__init__(config)
        narrow(self)

"""The GPT-NeoX block: softmax attention with rotary positions, biases everywhere, and a feed-forward layer beside it.

Shapes: B batch, T query time, S key time, D width = A attention width, F hidden width, H heads, C = A/H head channels,
P rotary channels of a head.
Source: the layout and the arithmetic of the Pythia checkpoints. A dense baseline: it has neither experts nor routers.
"""

import torch
import torch.nn.functional as F
from torch import nn

from megamf.config import ModelConfig
from megamf.model.backends import AUTOMATIC, Backends
from megamf.model.cache import LayerCache
from megamf.model.experts import ACTIVATIONS


class GptNeoxAttention(nn.Module):
    """Causal softmax attention; one projection makes query, key and value of a head, head by head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.rotary_base is not None
        self.num_heads = config.n_head
        self.rotary_channels, self.rotary_base = config.rotary_channels, config.rotary_base
        self.qkv_proj = nn.Linear(config.n_embd, 3 * config.att_hidden)
        self.o_proj = nn.Linear(config.att_hidden, config.n_embd)

    def forward(
        self,
        x_BTD: torch.Tensor,
        start_BT: torch.Tensor | None = None,
        key_mask_BS: torch.Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> torch.Tensor:
        """x_BTD -> y_BTD. start_BT, key_mask_BS: as in `stickbreaking_attention`; without a key the output is 0."""
        B, T, _ = x_BTD.shape
        qkv_BHTX = self.qkv_proj(x_BTD).view(B, T, self.num_heads, -1).transpose(1, 2)
        q_BHTC, k_BHSC, v_BHSC = qkv_BHTX.chunk(3, dim=-1)
        if cache is not None:
            # Kept as they were before they turned: where a cache forgets keys, the rest moves to other positions.
            k_BHSC, v_BHSC = cache.append(k_BHSC, v_BHSC)
        S = k_BHSC.shape[2]
        cos_SP, sin_SP = rotation(S, self.rotary_channels, self.rotary_base, x_BTD)
        q_BHTC = rotate(q_BHTC, cos_SP[S - T :], sin_SP[S - T :])
        k_BHSC = rotate(k_BHSC, cos_SP, sin_SP)
        o_BHTC = softmax_attention(q_BHTC, k_BHSC, v_BHSC, start_BT, key_mask_BS)
        return self.o_proj(o_BHTC.transpose(1, 2).flatten(2))


def softmax_attention(
    q_BHTC: torch.Tensor,
    k_BHSC: torch.Tensor,
    v_BHSC: torch.Tensor,
    start_BT: torch.Tensor | None = None,
    key_mask_BS: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal softmax attention of the last T of S positions -> o_BHTC; 0 for a query that may see no key."""
    T, S = q_BHTC.shape[2], k_BHSC.shape[2]
    if start_BT is None and key_mask_BS is None and T in (1, S):
        return F.scaled_dot_product_attention(q_BHTC, k_BHSC, v_BHSC, is_causal=T > 1)
    key_S = torch.arange(S, device=q_BHTC.device)
    visible_BTS = key_S <= key_S[S - T :, None]
    if start_BT is not None:
        visible_BTS = visible_BTS & (key_S >= start_BT.unsqueeze(-1))
    if key_mask_BS is not None:
        visible_BTS = visible_BTS & key_mask_BS.unsqueeze(-2)
    # A softmax over nothing is NaN, and its gradient too: such a query is given all keys, and its output dropped.
    blind_BT1 = ~visible_BTS.any(-1, keepdim=True)
    mask_B1TS = (visible_BTS | blind_BT1).unsqueeze(-3)
    o_BHTC = F.scaled_dot_product_attention(q_BHTC, k_BHSC, v_BHSC, attn_mask=mask_B1TS)
    return o_BHTC.masked_fill(blind_BT1.unsqueeze(-3), 0.0)


def rotation(length: int, channels: int, base: float, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines [length, channels] of the angles that positions 0, 1, ... turn by, in the dtype of `like`.

    The angles are computed in float32 whatever the dtype, as in the models this is for.
    """
    exponent_P = torch.arange(0, channels, 2, device=like.device, dtype=torch.float32) / channels
    angle_SP = torch.arange(length, device=like.device, dtype=torch.float32)[:, None] * (1.0 / base**exponent_P)
    angle_SP = torch.cat([angle_SP, angle_SP], dim=-1)
    return angle_SP.cos().to(like.dtype), angle_SP.sin().to(like.dtype)


def rotate(x_BHTC: torch.Tensor, cos_TP: torch.Tensor, sin_TP: torch.Tensor) -> torch.Tensor:
    """Turn the first P channels: channel c of the first half makes a pair with channel c of the second."""
    turned, kept = x_BHTC.split([cos_TP.shape[-1], x_BHTC.shape[-1] - cos_TP.shape[-1]], dim=-1)
    first, second = turned.chunk(2, dim=-1)
    return torch.cat([turned * cos_TP + torch.cat([-second, first], dim=-1) * sin_TP, kept], dim=-1)


class GptNeoxMlp(nn.Module):
    """W2 act(W1 x + b1) + b2."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.n_embd, config.ffd_hidden)
        self.fc2 = nn.Linear(config.ffd_hidden, config.n_embd)
        self.activation = ACTIVATIONS[config.activation_function]

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """x_BTD -> y_BTD."""
        return self.fc2(self.activation(self.fc1(x_BTD)))


class GptNeoxBlock(nn.Module):
    """h + Attn(LN1 h) + MLP(LN2 h) where the residual is parallel, else one after the other."""

    def __init__(self, config: ModelConfig, backends: Backends = AUTOMATIC) -> None:
        super().__init__()
        self.parallel_residual = config.parallel_residual
        self.ln_1 = backends.layer_norm(config.n_embd, config.layer_norm_epsilon)
        self.attn = GptNeoxAttention(config)
        self.ln_2 = backends.layer_norm(config.n_embd, config.layer_norm_epsilon)
        self.mlpf = GptNeoxMlp(config)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(
        self,
        h_BTD: torch.Tensor,
        start_BT: torch.Tensor | None = None,
        key_mask_BS: torch.Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> tuple[torch.Tensor, None, None]:
        """h_BTD -> h_BTD; the statistics of routers that other blocks return are None."""
        attended_BTD = h_BTD + self.resid_dropout(self.attn(self.ln_1(h_BTD), start_BT, key_mask_BS, cache))
        read_BTD = h_BTD if self.parallel_residual else attended_BTD
        return attended_BTD + self.resid_dropout(self.mlpf(self.ln_2(read_BTD))), None, None

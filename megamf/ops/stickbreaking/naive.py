"""Stick-breaking attention, the specification: plain torch, any dtype (float64 too), autograd by torch.

Source: ModuleFormer (arXiv 2306.04640) and its released code; the diagonal is included and what is left of the stick
is dropped.

Shapes: `B` batch, `T` query time, `S` key time (causal: S >= T, queries are the last T positions), `H` query heads, `G`
key/value heads (head h reads h % G), `C` channels of a head, `X` any leading axes.
"""

import torch
import torch.nn.functional as F


def visible(
    T: int,
    S: int,
    start_XT: torch.Tensor | None,
    key_mask_XS: torch.Tensor | None,
    device: torch.device,
    *,
    causal: bool = True,
) -> torch.Tensor:
    """Bool [..., T, S]: query t, at position S-T+t, sees key j when start <= j <= position and it is not masked.

    Without `causal` every query stands behind all keys: j <= position always holds.
    """
    key_S = torch.arange(S, device=device)
    last_T = torch.arange(S - T, S, device=device) if causal else torch.full((T,), S - 1, device=device)
    seen = key_S <= last_T[:, None]
    if start_XT is not None:
        seen = seen & (key_S >= start_XT[..., None])
    if key_mask_XS is not None:
        seen = seen & key_mask_XS[..., None, :]
    return seen


def break_stick(logits_XTS: torch.Tensor, seen_XTS: torch.Tensor) -> torch.Tensor:
    """A_j = sigmoid(l_j) * prod over seen keys m newer than j of (1 - sigmoid(l_m)); 0 for unseen keys."""
    return break_stick_and_rest(logits_XTS, seen_XTS)[0]


def break_stick_and_rest(logits_XTS: torch.Tensor, seen_XTS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights A, and log_rem_XT = sum over seen keys of log(1 - sigmoid(l)): log of what is left of the stick."""
    logits = torch.where(seen_XTS, logits_XTS, 0.0)
    log_left = torch.where(seen_XTS, F.logsigmoid(-logits), 0.0)
    newer = log_left.flip(-1).cumsum(-1).flip(-1) - log_left
    return torch.where(seen_XTS, torch.exp(F.logsigmoid(logits) + newer), 0.0), log_left.sum(-1)


def scan(logits_XTS: torch.Tensor, start_XT: torch.Tensor | None = None) -> torch.Tensor:
    """Row-wise weights of [..., T, S] logits; types below 32 bits are computed in float32."""
    T, S = logits_XTS.shape[-2:]
    wide = logits_XTS.float() if logits_XTS.dtype.itemsize < 4 else logits_XTS
    return break_stick(wide, visible(T, S, start_XT, None, logits_XTS.device)).to(logits_XTS.dtype)


def attention(
    q_BHTC: torch.Tensor,
    k_BGSC: torch.Tensor,
    v_BGSC: torch.Tensor,
    scale: float,
    start_BT: torch.Tensor | None = None,
    key_mask_BS: torch.Tensor | None = None,
    *,
    causal: bool = True,
) -> torch.Tensor:
    """o = A v. Rows that nobody sees, and queries that see nothing, are taken as zeros: their NaN stays out."""
    return attention_and_rest(q_BHTC, k_BGSC, v_BGSC, scale, start_BT, key_mask_BS, causal=causal)[0]


def attention_and_rest(
    q_BHTC: torch.Tensor,
    k_BGSC: torch.Tensor,
    v_BGSC: torch.Tensor,
    scale: float,
    start_BT: torch.Tensor | None = None,
    key_mask_BS: torch.Tensor | None = None,
    *,
    causal: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """o_BHTC and log_rem_BHT, float32 (float64 for float64): 0 for a query that sees nothing."""
    B, H, T, _ = q_BHTC.shape
    G, S = k_BGSC.shape[1:3]
    seen_BTS = visible(T, S, start_BT, key_mask_BS, q_BHTC.device, causal=causal).expand(B, T, S)
    q, k, v = (x.float() if x.dtype.itemsize < 4 else x for x in (q_BHTC, k_BGSC, v_BGSC))
    q = torch.where(seen_BTS.any(2)[:, None, :, None], q, 0.0)
    k, v = (torch.where(seen_BTS.any(1)[:, None, :, None], x, 0.0).repeat(1, H // G, 1, 1) for x in (k, v))
    weights_BHTS, log_rem_BHT = break_stick_and_rest(q @ k.transpose(-1, -2) * scale, seen_BTS[:, None])
    return (weights_BHTS @ v).to(q_BHTC.dtype), log_rem_BHT


def decode(
    q_BHC: torch.Tensor,
    k_BGSC: torch.Tensor,
    v_BGSC: torch.Tensor,
    scale: float,
    start_B: torch.Tensor | None = None,
    key_mask_BS: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of one query a sequence, at position S-1."""
    start_BT = None if start_B is None else start_B[:, None]
    return attention(q_BHC[:, :, None], k_BGSC, v_BGSC, scale, start_BT, key_mask_BS)[:, :, 0]

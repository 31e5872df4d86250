"""Stick-breaking attention (ModuleFormer, arXiv 2306.04640): the public functions.

With z = sigmoid(scale * q.k), a query walks the keys from the newest (itself) to the oldest; each key takes the share
z of what is left of a stick of length 1. What is left at the end is dropped. `naive.py` is the specification.

Shapes: `B` batch, `T` query time, `S` key time, `H` query heads, `G` key/value heads, `C` channels of a head, `X` any
leading axes.
"""

from collections.abc import Mapping
from typing import Literal, overload

import torch

from megamf.ops import backend as backends
from megamf.ops.stickbreaking import naive
from megamf.ops.stickbreaking.combine import combine

if backends.has_extension():
    from megamf.ops.stickbreaking import csrc
    from megamf.ops.stickbreaking import cuda as cuda  # registers the operations of csrc for CUDA tensors

HAS_TRITON = not backends.package_problem("triton")
if HAS_TRITON:
    from megamf.ops.stickbreaking import triton

__all__ = [
    "DEFAULT_STOP",
    "combine",
    "document_starts",
    "stickbreaking_attention",
    "stickbreaking_decode",
    "stickbreaking_scan",
]

# `csrc` and `cuda` are the same operations; torch chooses by the device of the tensors.
SCAN = {"csrc": frozenset({"cpu"}), "cuda": frozenset({"cuda"}), "naive": frozenset[str]()}
IMPLEMENTATIONS = SCAN | {"triton": backends.TRITON_DEVICES}

# A walk may stop when every stick of a block of queries is shorter than this: a sixth of the rounding error of
# float32, about 1/1000 of that of the other types.
DEFAULT_STOP = {torch.float64: 1e-19, torch.float32: 1e-8, torch.bfloat16: 1e-6, torch.float16: 1e-6}

CUDA_TYPES = (torch.float32, torch.bfloat16, torch.float16)


@overload
def stickbreaking_attention(
    q_BHTC: torch.Tensor,
    k_BGSC: torch.Tensor,
    v_BGSC: torch.Tensor,
    *,
    scale: float | None = None,
    start_BT: torch.Tensor | None = None,
    key_mask_BS: torch.Tensor | None = None,
    causal: bool = True,
    stop: float | None = None,
    return_log_rem: Literal[False] = False,
    backend: str = "auto",
) -> torch.Tensor: ...


@overload
def stickbreaking_attention(
    q_BHTC: torch.Tensor,
    k_BGSC: torch.Tensor,
    v_BGSC: torch.Tensor,
    *,
    scale: float | None = None,
    start_BT: torch.Tensor | None = None,
    key_mask_BS: torch.Tensor | None = None,
    causal: bool = True,
    stop: float | None = None,
    return_log_rem: Literal[True],
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]: ...


def stickbreaking_attention(
    q_BHTC: torch.Tensor,
    k_BGSC: torch.Tensor,
    v_BGSC: torch.Tensor,
    *,
    scale: float | None = None,
    start_BT: torch.Tensor | None = None,
    key_mask_BS: torch.Tensor | None = None,
    causal: bool = True,
    stop: float | None = None,
    return_log_rem: bool = False,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Stick-breaking attention, differentiable in q, k and v; never a T x S matrix in memory (backend csrc).

    q_BHTC, k_BGSC, v_BGSC: float32, float64 or bfloat16 (computed in float32), any C, H a multiple of G; head h reads
        key/value head h % G. Any strides; only a non-contiguous channel axis is copied. k and v may be one tensor.
    scale: factor of q.k, default C ** -0.5.
    start_BT: int32 or int64, first key position (0..S) a query may see. A start beyond the query's own position means
        that it sees nothing: output and gradients are exactly 0.
    key_mask_BS: bool, False for keys that neither receive mass nor consume stick. Keys that no query sees and queries
        that see no key may hold anything, NaN included: nothing of them enters a result.
    causal: True: S >= T, query t stands at key position S - T + t and sees the keys up to it, its own included. False:
        every query stands behind all keys and sees all of them (from its start on), S may be smaller than T: for a
        block of older keys of a sequence that is split, see `combine`.
    stop: the walk over older keys ends when every stick of a block of 64 queries is shorter than this; 0 never ends
        it. Default 1e-19, 1e-8, 1e-6 for float64, float32, bfloat16, and 0 with `return_log_rem`. The outputs change
        by at most stop * max|v|, the gradients of the skipped logits (which become 0) by at most 2 * stop * max|dO.v|.
        A log_rem whose walk ended is at most log(stop) and at least the true one. The naive backend ignores it.
    return_log_rem: also return log_rem_BHT, the natural logarithm of what is left of the stick: the sum of log(1 - z)
        over the keys that the query sees, 0 where it sees none; float32 (float64 for float64). Both outputs are
        differentiable.
    backend: "auto", "csrc" (CPU), "cuda" (float16 too, not float64; each query stops alone, in steps of 256 keys;
        holds 2**23 logits or 64 queries at a time), "triton" (GPU, float16 too, not float64, C up to 256; a block stops
        at every 256th key, its up to 128 rows being the H/G queries of up to 128 positions) or "naive". "auto" on a
        GPU is triton where it applies and is installed, else cuda.

    Returns o_BHTC, of q's dtype and memory layout, or (o_BHTC, log_rem_BHT). Same bits in every run, and for 1 to 8
    threads.
    Raises ValueError for shapes, types or a backend that do not fit.
    """
    _check_attention(q_BHTC, k_BGSC, v_BGSC, start_BT, key_mask_BS, causal)
    scale = q_BHTC.shape[-1] ** -0.5 if scale is None else float(scale)
    name = _choose("stickbreaking_attention", backend, q_BHTC)
    if name == "naive":
        o, log_rem = naive.attention_and_rest(q_BHTC, k_BGSC, v_BGSC, scale, start_BT, key_mask_BS, causal=causal)
        return (o, log_rem) if return_log_rem else o
    q, k, v = _channels_last(q_BHTC, k_BGSC, v_BGSC)
    if name == "triton":
        end = 0.0 if return_log_rem and stop is None else _stop(stop, q.dtype)
        o, log_rem = triton.attention(q, k, v, start_BT, key_mask_BS, scale, end, causal)
        return (o, log_rem) if return_log_rem else o
    if return_log_rem:
        stop = 0.0 if stop is None else _stop(stop, q.dtype)
        return csrc.attention_rest(q, k, v, start_BT, key_mask_BS, scale, stop, causal)
    return csrc.attention(q, k, v, start_BT, key_mask_BS, scale, _stop(stop, q.dtype), causal)


def stickbreaking_decode(
    q_BHC: torch.Tensor,
    k_BGSC: torch.Tensor,
    v_BGSC: torch.Tensor,
    *,
    scale: float | None = None,
    start_B: torch.Tensor | None = None,
    key_mask_BS: torch.Tensor | None = None,
    stop: float | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """One query a sequence against S cached keys (the query's own key is the last); not differentiable.

    Arguments as in `stickbreaking_attention`; start_B: first key position each query may see. Returns o_BHC.
    """
    _check_attention(q_BHC[:, :, None], k_BGSC, v_BGSC, None if start_B is None else start_B[:, None], key_mask_BS)
    scale = q_BHC.shape[-1] ** -0.5 if scale is None else float(scale)
    name = _choose("stickbreaking_decode", backend, q_BHC)
    with torch.no_grad():
        if name == "naive":
            return naive.decode(q_BHC, k_BGSC, v_BGSC, scale, start_B, key_mask_BS)
        q, k, v = _channels_last(q_BHC, k_BGSC, v_BGSC)
        if name == "triton":
            return triton.decode(q, k, v, start_B, key_mask_BS, scale, _stop(stop, q.dtype))
        return csrc.decode(q, k, v, start_B, key_mask_BS, scale, _stop(stop, q.dtype))


def stickbreaking_scan(
    logits_XTS: torch.Tensor, *, start_XT: torch.Tensor | None = None, backend: str = "auto"
) -> torch.Tensor:
    """Weights A_j = z_j * prod over newer keys of (1 - z), z = sigmoid(logits), row by row; differentiable.

    logits_XTS: [..., T, S] with S >= T, already scaled; query t sees keys start..S-T+t, the others get 0 whatever they
        hold.
    start_XT: int32 or int64 of the leading shape [..., T]. Returns the weights, same shape and dtype.
    Raises ValueError for shapes or a backend that do not fit.
    """
    if logits_XTS.dim() < 2 or logits_XTS.shape[-2] > logits_XTS.shape[-1]:
        raise ValueError(
            f"stickbreaking_scan: logits have shape {tuple(logits_XTS.shape)}, expected [..., T, S] with T <= S"
        )
    if start_XT is not None:
        _check_start(start_XT, tuple(logits_XTS.shape[:-1]))
    name = _choose("stickbreaking_scan", backend, logits_XTS, SCAN)
    return naive.scan(logits_XTS, start_XT) if name == "naive" else csrc.scan(logits_XTS, start_XT)


def document_starts(cu_seqlens: torch.Tensor, B: int, T: int) -> torch.Tensor:
    """First position of its document, within the row, of every token: int32 [B, T], `start_BT` of a call with S = T.

    cu_seqlens: integer [num_documents + 1], cumulative document lengths over the flattened B*T tokens, from 0 to B*T
    (empty documents allowed). A row boundary always starts a document. Raises ValueError for anything else.
    """
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1 or cu_seqlens.is_floating_point():
        raise ValueError(
            f"cu_seqlens is {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}, expected integers in one dimension"
        )
    cu = cu_seqlens.long()
    if int(cu[0]) != 0 or int(cu[-1]) != B * T or bool((cu[1:] < cu[:-1]).any()):
        raise ValueError(
            f"cu_seqlens runs from {int(cu[0])} to {int(cu[-1])}, expected non-decreasing from 0 to B*T = {B * T}"
        )
    token_N = torch.arange(B * T, device=cu.device)
    start_N = cu[torch.searchsorted(cu, token_N, right=True) - 1]
    row_N = token_N // max(T, 1) * T
    return (torch.maximum(start_N, row_N) - row_N).view(B, T).int()


def _choose(
    op: str, backend: str, x: torch.Tensor, implementations: Mapping[str, frozenset[str]] = IMPLEMENTATIONS
) -> str:
    """The backend by name: "auto" prefers triton on a GPU, for the heads it has kernels for; the CUDA kernels compute
    in float32.
    """
    preferred = backends.compiled(x.device)
    if preferred == "cuda" and HAS_TRITON and "triton" in implementations and triton.takes(x):
        preferred = "triton"
    name = backends.choose(op, backend, x.device, implementations, preferred)
    if name == "cuda" and x.dtype not in CUDA_TYPES:
        raise ValueError(f"{op}: backend cuda got {x.dtype}, expected one of {', '.join(map(str, CUDA_TYPES))}")
    return name


def _check_attention(
    q_BHTC: torch.Tensor,
    k_BGSC: torch.Tensor,
    v_BGSC: torch.Tensor,
    start_BT: torch.Tensor | None,
    key_mask_BS: torch.Tensor | None,
    causal: bool = True,
) -> None:
    shapes = f"q {tuple(q_BHTC.shape)}, k {tuple(k_BGSC.shape)}, v {tuple(v_BGSC.shape)}"
    if q_BHTC.dim() != 4 or k_BGSC.dim() != 4 or k_BGSC.shape != v_BGSC.shape:
        raise ValueError(f"stick-breaking attention got {shapes}, expected [B, H, T, C] and twice [B, G, S, C]")
    B, H, T, C = q_BHTC.shape
    G, S = k_BGSC.shape[1:3]
    if k_BGSC.shape[0] != B or k_BGSC.shape[3] != C or G == 0 or H % G or (causal and T > S):
        order = ", and T <= S" if causal else ""
        raise ValueError(f"stick-breaking attention got {shapes}, expected equal B and C, H a multiple of G{order}")
    types = [t for t in DEFAULT_STOP if t != torch.float16 or q_BHTC.is_cuda]
    if not q_BHTC.dtype == k_BGSC.dtype == v_BGSC.dtype or q_BHTC.dtype not in types:
        raise ValueError(
            f"stick-breaking attention got q {q_BHTC.dtype}, k {k_BGSC.dtype}, v {v_BGSC.dtype}, expected one of "
            f"{', '.join(map(str, types))} for all"
        )
    if start_BT is not None:
        _check_start(start_BT, (B, T))
    if key_mask_BS is not None and (tuple(key_mask_BS.shape) != (B, S) or key_mask_BS.dtype != torch.bool):
        raise ValueError(
            f"the key mask is {key_mask_BS.dtype} {tuple(key_mask_BS.shape)}, expected torch.bool {(B, S)}"
        )


def _check_start(start_XT: torch.Tensor, shape: tuple[int, ...]) -> None:
    if tuple(start_XT.shape) != shape or start_XT.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"start is {start_XT.dtype} {tuple(start_XT.shape)}, expected int32 or int64 {shape}")


def _stop(stop: float | None, dtype: torch.dtype) -> float:
    if stop is None:
        return DEFAULT_STOP[dtype]
    if not 0 <= stop < 1:
        raise ValueError(f"stop = {stop}, expected 0 <= stop < 1 (a length of the stick)")
    return float(stop)


def _channels_last(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(x if x.stride(-1) == 1 else x.contiguous() for x in tensors)

"""Glue around the Triton stick-breaking kernels: operators, fake (shape) kernels, and autograd.

Importing this module needs the package triton. Shapes as in naive.py; `R` = T*(H/G) rows of queries, `I` tiles of rows.
"""

from typing import Any

import torch

from megamf.kernels import stickbreaking as kernels

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

Limits = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


def visibility(T: int, S: int, start_BT: torch.Tensor | None, key_mask_BS: torch.Tensor | None, causal: bool) -> Limits:
    """What the kernels need to know, found in time linear in T + S; nothing (None) where nothing limits the view.

    start_BT int32, S for queries that see nothing; key_mask_BS uint8; live_BS bool, False for keys that no query sees.
    """
    if start_BT is None and key_mask_BS is None:
        return None, None, None
    given = key_mask_BS if start_BT is None else start_BT
    assert given is not None
    B, device = given.shape[0], given.device
    start = torch.zeros(B, T, dtype=torch.int64, device=device) if start_BT is None else start_BT.long()
    shift = S - T if causal else S
    last_T = (torch.arange(T, device=device) + shift).clamp_max(S - 1)
    seeing = start <= last_T
    if key_mask_BS is not None:
        keys_before = torch.nn.functional.pad(key_mask_BS.long().cumsum(1), (1, 0))
        seeing = seeing & (keys_before[:, last_T + 1] > keys_before.gather(1, start.clamp(0, S)))
    start = torch.where(seeing, start, S)
    # Key j is seen by one of the queries that stand at or behind it: by the one that starts first, or by none.
    live = torch.zeros(B, S, dtype=torch.bool, device=device)
    if T > 0:
        key_S = torch.arange(S, device=device)
        first_from_here = start.flip(1).cummin(1).values.flip(1)
        live = first_from_here[:, (key_S - shift).clamp(0, T - 1)] <= key_S
    if key_mask_BS is None:
        return start.int().contiguous(), None, live
    return start.int().contiguous(), key_mask_BS.to(torch.uint8).contiguous(), live & key_mask_BS


def _zero_where_not(keep_BX: torch.Tensor | None, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """[B, heads, X, C] tensors with zeros in place of what nobody looks at, which may be NaN.

    A copy, linear and short-lived, keeps the loads of the kernels free of conditions: they run ahead of the products.
    """
    if keep_BX is None:
        return list(tensors)
    return [x.masked_fill(~keep_BX[:, None, :, None], 0.0) for x in tensors]


def _queries(start_BT: torch.Tensor | None, S: int, *tensors: torch.Tensor) -> list[torch.Tensor]:
    return _zero_where_not(None if start_BT is None else start_BT < S, *tensors)


def _keys(live_BS: torch.Tensor | None, k: torch.Tensor, v: torch.Tensor) -> list[torch.Tensor]:
    if k.data_ptr() == v.data_ptr() and k.stride() == v.stride():
        return _zero_where_not(live_BS, k) * 2
    return _zero_where_not(live_BS, k, v)


@torch.library.custom_op("megamf::stickbreaking_triton", mutates_args=())
def attention_op(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    start_BT: torch.Tensor | None,
    mask_BS: torch.Tensor | None,
    live_BS: torch.Tensor | None,
    scale: float,
    stop: float,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """o_BHTC, log_rem_BHT, and for the backward pass the sticks' rest and how far each tile has walked."""
    p = kernels.problem(q, k, causal, start_BT, mask_BS)
    (q,), (k, v) = _queries(start_BT, p.S, q), _keys(live_BS, k, v)
    launch, outputs = kernels.forward_launch(p, q, k, v, start_BT, mask_BS, scale, stop)
    with torch.cuda.device_of(q):
        launch.run()
    return outputs


@attention_op.register_fake
def _attention_fake(q, k, v, start_BT, mask_BS, live_BS, scale, stop, causal):
    p = kernels.problem(q, k, causal, start_BT, mask_BS)
    return kernels.forward_launch(p, q, k, v, start_BT, mask_BS, scale, stop)[1]


@torch.library.custom_op("megamf::stickbreaking_triton_backward", mutates_args=())
def attention_backward_op(
    grad_o: torch.Tensor,
    grad_log_rem: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    start_BT: torch.Tensor | None,
    mask_BS: torch.Tensor | None,
    live_BS: torch.Tensor | None,
    stick: torch.Tensor,
    reach: torch.Tensor,
    scale: float,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk and dv."""
    p = kernels.problem(q, k, causal, start_BT, mask_BS)
    (q, grad_o), (k, v) = _queries(start_BT, p.S, q, grad_o), _keys(live_BS, k, v)
    tiles = p.rule
    row_end = kernels.row_ends(reach, tiles.forward.M, -(-p.S // tiles.keys.N), tiles.keys.N)
    launches, grads = kernels.backward_launches(
        p, grad_o, grad_log_rem, q, k, v, stick, reach, row_end, start_BT, mask_BS, scale
    )
    with torch.cuda.device_of(q):
        for launch in launches:
            launch.run()
    dq, dk, dv = grads
    return dq, dk.to(k.dtype), dv.to(v.dtype)


@attention_backward_op.register_fake
def _attention_backward_fake(grad_o, grad_log_rem, q, k, v, start_BT, mask_BS, live_BS, stick, reach, scale, causal):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


@torch.library.custom_op("megamf::stickbreaking_triton_decode", mutates_args=())
def decode_op(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    start_BT: torch.Tensor | None,
    mask_BS: torch.Tensor | None,
    live_BS: torch.Tensor | None,
    scale: float,
    stop: float,
) -> torch.Tensor:
    """o_BHC."""
    p = kernels.problem(q[:, :, None], k, True, start_BT, mask_BS)
    (q4,), (k, v) = _queries(start_BT, p.S, q[:, :, None]), _keys(live_BS, k, v)
    launches, o = kernels.decode_launches(p, q4[:, :, 0], k, v, start_BT, mask_BS, scale, stop)
    with torch.cuda.device_of(q):
        for launch in launches:
            launch.run()
    return o


@decode_op.register_fake
def _decode_fake(q, k, v, start_BT, mask_BS, live_BS, scale, stop):
    return torch.empty_like(q)


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    q, k, v, start_BT, mask_BS, live_BS, ctx.scale, _, ctx.causal = inputs
    _, _, stick, reach = output
    ctx.save_for_backward(q, k, v, start_BT, mask_BS, live_BS, stick, reach)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_o: torch.Tensor | None, grad_log_rem: torch.Tensor | None, *unused: Any) -> tuple:
    q, *saved = ctx.saved_tensors
    if grad_o is None:
        grad_o = torch.zeros_like(q)
    if grad_o.stride(-1) != 1:
        grad_o = grad_o.contiguous()
    if grad_log_rem is not None:
        grad_log_rem = grad_log_rem.contiguous()
    grads = attention_backward_op(grad_o, grad_log_rem, q, *saved, ctx.scale, ctx.causal)
    return (*grads, None, None, None, None, None, None)


attention_op.register_autograd(_backward, setup_context=_setup)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    start_BT: torch.Tensor | None,
    key_mask_BS: torch.Tensor | None,
    scale: float,
    stop: float,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """o_BHTC and log_rem_BHT. Raises ValueError for widths and types that the kernels do not have."""
    _check(q)
    limits = visibility(q.shape[2], k.shape[2], start_BT, key_mask_BS, causal)
    o, log_rem, _, _ = attention_op(q, k, v, *limits, scale, stop, causal)
    return o, log_rem


def decode(
    q_BHC: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    start_B: torch.Tensor | None,
    key_mask_BS: torch.Tensor | None,
    scale: float,
    stop: float,
) -> torch.Tensor:
    """o_BHC. Raises ValueError for widths and types that the kernels do not have."""
    _check(q_BHC)
    limits = visibility(1, k.shape[2], None if start_B is None else start_B[:, None], key_mask_BS, True)
    return decode_op(q_BHC, k, v, *limits, scale, stop)


def takes(x: torch.Tensor) -> bool:
    """Whether there are kernels for the width and the type of the queries."""
    return x.dtype in DTYPES and x.shape[-1] <= kernels.MAX_CHANNELS


def _check(q: torch.Tensor) -> None:
    if not takes(q):
        raise ValueError(
            f"stick-breaking attention got {q.dtype} and {q.shape[-1]} channels, the Triton kernels take "
            f"{', '.join(map(str, DTYPES))} up to {kernels.MAX_CHANNELS} channels"
        )

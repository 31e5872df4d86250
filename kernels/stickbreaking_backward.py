"""Stick-breaking attention, backward: two passes without locks or atomics, so the same bits in every run.

With g_j = dO.v_j and t_j = A_j g_j, dl_j = (1 - z_j) t_j - z_j * prefix_j, where the prefix is the gradient of log_rem
plus the sum of t over older keys. It runs from the oldest key up: as the difference dO.o minus the newer terms it would
cancel.

The first pass takes a tile of query rows up the keys and yields dQ. For each tile of keys it notes what the second
needs and cannot know: each row's stick on entering the tile and its prefix (`carry`, two float32 a row for N keys). The
second takes a tile of keys along the query rows and yields dK and dV, summed over the query heads that share them.

Shapes as in stickbreaking_block.py; `J` tiles of keys.
"""

import triton
import triton.language as tl

from megamf.kernels.stickbreaking_block import (
    LENGTHS,
    add_exactly,
    key_range,
    load_keys,
    load_queries,
    log2_of_one_plus,
    newer_cost,
    product,
    query_rows,
    see,
    store_queries,
    triangles,
)


@triton.jit
def _shares(x, ACCURATE: tl.constexpr):
    """z = sigmoid and -log2(1 - z) of logits in base 2."""
    u = tl.exp2(-tl.abs(x))
    large = 1.0 / (1.0 + u)
    return tl.where(x >= 0, large, u * large), tl.maximum(x, 0.0) + log2_of_one_plus(u, ACCURATE)


@triton.jit
def _grad_logits(z, t, prefix, older, WIDE: tl.constexpr):
    """dl of a tile of logits, in natural units."""
    return t - z * (product(t.to(older.dtype), older, WIDE) + (prefix[:, None] + t))


@triton.jit
def _step_up(
    n,
    grad_q,
    high,
    low,
    prefix,
    q,
    grad_o,
    newer,
    older,
    first,
    last,
    k_ptr,
    v_ptr,
    mask_ptr,
    carry_ptr,
    stride_ks,
    stride_vs,
    stride_cj,
    stride_c2,
    stored,
    S,
    scale2,
    N: tl.constexpr,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    HAS_MASK: tl.constexpr,
    MASKED: tl.constexpr,
    CHECK: tl.constexpr,
    HALF: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One tile of keys on the way up."""
    WIDE: tl.constexpr = not HALF or UPCAST
    key = n * N + tl.arange(0, N)
    k = load_keys(k_ptr, key, S, stride_ks, C, BLOCK_C, CHECK, UPCAST)
    x = see(product(q, tl.trans(k), WIDE) * scale2, key, first, last, mask_ptr, S, HAS_MASK, MASKED)
    z, cost = _shares(x, not HALF)
    high, low = add_exactly(high, low, tl.sum(cost, 1))
    stick = high + low
    at = carry_ptr + n * stride_cj
    tl.store(at, stick, mask=stored)
    tl.store(at + stride_c2, prefix, mask=stored)
    weight = z * tl.exp2(stick[:, None] - newer_cost(cost, newer, HALF))
    v = load_keys(v_ptr, key, S, stride_vs, C, BLOCK_C, CHECK, UPCAST)
    t = weight * product(grad_o, tl.trans(v), WIDE)
    grad_x = _grad_logits(z, t, prefix, older, WIDE)
    prefix += tl.sum(t, 1)
    grad_q += product(grad_x.to(k.dtype), k, WIDE)
    return grad_q, high, low, prefix


@triton.jit(do_not_specialize=LENGTHS)
def attention_backward_queries(
    grad_o_ptr,
    grad_log_rem_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    grad_q_ptr,
    stick_ptr,
    reach_ptr,
    carry_ptr,
    start_ptr,
    mask_ptr,
    stride_gb,
    stride_gh,
    stride_gt,
    stride_qb,
    stride_qh,
    stride_qt,
    stride_kb,
    stride_kg,
    stride_ks,
    stride_vb,
    stride_vg,
    stride_vs,
    stride_db,
    stride_dh,
    stride_dt,
    stride_ch,
    stride_cj,
    stride_c2,
    T,
    S,
    shift,
    G,
    K,
    tile0,
    num_reaches,
    scale,
    scale2,
    REACH: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    HAS_GRAD_LOG_REM: tl.constexpr,
    HAS_START: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HALF: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """dQ and the carry of the row tiles from tile0 on. Grid (tiles, B*G).

    stick, reach: of the forward pass, whose row tiles were REACH rows, a multiple of M. carry [2, B*G, J, rows from
    tile0 on]. grad_log_rem [B, H, T], contiguous.
    """
    local = tl.num_programs(0) - 1 - tl.program_id(0)
    tile = tile0 + local
    line = tl.program_id(1)
    b, g = line // G, line % G
    batch, group = b.to(tl.int64), g.to(tl.int64)
    k_ptr += batch * stride_kb + group * stride_kg
    v_ptr += batch * stride_vb + group * stride_vg
    mask_ptr += batch * S
    carry_ptr += line.to(tl.int64) * stride_ch + local * M + tl.arange(0, M)

    row, t, seeing, first, last = query_rows(tile, start_ptr, b, T, S, shift, K, HAS_START, M)
    bottom, edge, end = key_range(seeing, first, last, S, N)
    reach = tl.load(reach_ptr + line.to(tl.int64) * num_reaches + tile * M // REACH)
    bottom = tl.maximum(bottom, reach // N)
    edge = tl.maximum(edge, bottom)
    q = load_queries(q_ptr + batch * stride_qb, row, t, g, T, stride_qh, stride_qt, G, K, C, BLOCK_C, UPCAST)
    grad_o_ptr += batch * stride_gb
    grad_o = load_queries(grad_o_ptr, row, t, g, T, stride_gh, stride_gt, G, K, C, BLOCK_C, UPCAST)
    newer, older = triangles(N, HALF, not HALF or UPCAST)
    last = tl.where(seeing, last, -1)
    stored = row < T * K
    at = stick_ptr + line.to(tl.int64) * T * K + row
    # Rows behind the last query have no stick.
    high = tl.load(at, mask=stored, other=-1e30)
    low = tl.load(at + tl.num_programs(1).to(tl.int64) * T * K, mask=stored, other=0.0)
    prefix = tl.zeros([M], tl.float32)
    if HAS_GRAD_LOG_REM:
        head = (batch * K + row % K) * G + g
        prefix = tl.load(grad_log_rem_ptr + head * T + t, mask=seeing, other=0.0)
    grad_q = tl.zeros([M, BLOCK_C], tl.float32)

    for n in range(bottom, edge):
        grad_q, high, low, prefix = _step_up(
            n, grad_q, high, low, prefix, q, grad_o, newer, older, first, last, k_ptr, v_ptr, mask_ptr, carry_ptr,
            stride_ks, stride_vs, stride_cj, stride_c2, stored, S, scale2, N, C, BLOCK_C, HAS_MASK,
            HAS_START, False, HALF, UPCAST,
        )  # fmt: skip
    for n in tl.range(edge, end, num_stages=1):
        grad_q, high, low, prefix = _step_up(
            n, grad_q, high, low, prefix, q, grad_o, newer, older, first, last, k_ptr, v_ptr, mask_ptr, carry_ptr,
            stride_ks, stride_vs, stride_cj, stride_c2, stored, S, scale2, N, C, BLOCK_C, HAS_MASK, True, True,
            HALF, UPCAST,
        )  # fmt: skip

    grad_q_ptr += batch * stride_db
    store_queries(grad_q_ptr, grad_q * scale, row, t, g, stored, stride_dh, stride_dt, G, K, C, BLOCK_C)


@triton.jit
def _step_along(
    tile,
    grad_k,
    grad_v,
    k,
    v,
    newer,
    older,
    key,
    n,
    b,
    g,
    grad_o_ptr,
    q_ptr,
    reach_ptr,
    carry_ptr,
    start_ptr,
    mask_ptr,
    stride_gh,
    stride_gt,
    stride_qh,
    stride_qt,
    stride_c2,
    tile0,
    T,
    S,
    shift,
    G,
    K,
    scale2,
    REACH: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    HAS_START: tl.constexpr,
    HAS_MASK: tl.constexpr,
    MASKED: tl.constexpr,
    HALF: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """What one tile of query rows adds to dK and dV."""
    WIDE: tl.constexpr = not HALF or UPCAST
    row, t, seeing, first, last = query_rows(tile, start_ptr, b, T, S, shift, K, HAS_START, M)
    q = load_queries(q_ptr, row, t, g, T, stride_qh, stride_qt, G, K, C, BLOCK_C, UPCAST)
    x = see(product(q, tl.trans(k), WIDE) * scale2, key, first, last, mask_ptr, S, HAS_MASK, MASKED)
    z, cost = _shares(x, not HALF)
    # Tiles of rows that ended their walk before these keys noted nothing.
    noted = seeing & (tl.load(reach_ptr + tile * M // REACH) <= n * N)
    at = carry_ptr + (tile - tile0) * M + tl.arange(0, M)
    stick = tl.load(at, mask=noted, other=float("-inf"))
    prefix = tl.load(at + stride_c2, mask=noted, other=0.0)
    weight = z * tl.exp2(stick[:, None] - newer_cost(cost, newer, HALF))
    grad_o = load_queries(grad_o_ptr, row, t, g, T, stride_gh, stride_gt, G, K, C, BLOCK_C, UPCAST)
    grad_v += product(tl.trans(weight.to(grad_o.dtype)), grad_o, WIDE)
    t = weight * product(grad_o, tl.trans(v), WIDE)
    grad_x = _grad_logits(z, t, prefix, older, WIDE)
    grad_k += product(tl.trans(grad_x.to(q.dtype)), q, WIDE)
    return grad_k, grad_v


@triton.jit(do_not_specialize=LENGTHS)
def attention_backward_keys(
    grad_o_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    grad_k_ptr,
    grad_v_ptr,
    reach_ptr,
    carry_ptr,
    start_ptr,
    mask_ptr,
    row_end_ptr,
    stride_gb,
    stride_gh,
    stride_gt,
    stride_qb,
    stride_qh,
    stride_qt,
    stride_kb,
    stride_kg,
    stride_ks,
    stride_vb,
    stride_vg,
    stride_vs,
    stride_dkb,
    stride_dkg,
    stride_dks,
    stride_dvb,
    stride_dvg,
    stride_dvs,
    stride_ch,
    stride_cj,
    stride_c2,
    T,
    S,
    shift,
    G,
    K,
    tile0,
    tile1,
    num_reaches,
    scale,
    scale2,
    REACH: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    HAS_START: tl.constexpr,
    HAS_MASK: tl.constexpr,
    ADD: tl.constexpr,
    HALF: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """dK and dV from the row tiles tile0 .. tile1, added to what is there when ADD. Grid (J, B*G).

    row_end [B*G, J]: no row from there on has walked as far as the tile of keys.
    """
    n, line = tl.program_id(0), tl.program_id(1)
    b, g = line // G, line % G
    batch, group = b.to(tl.int64), g.to(tl.int64)
    key = n * N + tl.arange(0, N)
    mask_ptr += batch * S
    k = load_keys(k_ptr + batch * stride_kb + group * stride_kg, key, S, stride_ks, C, BLOCK_C, True, UPCAST)
    v = load_keys(v_ptr + batch * stride_vb + group * stride_vg, key, S, stride_vs, C, BLOCK_C, True, UPCAST)
    q_ptr += batch * stride_qb
    grad_o_ptr += batch * stride_gb
    reach_ptr += line.to(tl.int64) * num_reaches
    carry_ptr += line.to(tl.int64) * stride_ch + n * stride_cj
    newer, older = triangles(N, HALF, not HALF or UPCAST)
    grad_k = tl.zeros([N, BLOCK_C], tl.float32)
    grad_v = tl.zeros([N, BLOCK_C], tl.float32)

    # Rows below `open` are older than all these keys, rows from `full` on are newer than all of them.
    end = tl.minimum(tile1, (tl.load(row_end_ptr + line.to(tl.int64) * tl.num_programs(0) + n) + M - 1) // M)
    begin = tl.minimum(tl.maximum(tile0, tl.maximum(n * N - shift, 0) * K // M), end)
    full = tl.where((n + 1) * N <= S, (tl.maximum((n + 1) * N - 1 - shift, 0) * K + M - 1) // M, end)
    full = tl.minimum(tl.maximum(full, begin), end)
    for tile in tl.range(begin, full, num_stages=1):
        grad_k, grad_v = _step_along(
            tile, grad_k, grad_v, k, v, newer, older, key, n, b, g, grad_o_ptr, q_ptr, reach_ptr, carry_ptr,
            start_ptr, mask_ptr, stride_gh, stride_gt, stride_qh, stride_qt, stride_c2, tile0, T, S, shift, G, K,
            scale2, REACH, M, N, C, BLOCK_C, HAS_START, HAS_MASK, True, HALF, UPCAST,
        )  # fmt: skip
    for tile in range(full, end):
        grad_k, grad_v = _step_along(
            tile, grad_k, grad_v, k, v, newer, older, key, n, b, g, grad_o_ptr, q_ptr, reach_ptr, carry_ptr,
            start_ptr, mask_ptr, stride_gh, stride_gt, stride_qh, stride_qt, stride_c2, tile0, T, S, shift, G, K,
            scale2, REACH, M, N, C, BLOCK_C, HAS_START, HAS_MASK, HAS_START, HALF, UPCAST,
        )  # fmt: skip

    c = tl.arange(0, BLOCK_C)
    mask = (key < S)[:, None] & (c < C)[None, :]
    at_k = grad_k_ptr + batch * stride_dkb + group * stride_dkg + (key.to(tl.int64) * stride_dks)[:, None] + c[None, :]
    at_v = grad_v_ptr + batch * stride_dvb + group * stride_dvg + (key.to(tl.int64) * stride_dvs)[:, None] + c[None, :]
    grad_k *= scale
    if ADD:
        grad_k += tl.load(at_k, mask=mask, other=0.0).to(tl.float32)
        grad_v += tl.load(at_v, mask=mask, other=0.0).to(tl.float32)
    tl.store(at_k, grad_k.to(grad_k_ptr.dtype.element_ty), mask=mask)
    tl.store(at_v, grad_v.to(grad_v_ptr.dtype.element_ty), mask=mask)

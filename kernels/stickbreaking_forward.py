"""Stick-breaking attention, forward: a tile of query rows walks tiles of keys from the newest to the oldest.

Shapes as in stickbreaking_block.py; `I` tiles of rows.
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
def step(
    n,
    acc,
    high,
    low,
    q,
    newer,
    first,
    last,
    k_ptr,
    v_ptr,
    mask_ptr,
    stride_ks,
    stride_vs,
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
    """One tile of keys: what it adds to the output, and what it leaves of the sticks."""
    key = n * N + tl.arange(0, N)
    k = load_keys(k_ptr, key, S, stride_ks, C, BLOCK_C, CHECK, UPCAST)
    x = product(q, tl.trans(k), not HALF or UPCAST) * scale2
    x = see(x, key, first, last, mask_ptr, S, HAS_MASK, MASKED)
    rest = log2_of_one_plus(tl.exp2(-tl.abs(x)), not HALF)
    cost = tl.maximum(x, 0.0) + rest
    weight = tl.exp2((tl.minimum(x, 0.0) - rest) + ((high + low)[:, None] - newer_cost(cost, newer, HALF)))
    v = load_keys(v_ptr, key, S, stride_vs, C, BLOCK_C, CHECK, UPCAST)
    acc += product(weight.to(v.dtype), v, not HALF or UPCAST)
    high, low = add_exactly(high, low, -tl.sum(cost, 1))
    return acc, high, low


@triton.jit(do_not_specialize=LENGTHS)
def attention_forward(
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    log_rem_ptr,
    stick_ptr,
    reach_ptr,
    start_ptr,
    mask_ptr,
    stride_qb,
    stride_qh,
    stride_qt,
    stride_kb,
    stride_kg,
    stride_ks,
    stride_vb,
    stride_vg,
    stride_vs,
    stride_ob,
    stride_oh,
    stride_ot,
    T,
    S,
    shift,
    G,
    K,
    scale2,
    log2_stop,
    M: tl.constexpr,
    N: tl.constexpr,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_START: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HALF: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Grid (I, B*G). Query t stands at key position min(t + shift, S - 1).

    log_rem_BHT: natural log of the sticks' rest. For the backward pass: stick [2, B*G, R], log2 of the rest as a sum of
    two, and reach [B*G, I], the oldest key that the tile has walked (2^30: none).

    Every CHUNK tiles of keys the walk ends if all sticks are below 2^log2_stop; inside a chunk the loop has a fixed
    length, so that loads run ahead of the products.
    """
    # Late rows see more keys: they start first.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    b, g = tl.program_id(1) // G, tl.program_id(1) % G
    batch, group = b.to(tl.int64), g.to(tl.int64)
    k_ptr += batch * stride_kb + group * stride_kg
    v_ptr += batch * stride_vb + group * stride_vg
    mask_ptr += batch * S

    row, t, seeing, first, last = query_rows(tile, start_ptr, b, T, S, shift, K, HAS_START, M)
    bottom, edge, end = key_range(seeing, first, last, S, N)
    q = load_queries(q_ptr + batch * stride_qb, row, t, g, T, stride_qh, stride_qt, G, K, C, BLOCK_C, UPCAST)
    newer, _ = triangles(N, HALF, not HALF or UPCAST)
    last = tl.where(seeing, last, -1)
    acc = tl.zeros([M, BLOCK_C], tl.float32)
    high, low = tl.zeros([M], tl.float32), tl.zeros([M], tl.float32)

    for n in tl.range(end - 1, edge - 1, -1, num_stages=1):
        acc, high, low = step(
            n, acc, high, low, q, newer, first, last, k_ptr, v_ptr, mask_ptr, stride_ks, stride_vs, S, scale2,
            N, C, BLOCK_C, HAS_MASK, True, True, HALF, UPCAST,
        )  # fmt: skip
    n = edge
    # A NaN is never below the stop.
    walking = tl.sum(tl.where(seeing & ((high < log2_stop) == 0), 1, 0), 0)
    while (n > bottom) & (walking > 0):
        steps = tl.minimum(n - bottom, CHUNK)
        for i in range(0, steps):
            acc, high, low = step(
                n - 1 - i, acc, high, low, q, newer, first, last, k_ptr, v_ptr, mask_ptr, stride_ks, stride_vs, S,
                scale2, N, C, BLOCK_C, HAS_MASK, HAS_START, False, HALF, UPCAST,
            )  # fmt: skip
        n -= steps
        walking = tl.sum(tl.where(seeing & ((high < log2_stop) == 0), 1, 0), 0)

    stored = row < T * K
    o_ptr += batch * stride_ob
    store_queries(o_ptr, acc, row, t, g, stored, stride_oh, stride_ot, G, K, C, BLOCK_C)
    head = (batch * K + row % K) * G + g
    tl.store(log_rem_ptr + head * T + t, (high + low) * 0.6931471805599453, mask=stored)
    line = (batch * G + g) * T * K + row
    tl.store(stick_ptr + line, high, mask=stored)
    tl.store(stick_ptr + line + tl.num_programs(1).to(tl.int64) * T * K, low, mask=stored)
    tl.store(reach_ptr + (batch * G + g) * tl.num_programs(0) + tile, tl.where(n < end, n * N, 1 << 30))

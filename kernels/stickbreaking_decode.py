"""Stick-breaking attention of one query a sequence: the keys are cut into splits, whose results are then combined.

Shapes as in stickbreaking_block.py, with T = 1; `P` splits.
"""

import triton
import triton.language as tl

from megamf.kernels.stickbreaking_block import LENGTHS, key_range, load_queries, query_rows, triangles
from megamf.kernels.stickbreaking_forward import step


@triton.jit(do_not_specialize=LENGTHS)
def decode_split(
    q_ptr,
    k_ptr,
    v_ptr,
    part_ptr,
    rest_ptr,
    start_ptr,
    mask_ptr,
    stride_qb,
    stride_qh,
    stride_kb,
    stride_kg,
    stride_ks,
    stride_vb,
    stride_vg,
    stride_vs,
    S,
    G,
    K,
    tiles_per_split,
    scale2,
    log2_stop,
    M: tl.constexpr,
    N: tl.constexpr,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    HAS_START: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HALF: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Grid (P, B*G): the K queries that share the head, on a whole stick, against the keys of one split.

    part [B*G, P, K, C] float32: the output; rest [B*G, P, K]: log2 of what the split leaves of a stick.
    """
    split, line = tl.program_id(0), tl.program_id(1)
    b, g = line // G, line % G
    batch, group = b.to(tl.int64), g.to(tl.int64)
    k_ptr += batch * stride_kb + group * stride_kg
    v_ptr += batch * stride_vb + group * stride_vg
    mask_ptr += batch * S
    row, t, seeing, first, last = query_rows(0, start_ptr, b, 1, S, S - 1, K, HAS_START, M)
    bottom, _, end = key_range(seeing, first, last, S, N)
    bottom = tl.maximum(bottom, split * tiles_per_split)
    n = tl.minimum(end, (split + 1) * tiles_per_split)
    q = load_queries(q_ptr + batch * stride_qb, row, t, g, 1, stride_qh, 0, G, K, C, BLOCK_C, UPCAST)
    newer, _ = triangles(N, HALF, not HALF or UPCAST)
    last = tl.where(seeing, last, -1)
    acc = tl.zeros([M, BLOCK_C], tl.float32)
    high, low = tl.zeros([M], tl.float32), tl.zeros([M], tl.float32)
    walking = tl.sum(tl.where(seeing, 1, 0), 0)
    while (n > bottom) & (walking > 0):
        n -= 1
        acc, high, low = step(
            n, acc, high, low, q, newer, first, last, k_ptr, v_ptr, mask_ptr, stride_ks, stride_vs, S, scale2,
            N, C, BLOCK_C, HAS_MASK, True, True, HALF, UPCAST,
        )  # fmt: skip
        walking = tl.sum(tl.where(seeing & ((high < log2_stop) == 0), 1, 0), 0)

    c = tl.arange(0, BLOCK_C)
    at = (line.to(tl.int64) * tl.num_programs(0) + split) * K + row
    tl.store(part_ptr + at[:, None] * C + c[None, :], acc, mask=(row < K)[:, None] & (c < C)[None, :])
    tl.store(rest_ptr + at, high + low, mask=row < K)


@triton.jit(do_not_specialize=["P"])
def decode_combine(part_ptr, rest_ptr, o_ptr, stride_ob, stride_oh, P, G, K, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """Grid (K, B*G): the splits from the newest to the oldest, each on what the newer ones left of the stick."""
    k, line = tl.program_id(0), tl.program_id(1).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    acc, stick = tl.zeros([BLOCK_C], tl.float32), 0.0
    for i in range(0, P):
        at = (line * P + P - 1 - i) * K + k
        acc += tl.exp2(stick) * tl.load(part_ptr + at * C + c, mask=c < C, other=0.0)
        stick += tl.load(rest_ptr + at)
    offset = (line // G) * stride_ob + (k * G + line % G) * stride_oh
    tl.store(o_ptr + offset + c, acc.to(o_ptr.dtype.element_ty), mask=c < C)

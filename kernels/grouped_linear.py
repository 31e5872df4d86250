"""Ragged rows times expert weights: gather in the prologue, scatter and gates in the epilogue, no host synchronisation.

Shapes: `R` rows in expert order, `L` local experts, `D` input width, `F` output width, `N` tokens, `K` top-k.

Rows are numbered in expert order; row r belongs to the copy order_R[r] = n*K+k. Each side of a product names its layout
by its `fan`: 0, the tensor has one line a row, in expert order; 1, one line a copy; K, one line a token, so that the
line of row r is order_R[r] // fan. Counts stay on the device: the grid is the largest that any counts could need, each
program finds its expert by a sum over the counts, and the few programs that are left over return at once.
Sources of the technique: ScatterMoE (gather and scatter by flags of one kernel), SonicMoE (gate gradient from dX).
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from megamf.kernels.launch import launch

# Row tiles that share a column of tiles before the next column begins: they find the weights in the L2 cache.
GROUP = 8


@triton.jit
def _span_of_expert(count_ptr, expert, L: tl.constexpr, BLOCK_L: tl.constexpr):
    """First row of the expert and the row after its last."""
    lane = tl.arange(0, BLOCK_L)
    count = tl.load(count_ptr + lane, mask=lane < L, other=0)
    begin = tl.sum(tl.where(lane < expert, count, 0))
    return begin, begin + tl.sum(tl.where(lane == expert, count, 0))


@triton.jit
def _line(row, order_ptr, FAN: tl.constexpr):
    """Where row r lies in a tensor of this fan."""
    if FAN == 0:
        return row
    return tl.load(order_ptr + row) // FAN


@triton.jit(do_not_specialize=["num_row_tiles"])
def _rows_kernel(
    x_ptr,
    w_ptr,
    y_ptr,
    order_ptr,
    count_ptr,
    gate_ptr,
    match_ptr,
    dot_ptr,
    num_row_tiles,
    stride_wl,
    stride_wd,
    stride_wf,
    L: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    IN_FAN: tl.constexpr,
    OUT_FAN: tl.constexpr,
    MATCH_FAN: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_MATCH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_L: tl.constexpr,
    GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """y[out line of r] = gate[copy of r] * (x[in line of r] @ w[expert of r]) for one tile of rows and columns.

    With HAS_MATCH, dot[copy of r, this column tile] = the part of <x @ w, match[match line of r]> in these columns,
    before the gate: the gate's gradient, when this kernel computes dX.
    """
    num_col_tiles: tl.constexpr = (F + BLOCK_N - 1) // BLOCK_N
    pid = tl.program_id(0)
    group = pid // (GROUP_M * num_col_tiles)
    rows_in_group = tl.minimum(num_row_tiles - group * GROUP_M, GROUP_M)
    within = pid % (GROUP_M * num_col_tiles)
    row_tile = group * GROUP_M + within % rows_in_group
    col_tile = within // rows_in_group

    lane = tl.arange(0, BLOCK_L)
    count = tl.load(count_ptr + lane, mask=lane < L, other=0)
    tiles = (count + BLOCK_M - 1) // BLOCK_M
    tile_ends = tl.cumsum(tiles, 0)
    expert = tl.sum((tile_ends <= row_tile).to(tl.int32))
    if expert >= L:
        return
    first_tile = tl.sum(tl.where(lane == expert, tile_ends - tiles, 0))
    begin, end = _span_of_expert(count_ptr, expert, L, BLOCK_L)
    row = begin + (row_tile - first_tile) * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
    live = row < end
    # Rows past the end repeat the last one: rows do not mix, and nothing is stored for them.
    row = tl.minimum(row, end - 1)
    col = col_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    col_ok = col < F
    inner = tl.arange(0, BLOCK_K)

    x_ptrs = x_ptr + (_line(row, order_ptr, IN_FAN) * D)[:, None] + inner[None, :]
    w_ptrs = w_ptr + expert.to(tl.int64) * stride_wl + inner[:, None] * stride_wd + col[None, :] * stride_wf
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, D, BLOCK_K):
        if D % BLOCK_K == 0:
            x = tl.load(x_ptrs)
            w = tl.load(w_ptrs, mask=col_ok[None, :], other=0.0)
        else:
            inner_ok = inner < D - k
            x = tl.load(x_ptrs, mask=inner_ok[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=inner_ok[:, None] & col_ok[None, :], other=0.0)
        if UPCAST:
            x, w = x.to(tl.float32), w.to(tl.float32)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K * stride_wd

    if HAS_GATE or HAS_MATCH:
        copy = tl.load(order_ptr + row)
    if HAS_MATCH:
        match_ptrs = match_ptr + (_line(row, order_ptr, MATCH_FAN) * F)[:, None] + col[None, :]
        match = tl.load(match_ptrs, mask=col_ok[None, :], other=0.0).to(tl.float32)
        tl.store(dot_ptr + copy * num_col_tiles + col_tile, tl.sum(acc * match, 1), mask=live)
    if HAS_GATE:
        acc *= tl.load(gate_ptr + copy).to(tl.float32)[:, None]
    y_ptrs = y_ptr + (_line(row, order_ptr, OUT_FAN) * F)[:, None] + col[None, :]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=live[:, None] & col_ok[None, :])


@triton.jit
def _weights_kernel(
    x_ptr,
    g_ptr,
    dw_ptr,
    order_ptr,
    count_ptr,
    gate_ptr,
    L: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    X_FAN: tl.constexpr,
    G_FAN: tl.constexpr,
    HAS_GATE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_L: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """dw[e] = sum over the rows r of expert e of x[x line of r]^T (gate[copy of r] * g[g line of r]), one tile of it.

    One program walks all rows of its expert in order: deterministic. An expert without rows gets zeros.
    """
    num_col_tiles: tl.constexpr = (F + BLOCK_F - 1) // BLOCK_F
    expert = tl.program_id(1)
    d = (tl.program_id(0) // num_col_tiles) * BLOCK_D + tl.arange(0, BLOCK_D)
    f = (tl.program_id(0) % num_col_tiles) * BLOCK_F + tl.arange(0, BLOCK_F)
    d_ok, f_ok = d < D, f < F
    begin, end = _span_of_expert(count_ptr, expert, L, BLOCK_L)

    acc = tl.zeros((BLOCK_D, BLOCK_F), dtype=tl.float32)
    for first in range(begin, end, BLOCK_R):
        row = first + tl.arange(0, BLOCK_R)
        live = row < end
        row = tl.minimum(row, end - 1)
        x_ptrs = x_ptr + (_line(row, order_ptr, X_FAN) * D)[None, :] + d[:, None]
        g_ptrs = g_ptr + (_line(row, order_ptr, G_FAN) * F)[:, None] + f[None, :]
        x = tl.load(x_ptrs, mask=live[None, :] & d_ok[:, None], other=0.0)
        g = tl.load(g_ptrs, mask=live[:, None] & f_ok[None, :], other=0.0)
        if HAS_GATE:
            gate = tl.load(gate_ptr + tl.load(order_ptr + row)).to(tl.float32)
            g = (g.to(tl.float32) * gate[:, None]).to(g_ptr.dtype.element_ty)
        if UPCAST:
            x, g = x.to(tl.float32), g.to(tl.float32)
        acc = tl.dot(x, g, acc, input_precision=PRECISION)
    dw_ptrs = dw_ptr + expert.to(tl.int64) * D * F + d[:, None] * F + f[None, :]
    tl.store(dw_ptrs, acc.to(dw_ptr.dtype.element_ty), mask=d_ok[:, None] & f_ok[None, :])


@dataclass(frozen=True)
class Tiling:
    """Tile of the result (M x N), step along the summed axis (K), and the launch options."""

    m: int
    n: int
    k: int
    num_warps: int
    num_stages: int


def rows_tiling(dtype: torch.dtype, num_rows: int, num_experts: int, columns: int) -> Tiling:
    """Tiles about as high as an expert has rows on average, which the host knows without asking the device."""
    n = min(128, max(16, triton.next_power_of_2(columns)))
    m = min(128, max(16, triton.next_power_of_2(num_rows // max(num_experts, 1))))
    if dtype == torch.float32:
        return Tiling(min(m, 64), min(n, 64), 32, 4, 3)
    return Tiling(m, n, 64, 8 if m * n >= 128 * 128 else 4, 3)


def weights_tiling(dtype: torch.dtype, inner: int, columns: int) -> Tiling:
    """Tile of one expert's gradient [inner, columns]; k rows are summed a step."""
    m, n = (min(128, max(16, triton.next_power_of_2(width))) for width in (inner, columns))
    if dtype == torch.float32:
        return Tiling(min(m, 64), min(n, 64), 32, 4, 3)
    return Tiling(m, n, 64, 8 if m * n >= 128 * 128 else 4, 3)


def rows_times_experts(
    x: torch.Tensor,
    w_LDF: torch.Tensor,
    count_L: torch.Tensor,
    *,
    order_R: torch.Tensor | None = None,
    gate_R: torch.Tensor | None = None,
    match: torch.Tensor | None = None,
    num_rows: int,
    in_fan: int = 0,
    out_fan: int = 0,
    match_fan: int = 0,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(y [num_rows, F] in expert order (out_fan 0) or copy order (1), dots [num_rows] float32 by copy, or None).

    x, match: contiguous lines in the layout of their fan. w_LDF: any strides, so its transpose costs nothing.
    gate_R: one value a copy. dots: <x @ w, match> before the gate, where `match` is given.
    """
    L, D, F = w_LDF.shape
    y = x.new_empty(num_rows, F)
    tiling = rows_tiling(x.dtype, num_rows, L, F)
    col_tiles = triton.cdiv(F, tiling.n)
    partial = None if match is None else x.new_empty(num_rows, col_tiles, dtype=torch.float32)
    if num_rows:
        # Every expert with rows has at most one tile that is not full.
        row_tiles = num_rows // tiling.m + min(L, num_rows)
        launch(
            _rows_kernel, (row_tiles * col_tiles,),
            x, w_LDF, y, order_R, count_L, gate_R, match, partial, row_tiles, *w_LDF.stride(),
            L=L, D=D, F=F, IN_FAN=in_fan, OUT_FAN=out_fan, MATCH_FAN=match_fan,
            HAS_GATE=gate_R is not None, HAS_MATCH=match is not None,
            BLOCK_M=tiling.m, BLOCK_N=tiling.n, BLOCK_K=tiling.k, BLOCK_L=triton.next_power_of_2(L), GROUP_M=GROUP,
            PRECISION=precision(x.dtype), UPCAST=triton.knobs.runtime.interpret,
            options={"num_warps": tiling.num_warps, "num_stages": tiling.num_stages},
        )  # fmt: skip
    return y, None if partial is None else partial.sum(1)


def rows_to_weights(
    x: torch.Tensor,
    g: torch.Tensor,
    count_L: torch.Tensor,
    *,
    order_R: torch.Tensor | None = None,
    gate_R: torch.Tensor | None = None,
    x_fan: int = 0,
    g_fan: int = 0,
) -> torch.Tensor:
    """dw_LDF of x's dtype: for each expert the sum over its rows of x^T (gate * g); x and g contiguous lines."""
    L, D, F = count_L.shape[0], x.shape[1], g.shape[1]
    dw = x.new_empty(L, D, F)
    tiling = weights_tiling(x.dtype, D, F)
    if dw.numel():
        launch(
            _weights_kernel, (triton.cdiv(D, tiling.m) * triton.cdiv(F, tiling.n), L),
            x, g, dw, order_R, count_L, gate_R,
            L=L, D=D, F=F, X_FAN=x_fan, G_FAN=g_fan, HAS_GATE=gate_R is not None,
            BLOCK_R=tiling.k, BLOCK_D=tiling.m, BLOCK_F=tiling.n, BLOCK_L=triton.next_power_of_2(L),
            PRECISION=precision(x.dtype), UPCAST=triton.knobs.runtime.interpret,
            options={"num_warps": tiling.num_warps, "num_stages": tiling.num_stages},
        )  # fmt: skip
    return dw


def precision(dtype: torch.dtype) -> str:
    """How float32 operands are multiplied: as torch multiplies matrices (`torch.set_float32_matmul_precision`)."""
    return "tf32" if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest" else "ieee"

"""Launches of the stick-breaking attention kernels: tile sizes by rule, buffers, and the order of the passes.

A launch can be built without a GPU (from tensors of the meta device) and compiled for one.

Queries that share a key/value head are rows of the same tile (row r is time r // K, sharer r % K): each tile of keys
and values is loaded once for all of them, dK and dV need no sum over heads, and a tile of M rows spans only M / K
positions, so that the diagonal and the end of the walk are finer. In the model's layout [B, T, K, G, C] the rows are
also equally spaced in memory.

Shapes as in stickbreaking_block.py.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton

from megamf.kernels.launch import Launch
from megamf.kernels.stickbreaking_backward import attention_backward_keys, attention_backward_queries
from megamf.kernels.stickbreaking_decode import decode_combine, decode_split
from megamf.kernels.stickbreaking_forward import attention_forward

MAX_CHANNELS = 256
# Most memory for what the two passes of the backward pass hand over; longer problems go in several rounds of rows.
CARRY_BYTES = 256 << 20
# Programs that decoding aims at: a few for each multiprocessor of a large GPU.
DECODE_PROGRAMS = 512


@dataclass(frozen=True)
class Tiles:
    """M rows and N keys of a tile, and how a kernel is launched."""

    M: int
    N: int
    num_warps: int
    num_stages: int
    chunk: int = 1


@dataclass(frozen=True)
class Rule:
    """Tiles of every kernel for one width and type; M and N of the backward passes divide those of the forward pass."""

    forward: Tiles
    queries: Tiles
    keys: Tiles
    decode: Tiles


def rule(C: int, dtype: torch.dtype, capability: int = 90) -> Rule:
    """The tiles for heads of C channels on a GPU of this compute capability (times ten).

    As large as registers and shared memory allow without spills that would matter; Hopper's products (wgmma) take tiles
    of 64 rows by four warps. Raises ValueError when C exceeds 256.
    """
    if not 1 <= C <= MAX_CHANNELS:
        raise ValueError(f"the Triton kernels take heads of 1 to {MAX_CHANNELS} channels, got {C}")
    if dtype == torch.float32:
        tiles = Tiles(32, 32, 4 if C <= 64 else 8, 1, 8)
        return Rule(tiles, tiles, tiles, Tiles(16, 32, 4, 1))
    small = Tiles(32, 32, 8, 2)
    if capability >= 90:
        if C <= 64:
            tiles = Tiles(128, 64, 8, 2)
            return Rule(Tiles(128, 64, 8, 3, 4), tiles, tiles, Tiles(16, 64, 4, 2))
        if C <= 128:
            return Rule(Tiles(128, 64, 8, 2, 4), Tiles(128, 32, 8, 2), Tiles(64, 32, 8, 2), Tiles(16, 64, 4, 2))
        return Rule(Tiles(128, 32, 8, 2, 8), small, small, Tiles(16, 32, 4, 2))
    if C <= 64:
        return Rule(Tiles(128, 32, 8, 3, 8), Tiles(64, 32, 4, 2), Tiles(32, 32, 4, 2), Tiles(16, 64, 4, 2))
    if C <= 128:
        return Rule(Tiles(64, 64, 8, 2, 4), Tiles(64, 32, 8, 2), Tiles(32, 32, 4, 2), Tiles(16, 64, 4, 2))
    return Rule(Tiles(64, 32, 8, 2, 8), small, small, Tiles(16, 32, 4, 2))


@dataclass(frozen=True)
class Problem:
    """Sizes, and the flags that the kernels are made for."""

    B: int
    H: int
    G: int
    T: int
    S: int
    C: int
    shift: int
    dtype: torch.dtype
    has_start: bool
    has_mask: bool
    capability: int

    @property
    def rule(self) -> Rule:
        return rule(self.C, self.dtype, self.capability)

    @property
    def K(self) -> int:
        return self.H // self.G

    @property
    def lines(self) -> int:
        return self.B * self.G

    @property
    def rows(self) -> int:
        return self.T * self.K

    def lengths(self) -> dict[str, int]:
        return {"T": self.T, "S": self.S, "shift": self.shift, "G": self.G, "K": self.K}

    def constants(self, tiles: Tiles) -> dict[str, Any]:
        half = self.dtype != torch.float32
        return {
            "M": tiles.M,
            "N": tiles.N,
            "C": self.C,
            "BLOCK_C": max(16, triton.next_power_of_2(self.C)),
            "HAS_START": self.has_start,
            "HAS_MASK": self.has_mask,
            "HALF": half,
            # The interpreter multiplies the bits of bfloat16, not its values.
            "UPCAST": half and bool(triton.knobs.runtime.interpret),
        }


def problem(
    q_BHTC: torch.Tensor,
    k_BGSC: torch.Tensor,
    causal: bool,
    start: torch.Tensor | None,
    mask: torch.Tensor | None,
    capability: int | None = None,
) -> Problem:
    """capability: of the tensors' GPU when it is not given (90 without a GPU)."""
    B, H, T, C = q_BHTC.shape
    G, S = k_BGSC.shape[1:3]
    if capability is None:
        major, minor = torch.cuda.get_device_capability(q_BHTC.device) if q_BHTC.is_cuda else (9, 0)
        capability = 10 * major + minor
    shift = S - T if causal else S
    return Problem(B, H, G, T, S, C, shift, q_BHTC.dtype, start is not None, mask is not None, capability)


def _options(tiles: Tiles) -> dict[str, int]:
    return {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}


def _strides(name: str, x: torch.Tensor, letters: str) -> dict[str, int]:
    return {f"stride_{name}{letter}": x.stride(i) for i, letter in enumerate(letters)}


def _views(q: torch.Tensor, start: torch.Tensor | None, mask: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """Pointers to what limits the view; any pointer where nothing does."""
    return {"start_ptr": q if start is None else start, "mask_ptr": q if mask is None else mask}


def forward_launch(
    p: Problem,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    start_BT: torch.Tensor | None,
    mask_BS: torch.Tensor | None,
    scale: float,
    stop: float,
) -> tuple[Launch, tuple[torch.Tensor, ...]]:
    """The launch, and what it fills: o_BHTC, log_rem_BHT, stick [2, B*G, R], reach [B*G, I]."""
    tiles = p.rule.forward
    num_tiles = triton.cdiv(p.rows, tiles.M)
    o = torch.empty_like(q)
    log_rem = q.new_empty(p.B, p.H, p.T, dtype=torch.float32)
    stick = q.new_empty(2, p.lines, p.rows, dtype=torch.float32)
    reach = q.new_empty(p.lines, num_tiles, dtype=torch.int32)
    arguments = {
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "o_ptr": o,
        "log_rem_ptr": log_rem,
        "stick_ptr": stick,
        "reach_ptr": reach,
        **_views(q, start_BT, mask_BS),
        **_strides("q", q, "bht"),
        **_strides("k", k, "bgs"),
        **_strides("v", v, "bgs"),
        **_strides("o", o, "bht"),
        **p.lengths(),
        "scale2": scale * math.log2(math.e),
        "log2_stop": math.log2(stop) if stop > 0 else -math.inf,
        **p.constants(tiles),
        "CHUNK": tiles.chunk,
    }
    return Launch(attention_forward, (num_tiles, p.lines), arguments, _options(tiles)), (o, log_rem, stick, reach)


def row_ends(reach: torch.Tensor, rows_per_tile: int, num_key_tiles: int, N: int) -> torch.Tensor:
    """[B*G, J] int32: no tile of rows from there on has walked as far as each tile of keys."""
    least_from_here = reach.flip(1).cummin(1).values.flip(1)
    first_key = torch.arange(0, num_key_tiles * N, N, device=reach.device, dtype=reach.dtype)
    tiles = torch.searchsorted(least_from_here, first_key.expand(reach.shape[0], -1).contiguous(), right=True)
    return (tiles * rows_per_tile).int()


def backward_launches(
    p: Problem,
    grad_o: torch.Tensor,
    grad_log_rem: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    stick: torch.Tensor,
    reach: torch.Tensor,
    row_end: torch.Tensor,
    start_BT: torch.Tensor | None,
    mask_BS: torch.Tensor | None,
    scale: float,
) -> tuple[list[Launch], tuple[torch.Tensor, ...]]:
    """Launches in order, and what they fill: dq, dk, dv (float32 when there are several rounds)."""
    tiles = p.rule
    M, N, REACH = tiles.queries.M, tiles.queries.N, tiles.forward.M
    num_key_tiles = triton.cdiv(p.S, N)
    bytes_per_row = 8 * max(1, p.lines * num_key_tiles)
    round_rows = max(1, CARRY_BYTES // bytes_per_row // REACH) * REACH
    round_rows = min(round_rows, triton.cdiv(p.rows, REACH) * REACH)
    several = round_rows < p.rows
    grad_q = torch.empty_like(q)
    grad_k = torch.empty_like(k, dtype=torch.float32 if several else None)
    grad_v = torch.empty_like(v, dtype=torch.float32 if several else None)
    carry = q.new_empty(2, p.lines, num_key_tiles, round_rows, dtype=torch.float32)
    shared = {
        "grad_o_ptr": grad_o,
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "reach_ptr": reach,
        "carry_ptr": carry,
        **_views(q, start_BT, mask_BS),
        **_strides("g", grad_o, "bht"),
        **_strides("q", q, "bht"),
        **_strides("k", k, "bgs"),
        **_strides("v", v, "bgs"),
        "stride_c2": carry.stride(0),
        "stride_ch": carry.stride(1),
        "stride_cj": carry.stride(2),
        **p.lengths(),
        "num_reaches": reach.shape[1],
        "scale": scale,
        "scale2": scale * math.log2(math.e),
        "REACH": REACH,
    }
    launches = []
    for row in range(0, max(p.rows, 1), max(round_rows, 1)):
        rows = min(round_rows, p.rows - row)
        arguments = {
            **shared,
            "grad_log_rem_ptr": q if grad_log_rem is None else grad_log_rem,
            "grad_q_ptr": grad_q,
            "stick_ptr": stick,
            **_strides("d", grad_q, "bht"),
            "tile0": row // M,
            "HAS_GRAD_LOG_REM": grad_log_rem is not None,
            **p.constants(tiles.queries),
        }
        grid = (triton.cdiv(rows, M), p.lines)
        launches.append(Launch(attention_backward_queries, grid, arguments, _options(tiles.queries)))
        arguments = {
            **shared,
            "grad_k_ptr": grad_k,
            "grad_v_ptr": grad_v,
            "row_end_ptr": row_end,
            **_strides("dk", grad_k, "bgs"),
            **_strides("dv", grad_v, "bgs"),
            "tile0": row // tiles.keys.M,
            "tile1": triton.cdiv(row + rows, tiles.keys.M),
            "ADD": row > 0,
            **p.constants(tiles.keys),
        }
        launches.append(Launch(attention_backward_keys, (num_key_tiles, p.lines), arguments, _options(tiles.keys)))
    return launches, (grad_q, grad_k, grad_v)


def decode_launches(
    p: Problem,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    start_BT: torch.Tensor | None,
    mask_BS: torch.Tensor | None,
    scale: float,
    stop: float,
) -> tuple[list[Launch], torch.Tensor]:
    """q_BHC; the launches in order, and the o_BHC they fill."""
    tiles = p.rule.decode
    num_key_tiles = triton.cdiv(p.S, tiles.N)
    splits = min(max(1, DECODE_PROGRAMS // max(1, p.lines)), max(1, num_key_tiles))
    tiles_per_split = triton.cdiv(max(1, num_key_tiles), splits)
    splits = triton.cdiv(max(1, num_key_tiles), tiles_per_split)
    o = torch.empty_like(q)
    part = q.new_empty(p.lines, splits, p.K, p.C, dtype=torch.float32)
    rest = q.new_empty(p.lines, splits, p.K, dtype=torch.float32)
    constants = p.constants(tiles)
    constants["M"] = max(tiles.M, triton.next_power_of_2(p.K))
    arguments = {
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "part_ptr": part,
        "rest_ptr": rest,
        **_views(q, start_BT, mask_BS),
        **_strides("q", q, "bh"),
        **_strides("k", k, "bgs"),
        **_strides("v", v, "bgs"),
        "S": p.S,
        "G": p.G,
        "K": p.K,
        "tiles_per_split": tiles_per_split,
        "scale2": scale * math.log2(math.e),
        "log2_stop": math.log2(stop) if stop > 0 else -math.inf,
        **constants,
    }
    combine = {
        "part_ptr": part,
        "rest_ptr": rest,
        "o_ptr": o,
        **_strides("o", o, "bh"),
        "P": splits,
        "G": p.G,
        "K": p.K,
        "C": p.C,
        "BLOCK_C": constants["BLOCK_C"],
    }
    return [
        Launch(decode_split, (splits, p.lines), arguments, _options(tiles)),
        Launch(decode_combine, (p.K, p.lines), combine, {"num_warps": 4, "num_stages": 3}),
    ], o

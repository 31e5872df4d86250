"""Attention on a GPU for heads of any size: batched GEMM -> scan of the logits -> batched GEMM, in chunks of queries.

The chunks keep memory linear in T, and a chunk multiplies only the keys up to its last query. The backward pass
computes the logits anew. Every sum has one order: same bits in every run. Nothing waits for the device. The composition
runs on any device around the two functions of a `Scan`; `COMPILED` are the kernels of csrc/cuda.

Shapes: `B` batch, `T` query time, `S` key time, `H` = K*G query heads, `G` key/value heads, `K` query heads of a key
head, `C` channels, `M` = B*G batched products, `Q` = queries of a chunk times K, rows of one product.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from megamf.ops import backend as backends

# Logits that a chunk holds at a time (float32: 32 MiB, in the second-level cache of large GPUs), and the least queries.
CHUNK_CELLS = 2**23
CHUNK_QUERIES = 64
DECODE_CHANNELS = 2048


@dataclass(frozen=True)
class Rows:
    """How the rows [M, Q] of a chunk see the keys: query t of `queries` at S - queries + t, or behind all keys."""

    batch: int
    queries: int
    heads: int
    scale: float
    log_stop: float
    causal: bool
    start_BT: torch.Tensor | None
    key_mask_BS: torch.Tensor | None


class Scan(NamedTuple):
    """forward(logits_MQS, rows, dtype) -> (weights_MQS of dtype, log_rem_MQ).

    backward(grad_MQS, grad_log_rem_MQ, logits_MQS, rows, dtype) -> (weights_MQS, gradient of the unscaled logits_MQS),
    both of dtype.
    """

    forward: Callable[[torch.Tensor, Rows, torch.dtype], tuple[torch.Tensor, torch.Tensor]]
    backward: Callable[
        [torch.Tensor, torch.Tensor | None, torch.Tensor, Rows, torch.dtype], tuple[torch.Tensor, torch.Tensor]
    ]


class Chunk(NamedTuple):
    """Queries [t0, t1), which see no key from `end` on."""

    t0: int
    t1: int
    end: int


def _compiled_forward(logits_MQS: torch.Tensor, rows: Rows, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    weights_MQS = torch.empty_like(logits_MQS, dtype=dtype)
    log_rem_MQ = logits_MQS.new_empty(logits_MQS.shape[:2], dtype=torch.float32)
    torch.ops.megamf.stickbreaking_rows(logits_MQS, *_row_arguments(rows), weights_MQS, log_rem_MQ)
    return weights_MQS, log_rem_MQ


def _compiled_backward(
    grad_MQS: torch.Tensor,
    grad_log_rem_MQ: torch.Tensor | None,
    logits_MQS: torch.Tensor,
    rows: Rows,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    weights_MQS, grad_logits_MQS = (torch.empty_like(logits_MQS, dtype=dtype) for _ in range(2))
    torch.ops.megamf.stickbreaking_rows_backward(
        grad_MQS, grad_log_rem_MQ, logits_MQS, *_row_arguments(rows), weights_MQS, grad_logits_MQS
    )
    return weights_MQS, grad_logits_MQS


def _row_arguments(rows: Rows) -> tuple:
    sizes = (rows.batch, rows.queries, rows.heads)
    return rows.start_BT, rows.key_mask_BS, *sizes, rows.scale, rows.log_stop, rows.causal


COMPILED = Scan(_compiled_forward, _compiled_backward)


def attention(
    q_BHTC: torch.Tensor,
    k_BGSC: torch.Tensor,
    v_BGSC: torch.Tensor,
    start_BT: torch.Tensor | None,
    key_mask_BS: torch.Tensor | None,
    scale: float,
    stop: float,
    causal: bool = True,
    *,
    scan: Scan = COMPILED,
    cells: int = CHUNK_CELLS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(o_BHTC, log_rem_BHT float32), of q's memory layout. Arguments as in the public function."""
    call = _prepare(q_BHTC, k_BGSC, v_BGSC, start_BT, key_mask_BS, scale, stop, causal)
    o_BHTC = torch.empty_like(q_BHTC)
    B, H, T, _ = q_BHTC.shape
    log_rem_BHT = q_BHTC.new_empty((B, H, T), dtype=torch.promote_types(q_BHTC.dtype, torch.float32))
    for chunk in _chunks(call, cells):
        logits_MQS = _product(call.rows_of(call.q_BHTC, chunk), call.k_MSC[:, : chunk.end].mT)
        weights_MQS, log_rem_MQ = scan.forward(logits_MQS, call.rows(chunk), q_BHTC.dtype)
        del logits_MQS
        _write(o_BHTC, chunk, call.G, weights_MQS, call.v_MSC[:, : chunk.end])
        call.heads_of(log_rem_BHT, chunk).copy_(log_rem_MQ.view(B, call.G, chunk.t1 - chunk.t0, -1))
    return o_BHTC, log_rem_BHT


def attention_backward(
    grad_o_BHTC: torch.Tensor,
    q_BHTC: torch.Tensor,
    k_BGSC: torch.Tensor,
    v_BGSC: torch.Tensor,
    start_BT: torch.Tensor | None,
    key_mask_BS: torch.Tensor | None,
    scale: float,
    stop: float,
    grad_log_rem_BHT: torch.Tensor | None = None,
    causal: bool = True,
    *,
    scan: Scan = COMPILED,
    cells: int = CHUNK_CELLS,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v, of their types and memory layouts."""
    call = _prepare(q_BHTC, k_BGSC, v_BGSC, start_BT, key_mask_BS, scale, stop, causal)
    grad_o = call.keep_queries(grad_o_BHTC)
    grad_q = torch.empty_like(q_BHTC)
    wide = torch.promote_types(q_BHTC.dtype, torch.float32)
    if grad_log_rem_BHT is not None:
        grad_log_rem_BHT = call.keep_queries(grad_log_rem_BHT[..., None])[..., 0].to(wide)
    grad_k_MSC = grad_v_MSC = None
    for chunk in reversed(list(_chunks(call, cells))):  # the last one sees all keys
        q_MQC, grad_MQC = call.rows_of(call.q_BHTC, chunk), call.rows_of(grad_o, chunk)
        k_MSC, v_MSC = call.k_MSC[:, : chunk.end], call.v_MSC[:, : chunk.end]
        logits_MQS, grad_MQS = _product(q_MQC, k_MSC.mT), _product(grad_MQC, v_MSC.mT)
        rest = None if grad_log_rem_BHT is None else call.heads_of(grad_log_rem_BHT, chunk).reshape(q_MQC.shape[:2])
        weights_MQS, grad_logits_MQS = scan.backward(grad_MQS, rest, logits_MQS, call.rows(chunk), q_BHTC.dtype)
        del logits_MQS, grad_MQS
        _write(grad_q, chunk, call.G, grad_logits_MQS, k_MSC)
        grad_k_MSC = _add_product(grad_k_MSC, grad_logits_MQS.mT, q_MQC)
        grad_v_MSC = _add_product(grad_v_MSC, weights_MQS.mT, grad_MQC)
    return grad_q, _like(grad_k_MSC, k_BGSC), _like(grad_v_MSC, v_BGSC)


class _Call(NamedTuple):
    """The arguments, with zeros in rows that must not enter a product, and keys as matrices."""

    q_BHTC: torch.Tensor
    k_MSC: torch.Tensor
    v_MSC: torch.Tensor
    live_BT: torch.Tensor | None
    G: int
    settings: Rows

    def keep_queries(self, x_BHTC: torch.Tensor) -> torch.Tensor:
        return x_BHTC if self.live_BT is None else torch.where(self.live_BT[:, None, :, None], x_BHTC, 0)

    def heads_of(self, x_BHT: torch.Tensor, chunk: Chunk) -> torch.Tensor:
        """View [B, G, queries, K]."""
        return _rows_view(x_BHT[..., None], chunk, self.G)[..., 0]

    def rows_of(self, x_BHTC: torch.Tensor, chunk: Chunk) -> torch.Tensor:
        """[M, Q, C], rows (query, k): a view where G = 1 and the heads of a token lie together."""
        return _rows_view(x_BHTC, chunk, self.G).reshape(
            -1, (chunk.t1 - chunk.t0) * self.settings.heads, x_BHTC.shape[3]
        )

    def rows(self, chunk: Chunk) -> Rows:
        start_BT, mask_BS = self.settings.start_BT, self.settings.key_mask_BS
        return replace(
            self.settings,
            queries=chunk.t1 - chunk.t0,
            start_BT=None if start_BT is None else start_BT[:, chunk.t0 : chunk.t1],
            key_mask_BS=None if mask_BS is None else mask_BS[:, : chunk.end],
        )


def _prepare(
    q_BHTC: torch.Tensor,
    k_BGSC: torch.Tensor,
    v_BGSC: torch.Tensor,
    start_BT: torch.Tensor | None,
    key_mask_BS: torch.Tensor | None,
    scale: float,
    stop: float,
    causal: bool,
) -> _Call:
    B, H, T, C = q_BHTC.shape
    G, S = k_BGSC.shape[1:3]
    same, live_BT = _same(k_BGSC, v_BGSC), None
    if start_BT is not None or key_mask_BS is not None:
        live_BT, key_live_BS = live_rows(B, T, S, start_BT, key_mask_BS, causal, q_BHTC.device)
        q_BHTC = torch.where(live_BT[:, None, :, None], q_BHTC, 0)
        k_BGSC = torch.where(key_live_BS[:, None, :, None], k_BGSC, 0)
        v_BGSC = k_BGSC if same else torch.where(key_live_BS[:, None, :, None], v_BGSC, 0)
    k_MSC = k_BGSC.reshape(B * G, S, C)
    v_MSC = k_MSC if same else v_BGSC.reshape(B * G, S, C)
    start_BT = None if start_BT is None else start_BT.int().contiguous()
    settings = Rows(B, T, H // G, scale, _log(stop), causal, start_BT, key_mask_BS)
    return _Call(q_BHTC, k_MSC, v_MSC, live_BT, G, settings)


def _log(stop: float) -> float:
    return math.log(stop) if stop > 0 else -math.inf


def _same(k_BGSC: torch.Tensor, v_BGSC: torch.Tensor) -> bool:
    return k_BGSC.data_ptr() == v_BGSC.data_ptr() and k_BGSC.stride() == v_BGSC.stride()


def live_rows(
    B: int,
    T: int,
    S: int,
    start_BT: torch.Tensor | None,
    key_mask_BS: torch.Tensor | None,
    causal: bool,
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(query_BT, key_BS) bool: queries that see some key, keys that some query sees; linear memory."""
    key_S = torch.arange(S, device=device)
    last_T = torch.arange(S - T, S, device=device) if causal else torch.full((T,), S - 1, device=device)
    mask_BS = torch.ones(B, S, dtype=torch.bool, device=device) if key_mask_BS is None else key_mask_BS
    first_BT = torch.zeros(B, T, dtype=torch.long, device=device) if start_BT is None else start_BT.long().clamp(0, S)
    before_BS = torch.nn.functional.pad(mask_BS.long().cumsum(1), (1, 0))
    live_BT = before_BS[:, last_T + 1] > before_BS.gather(1, first_BT)
    if T == 0:
        return live_BT, torch.zeros_like(mask_BS)
    # Key j can be seen by the queries from `oldest` on, and is when the earliest start among them is not behind it.
    earliest_BT = torch.where(live_BT, first_BT, S).flip(1).cummin(1).values.flip(1)
    oldest_S = (key_S - (S - T)).clamp_min(0) if causal else torch.zeros_like(key_S)
    return live_BT, mask_BS & (earliest_BT[:, oldest_S] <= key_S)


def _chunks(call: _Call, cells: int) -> Iterator[Chunk]:
    """From the oldest queries on; boundaries at multiples of the chunk length, so that rows of logits stay aligned."""
    T, S = call.q_BHTC.shape[2], call.k_MSC.shape[1]
    H = call.q_BHTC.shape[1]
    fit = cells // max(1, call.settings.batch * H * S)
    size = max(fit // CHUNK_QUERIES * CHUNK_QUERIES, min(CHUNK_QUERIES, cells))
    offset = S - T if call.settings.causal else 0
    t0 = 0
    while t0 < T and call.settings.batch > 0:
        t1 = min(T, t0 + size - (offset + t0) % size)
        yield Chunk(t0, t1, S - T + t1 if call.settings.causal else S)
        t0 = t1


def _rows_view(x_BHTC: torch.Tensor, chunk: Chunk, G: int) -> torch.Tensor:
    """View [B, G, queries, K, C] (head h = k*G + g)."""
    return x_BHTC[:, :, chunk.t0 : chunk.t1].unflatten(1, (-1, G)).permute(0, 2, 3, 1, 4)


def _write(x_BHTC: torch.Tensor, chunk: Chunk, G: int, a_MQS: torch.Tensor, b_MSC: torch.Tensor) -> None:
    """Stores a @ b in the chunk's rows of x, directly where they form matrices."""
    view = _rows_view(x_BHTC, chunk, G)
    B, _, queries, K, C = view.shape
    if G == 1 and view.stride(2) == K * view.stride(3) and view.stride(4) == 1:
        torch.bmm(a_MQS, b_MSC, out=view.as_strided((B, queries * K, C), (view.stride(0), view.stride(3), 1)))
    else:
        view.copy_(torch.bmm(a_MQS, b_MSC).view(view.shape))


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b, rounded to float32 at most: 16-bit logits of size 8 would be off by 3%."""
    if a.dtype.itemsize >= 4:
        return torch.bmm(a, b)
    return torch.bmm(a, b, out_dtype=torch.float32) if a.is_cuda else torch.bmm(a.float(), b.float())


def _add_product(total: torch.Tensor | None, a_MSQ: torch.Tensor, b_MQC: torch.Tensor) -> torch.Tensor:
    """total + a @ b in the first rows of total, in float32 at least; total None: a @ b."""
    if total is None:
        return _product(a_MSQ, b_MQC)
    part = total[:, : a_MSQ.shape[1]]
    if a_MSQ.dtype.itemsize < 4 and a_MSQ.is_cuda:
        torch.baddbmm(part, a_MSQ, b_MQC, torch.float32, out=part)
    else:
        part.baddbmm_(a_MSQ.to(total.dtype), b_MQC.to(total.dtype))
    return total


def _like(x_MSC: torch.Tensor | None, like_BGSC: torch.Tensor) -> torch.Tensor:
    """x in the type and memory layout of `like`; zeros where no query added anything."""
    if x_MSC is None:
        return torch.zeros_like(like_BGSC)
    return torch.empty_like(like_BGSC).copy_(x_MSC.view(like_BGSC.shape))


def decode(
    q_BHC: torch.Tensor,
    k_BGSC: torch.Tensor,
    v_BGSC: torch.Tensor,
    start_B: torch.Tensor | None,
    key_mask_BS: torch.Tensor | None,
    scale: float,
    stop: float,
) -> torch.Tensor:
    """o_BHC of one query a sequence; heads of more than 2048 channels go through the batched products."""
    if q_BHC.shape[2] > DECODE_CHANNELS:
        start_BT = None if start_B is None else start_B[:, None]
        return attention(q_BHC[:, :, None], k_BGSC, v_BGSC, start_BT, key_mask_BS, scale, stop)[0][:, :, 0]
    return torch.ops.megamf.stickbreaking_decode_parts(q_BHC, k_BGSC, v_BGSC, start_B, key_mask_BS, scale, _log(stop))


def _attention_only(q, k, v, start_BT, key_mask_BS, scale, stop, causal=True):
    return attention(q, k, v, start_BT, key_mask_BS, scale, stop, causal)[0]


@torch.library.register_fake("megamf::stickbreaking_rows")
def _rows_fake(*arguments):
    return None


@torch.library.register_fake("megamf::stickbreaking_rows_backward")
def _rows_backward_fake(*arguments):
    return None


@torch.library.register_fake("megamf::stickbreaking_decode_parts")
def _decode_parts_fake(q, k, v, start, key_mask, scale, log_stop):
    return torch.empty_like(q)


if backends.has_cuda():
    # The operations of csrc.py, with their shapes and gradients, now also run on CUDA tensors.
    torch.library.impl("megamf::stickbreaking_attention", "CUDA")(_attention_only)
    torch.library.impl("megamf::stickbreaking_attention_rest", "CUDA")(attention)
    torch.library.impl("megamf::stickbreaking_attention_backward", "CUDA")(attention_backward)
    torch.library.impl("megamf::stickbreaking_decode", "CUDA")(decode)

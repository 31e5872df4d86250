"""Attention as GEMM -> scan -> GEMM in chunks, on the CPU: around the specification, and around the emulated kernel."""

import math

import pytest
import torch

from megamf.ops.stickbreaking import document_starts, naive
from megamf.ops.stickbreaking.cuda import Rows, Scan, attention, attention_backward, live_rows


def seen_rows(logits_MQS: torch.Tensor, rows: Rows) -> torch.Tensor:
    S, shape = logits_MQS.shape[2], (rows.batch, -1, rows.queries, rows.heads, logits_MQS.shape[2])
    seen_BTS = naive.visible(rows.queries, S, rows.start_BT, rows.key_mask_BS, logits_MQS.device, causal=rows.causal)
    return (
        seen_BTS.expand(rows.batch, rows.queries, S)[:, None, :, None]
        .expand_as(logits_MQS.view(shape))
        .reshape(logits_MQS.shape)
    )


def plain(logits_MQS: torch.Tensor, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
    seen, scaled = seen_rows(logits_MQS, rows), logits_MQS * rows.scale
    left = torch.where(seen, torch.nn.functional.logsigmoid(-torch.where(seen, scaled, 0.0)), 0.0)
    return naive.break_stick(scaled, seen), left.sum(-1)


def forward(logits_MQS, rows, dtype):
    weights, rest = plain(logits_MQS, rows)
    return weights.to(dtype), rest


def backward(grad_MQS, grad_rest_MQ, logits_MQS, rows, dtype):
    logits = logits_MQS.detach().requires_grad_()
    with torch.enable_grad():
        weights, rest = plain(logits, rows)
        loss = (weights * grad_MQS).sum() + (0 if grad_rest_MQ is None else (rest * grad_rest_MQ).sum())
    return weights.detach().to(dtype), torch.autograd.grad(loss, logits)[0].to(dtype)


PLAIN = Scan(forward, backward)


def compare(scan: Scan, q, k, v, start, mask, causal, dtype, limit, cells, token_major=False) -> None:
    generator = torch.Generator().manual_seed(5)
    scale = q.shape[-1] ** -0.5
    grad = torch.randn(q.shape, generator=generator, dtype=torch.float64)
    grad_rest = torch.randn(q.shape[:3], generator=generator, dtype=torch.float64)
    if token_major:  # the layout of the model: [B, T, H, C] in memory
        q, grad = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, grad))
    q, k, v, grad = (x.to(dtype) for x in (q, k, v, grad))
    leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
    want, want_rest = naive.attention_and_rest(*leaves, scale, start, mask, causal=causal)
    want_grads = torch.autograd.grad([want, want_rest], leaves, [grad.double(), grad_rest])
    query_live, key_live = live_rows(*q.shape[::2][:2], k.shape[2], start, mask, causal, q.device)
    dead = ~query_live[:, None, :, None]
    q, grad = q.masked_fill(dead, math.nan), grad.masked_fill(dead, math.nan)
    k, v = (x.masked_fill(~key_live[:, None, :, None], math.nan) for x in (k, v))
    got, rest = attention(q, k, v, start, mask, scale, 0.0, causal, scan=scan, cells=cells)
    wide = grad_rest.to(rest.dtype).masked_fill(dead[..., 0], math.nan)
    grads = attention_backward(grad, q, k, v, start, mask, scale, 0.0, wide, causal, scan=scan, cells=cells)
    assert got.stride() == q.stride() and grads[0].stride() == q.stride() and grads[1].stride() == k.stride()
    for name, a, b in zip(
        ("o", "rest", "dq", "dk", "dv"), (got, rest, *grads), (want, want_rest, *want_grads), strict=True
    ):
        assert torch.isfinite(a).all(), name
        error = float((a.double() - b.detach()).norm() / b.detach().norm().clamp_min(1e-30))
        assert error < limit * (1 if name in ("o", "rest") else 2), (name, error)


SIZES = [
    (1, 1, 1, 1, 1, 4),
    (2, 2, 1, 9, 9, 6),
    (2, 6, 3, 7, 12, 5),
    (1, 4, 2, 13, 20, 8),
    (2, 3, 1, 0, 4, 4),
    (0, 2, 1, 3, 3, 4),
]


def tensors(B, H, G, T, S, C):
    generator = torch.Generator().manual_seed(T * S + H)
    sizes = ((B, H, T, C), (B, G, S, C), (B, G, S, C))
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in sizes]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("cells", [1, 3, 10**6])
@pytest.mark.parametrize("token_major", [False, True])
@pytest.mark.parametrize("options", ["", "start", "mask", "start mask behind", "behind"])
def test_composition(sizes, cells: int, token_major: bool, options: str) -> None:
    B, _, _, T, S, _ = sizes
    generator = torch.Generator().manual_seed(B + S)
    start = torch.randint(0, S + 1, (B, T), generator=generator) if "start" in options else None
    mask = torch.rand(B, S, generator=generator) > 0.4 if "mask" in options else None
    compare(PLAIN, *tensors(*sizes), start, mask, "behind" not in options, torch.float64, 1e-12, cells, token_major)


def test_documents_and_shared_keys() -> None:
    B, T = 2, 30
    start = document_starts(torch.tensor([0, 0, 1, 2, 17, 42, 60, 60]), B, T)
    q, k, _ = tensors(B, 4, 1, T, T, 8)
    compare(PLAIN, q, k, k, start, None, True, torch.float64, 1e-12, 4, True)


def test_chunks_hold_linear_memory() -> None:
    largest = []

    def spy(logits, rows, dtype):
        largest.append(logits.numel())
        return forward(logits, rows, dtype)

    q, k, v = tensors(1, 2, 1, 640, 640, 2)
    got, _ = attention(q, k, v, None, None, 0.5, 0.0, scan=Scan(spy, backward), cells=64 * 640 * 2)
    assert len(largest) == 10 and max(largest) == 64 * 640 * 2 and sum(largest) < 0.6 * 2 * 640**2
    torch.testing.assert_close(got, naive.attention(q, k, v, 0.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", ["", "start mask", "start mask behind"])
def test_composition_of_the_emulated_kernel(emulated_library, options: str, dtype: torch.dtype) -> None:
    B, H, G, T, S, C = 2, 4, 2, 21, 29, 16
    generator = torch.Generator().manual_seed(9)
    start = torch.randint(0, S + 1, (B, T), generator=generator) if "start" in options else None
    mask = torch.rand(B, S, generator=generator) > 0.4 if "mask" in options else None
    limit = {torch.float32: 5e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}[dtype]
    causal = "behind" not in options
    compare(emulated_library.scan, *tensors(B, H, G, T, S, C), start, mask, causal, dtype, limit, 8, True)

"""On a GPU: stick-breaking attention, scan and decoding of backend cuda against the specification in float64."""

import math

import pytest
import torch

from megamf.ops.stickbreaking import (
    document_starts,
    naive,
    stickbreaking_attention,
    stickbreaking_decode,
    stickbreaking_scan,
)

pytestmark = pytest.mark.gpu
# Relative error (2-norm) of values and of gradients.
LIMITS = {torch.float32: 5e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Every uninitialised tensor that torch allocates is filled with NaN."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b).norm() / b.norm().clamp_min(1e-30))


def tensors(B, H, G, T, S, C, dtype):
    generator = torch.Generator(device="cuda").manual_seed(B * H + T * S + C)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cuda").to(dtype)

    # The model's layout: the heads of a token lie together.
    q, grad = (random(B, T, H, C).transpose(1, 2) for _ in range(2))
    return q, *(random(B, S, G, C).transpose(1, 2) for _ in range(2)), grad


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("options", ["", "start", "mask", "start mask behind"])
@pytest.mark.parametrize(
    "sizes",
    [
        (1, 1, 1, 1, 1, 8),
        (2, 2, 1, 65, 65, 1024),
        (2, 6, 3, 33, 131, 40),
        (1, 2, 1, 700, 1001, 320),
        (1, 4, 4, 64, 64, 7),
    ],
    ids=str,
)
def test_attention(sizes, options: str, dtype: torch.dtype) -> None:
    q, k, v, grad = tensors(*sizes, dtype)
    B, T, S, causal = sizes[0], sizes[3], sizes[4], "behind" not in options
    start = torch.randint(0, S + 1, (B, T), device="cuda") if "start" in options else None
    mask = torch.rand(B, S, device="cuda") > 0.3 if "mask" in options else None
    grad_rest = torch.randn(q.shape[:3], device="cuda")
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    want, want_rest = naive.attention_and_rest(*wide, 0.1, start, mask, causal=causal)
    want_grads = torch.autograd.grad([want, want_rest], wide, [grad.double(), grad_rest.double()])
    if mask is not None:
        k, v = (x.masked_fill(~mask[:, None, :, None], math.nan) for x in (k, v))
    runs = []
    for _ in range(2):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        o, rest = stickbreaking_attention(
            *leaves,
            **{"scale": 0.1, "start_BT": start, "key_mask_BS": mask, "causal": causal},
            return_log_rem=True,
            backend="cuda",
        )
        runs.append([o.detach(), rest.detach(), *torch.autograd.grad([o, rest], leaves, [grad, grad_rest])])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    for a, b in zip(runs[0], (want.detach(), want_rest.detach(), *want_grads), strict=True):
        assert torch.isfinite(a).all() and relative(a, b) < 2 * LIMITS[dtype], relative(a, b)


def test_documents_and_the_automatic_choice() -> None:
    q, k, _, grad = tensors(2, 4, 1, 300, 300, 512, torch.bfloat16)
    start = document_starts(torch.tensor([0, 0, 1, 2, 170, 300, 471, 600, 600]), 2, 300).cuda()
    wide = [x.detach().double().requires_grad_() for x in (q, k)]
    want = naive.attention(*wide, wide[1], 512**-0.5, start)
    want_grads = torch.autograd.grad(want, wide, grad.double())
    leaves = [x.detach().requires_grad_() for x in (q, k)]
    got = stickbreaking_attention(*leaves, leaves[1], start_BT=start)
    for a, b in zip([got, *torch.autograd.grad(got, leaves, grad)], [want, *want_grads], strict=True):
        assert relative(a.detach(), b.detach()) < 1.5e-2


def test_memory_is_linear_and_nothing_waits() -> None:
    q, k, v, _ = tensors(1, 2, 1, 16384, 16384, 320, torch.bfloat16)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.no_grad():
        torch.cuda.set_sync_debug_mode("error")
        try:
            stickbreaking_attention(q, k, v, backend="cuda")
            stickbreaking_decode(q[:, :, 0], k, v, backend="cuda")
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.max_memory_allocated() - before < 200 * 2**20


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (2, 3, 5, 9), (3, 65, 130), (1, 4, 5000), (0, 4, 4)], ids=str)
def test_scan(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    logits = (torch.randn(shape, device="cuda") * 2).to(dtype)
    start = torch.randint(0, shape[-1] + 1, shape[:-1], device="cuda")
    seen = naive.visible(shape[-2], shape[-1], start, None, logits.device).expand(shape)
    grad = torch.randn(shape, device="cuda").to(dtype)
    wide = logits.double().requires_grad_()
    want = naive.scan(wide, start)
    (want_grad,) = torch.autograd.grad(want, wide, grad.double())
    leaf = logits.masked_fill(~seen, math.nan).requires_grad_()
    got = stickbreaking_scan(leaf, start_XT=start, backend="cuda")
    (got_grad,) = torch.autograd.grad(got, leaf, grad.masked_fill(~seen, math.nan))
    for a, b in ((got.detach(), want.detach()), (got_grad, want_grad)):
        assert torch.isfinite(a).all() and (a[~seen] == 0).all() and relative(a, b) < 2 * LIMITS[dtype]


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize(
    "sizes", [(1, 1, 1, 1, 8), (4, 2, 1, 3000, 1024), (2, 12, 4, 777, 64), (1, 4, 2, 50, 2100)], ids=str
)
def test_decode(sizes, dtype: torch.dtype) -> None:
    B, H, G, S, C = sizes
    q, k, v, _ = tensors(B, H, G, 1, S, C, dtype)
    mask = torch.rand(B, S, device="cuda") > 0.3
    start = torch.randint(0, S, (B,), device="cuda")
    hidden = (~mask | (torch.arange(S, device="cuda") < start[:, None]))[:, None, :, None]
    want = naive.decode(q[:, :, 0].double(), k.double(), v.double(), 0.05, start, mask)
    k, v = (x.masked_fill(hidden, math.nan) for x in (k, v))
    got = stickbreaking_decode(q[:, :, 0], k, v, scale=0.05, start_B=start, key_mask_BS=mask, backend="cuda")
    assert torch.isfinite(got).all() and relative(got, want) < LIMITS[dtype]


def test_under_compile_and_refusals() -> None:
    q, k, v, _ = tensors(1, 2, 1, 40, 40, 264, torch.float32)
    options = {"backend": "cuda"}
    want = stickbreaking_attention(q, k, v, **options)
    compiled = torch.compile(lambda q, k, v: stickbreaking_attention(q, k, v, **options) * 2, fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v), want * 2)
    with pytest.raises(ValueError, match="float64"):
        stickbreaking_attention(q.double(), k.double(), v.double(), **options)

"""Stick-breaking attention in Triton: tiles by rule, interpreted on odd shapes, and run on a GPU."""

import math
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from megamf.errors import UserError
from megamf.kernels import stickbreaking as kernels
from megamf.ops import stickbreaking as public
from megamf.ops.backend import has_cuda
from megamf.ops.stickbreaking import document_starts, naive, stickbreaking_attention, stickbreaking_decode


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("C", [1, 64, 128, 256])
def test_backward_tiles_divide_forward_tiles(C, capability, dtype):
    rule = kernels.rule(C, dtype, capability)
    for tiles in (rule.queries, rule.keys):
        assert rule.forward.M % tiles.M == 0 and rule.forward.N % tiles.N == 0
    assert rule.queries.N == rule.keys.N


def test_the_automatic_choice_by_device_width_and_type():
    def query(device, C, dtype):
        return SimpleNamespace(device=torch.device(device), shape=(1, 1, 1, C), dtype=dtype)

    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert public._choose("attention", "auto", query("cuda", 256, dtype)) == "triton"
    assert public._choose("attention", "auto", query("cpu", 64, torch.float32)) == "csrc"
    if not has_cuda():
        for wide in (query("cuda", 257, torch.bfloat16), query("cuda", 64, torch.float64)):
            with pytest.raises(UserError, match="backend 'cuda' needs the compiled CUDA kernels"):
                public._choose("attention", "auto", wide)
    with pytest.raises(UserError, match="backend 'triton' runs on cuda, the tensors are on cpu"):
        public._choose("attention", "triton", query("cpu", 64, torch.float32))


def test_values_and_gradients_interpreted(run_interpreted):
    run_interpreted("stickbreaking_interpreted.py")


# Relative error (2-norm) of values and of gradients; float32 multiplies as three products of tf32.
LIMITS = {torch.float32: (1e-5, 5e-5), torch.bfloat16: (8e-3, 1e-2), torch.float16: (1e-3, 2e-3)}


def on_gpu(B, H, G, T, S, C, dtype, spread=1.0):
    generator = torch.Generator("cuda").manual_seed(T + S + C)
    shapes = (B, H, T, C), (B, G, S, C), (B, G, S, C), (B, H, T, C)
    q, k, v, grad = (torch.randn(shape, generator=generator, device="cuda").to(dtype) for shape in shapes)
    return q, k, v, grad, spread * C**-0.5


def outputs_and_gradients(q, k, v, grad, scale, **options):
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    o, log_rem = stickbreaking_attention(*leaves, scale=scale, return_log_rem=True, **options)
    grads = torch.autograd.grad((o, log_rem), leaves, (grad, torch.ones_like(log_rem)))
    return [o.detach(), log_rem.detach(), *grads]


def compare(q, k, v, grad, scale, **options):
    got = outputs_and_gradients(q, k, v, grad, scale, backend="triton", **options)
    wide = [x.double() for x in (q, k, v, grad)]
    want = outputs_and_gradients(*wide, scale, backend="naive", **options)
    value_limit, grad_limit = LIMITS[q.dtype]
    for name, a, b in zip(("o", "log_rem", "dq", "dk", "dv"), got, want, strict=True):
        error = float((a.double() - b).norm() / b.norm().clamp_min(1e-30))
        assert error < (value_limit if name in ("o", "log_rem") else grad_limit), (name, error)
    return got


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize(
    ("B", "H", "G", "T", "S", "C"),
    [
        (1, 1, 1, 1, 1, 3),
        (2, 2, 2, 256, 256, 64),
        (1, 6, 2, 333, 777, 64),
        (1, 4, 2, 129, 300, 128),
        (1, 2, 1, 200, 200, 192),
        (1, 2, 2, 65, 130, 256),
    ],
)
@pytest.mark.parametrize("limited", [False, True])
def test_values_and_gradients_on_a_gpu(B, H, G, T, S, C, dtype, limited):
    start = torch.randint(0, S, (B, T), device="cuda") if limited else None
    mask = torch.rand(B, S, device="cuda") > 0.3 if limited else None
    arguments = on_gpu(B, H, G, T, S, C, dtype)
    first = compare(*arguments, start_BT=start, key_mask_BS=mask)
    again = outputs_and_gradients(*arguments, start_BT=start, key_mask_BS=mask, backend="triton")
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.gpu
def test_documents_rounds_and_queries_behind_all_keys_on_a_gpu(monkeypatch):
    arguments = on_gpu(2, 4, 2, 500, 500, 64, torch.bfloat16)
    lengths = torch.tensor([0, 0, 300, 301, 500, 500, 1000], device="cuda")
    compare(*arguments, start_BT=document_starts(lengths, 2, 500))
    compare(*on_gpu(1, 2, 1, 300, 100, 64, torch.bfloat16), causal=False)
    monkeypatch.setattr(kernels, "CARRY_BYTES", 1 << 16)
    compare(*arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_exhausted_sticks_end_the_walk_on_a_gpu(dtype):
    q, k, v, grad, scale = on_gpu(1, 2, 1, 128, 4096, 64, dtype)
    want = outputs_and_gradients(q.double(), k.double(), v.double(), grad.double(), scale, backend="naive")
    k[:, :, :1024], v[:, :, :1024] = math.nan, math.nan  # at z = 1/2 a stick lasts a few dozen keys
    leaves = [x.requires_grad_() for x in (q, k, v)]
    o = stickbreaking_attention(*leaves, scale=scale, backend="triton")
    got = [o.detach(), *torch.autograd.grad(o, leaves, grad)]
    assert all(torch.isfinite(x).all() for x in got)
    assert float((got[0].double() - want[0]).norm() / want[0].norm()) < LIMITS[dtype][0]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize(("H", "G", "S", "C"), [(2, 1, 1, 64), (8, 4, 5000, 64), (2, 2, 700, 256)])
def test_decoding_on_a_gpu(H, G, S, C, dtype):
    q, k, v, _, scale = on_gpu(2, H, G, 1, S, C, dtype)
    got = stickbreaking_decode(q[:, :, 0], k, v, backend="triton")
    want = naive.decode(q[:, :, 0].double(), k.double(), v.double(), scale)
    assert float((got.double() - want).norm() / want.norm()) < LIMITS[dtype][0]


@pytest.mark.gpu
def test_compiled_graphs_and_the_automatic_choice_on_a_gpu():
    q, k, v, grad, _ = on_gpu(1, 4, 2, 256, 256, 64, torch.bfloat16)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    eager = stickbreaking_attention(*leaves)
    o = torch.compile(lambda *x: stickbreaking_attention(*x), fullgraph=True)(*leaves)
    found, expected = (torch.autograd.grad(x, leaves, grad) for x in (o, eager))
    assert torch.equal(o, eager) and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert torch.equal(eager, stickbreaking_attention(*leaves, backend="triton"))

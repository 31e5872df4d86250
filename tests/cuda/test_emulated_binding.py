"""The binding to torch, on CPU tensors around the emulated kernels: arguments, types, strides, refusals."""

import math
import os
import subprocess
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths

from megamf.ops.permutation import naive as rows
from megamf.ops.stickbreaking import cuda, naive

SOURCES = Path(__file__).parents[2] / "csrc" / "cuda"
NAMES = (
    *("stickbreaking_scan", "stickbreaking_scan_backward", "stickbreaking_rows", "stickbreaking_rows_backward"),
    *("stickbreaking_decode_parts", "sort_by_expert", "permute", "unpermute", "unpermute_backward"),
)


@pytest.fixture(scope="module")
def ops(emulated_library):
    library = torch.library.Library("megamf_emulated", "FRAGMENT")
    for name in NAMES:
        schema = str(getattr(torch.ops.megamf, name).default._schema)
        library.define(schema.removeprefix("megamf::"))
    kernels, binding = emulated_library.path, emulated_library.path.with_name("libbinding.so")
    torch_libraries = Path(torch.__file__).parent / "lib"
    folders = [*(f"-I{folder}" for folder in include_paths()), f"-I{SOURCES}", f"-I{Path(__file__).parent}"]
    flags = ["-std=c++17", "-Wall", "-Werror", "-shared", "-fPIC", "-DMEGAMF_EMULATE", *folders]
    links = [str(kernels), f"-L{torch_libraries}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{kernels.parent}"]
    command = ["g++", *flags, str(SOURCES / "binding.cpp"), *links, "-o", str(binding)]
    subprocess.run(command, check=True, timeout=300, env=os.environ)
    torch.ops.load_library(str(binding))
    yield torch.ops.megamf_emulated
    library._destroy()


def close(a: torch.Tensor, b: torch.Tensor, limit: float = 5e-6) -> bool:
    a, b = a.detach(), b.detach()
    return bool(torch.isfinite(a).all()) and float((a.double() - b).norm()) <= limit * float(b.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_scan(ops, dtype: torch.dtype) -> None:
    logits, start = torch.randn(2, 9, 3, 5).transpose(1, 2).to(dtype), torch.randint(0, 10, (2, 3, 5))
    logits, start = logits.transpose(2, 3), start
    wide = logits.double().requires_grad_()
    want, grad = naive.scan(wide, start), torch.randn(logits.shape).to(dtype)
    limit = {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}[dtype]
    for typed in (start, start.int()):
        assert close(ops.stickbreaking_scan(logits, typed), want, limit)
    (want_grad,) = torch.autograd.grad(want, wide, grad.double())
    assert close(ops.stickbreaking_scan_backward(grad, logits, start), want_grad, limit)


@pytest.mark.parametrize("G", [1, 2])
def test_attention_and_decoding(ops, G: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: the Python code around the operations, with strides of a batch in a larger cache."""
    monkeypatch.setattr(torch.ops, "megamf", ops)
    B, T, S, C = 2, 9, 14, 12
    q, grad = (torch.randn(B, T, 4, C).transpose(1, 2) for _ in range(2))
    k, v = (torch.randn(B, G, S + 3, C)[:, :, :S] for _ in range(2))
    start, mask, grad_rest = torch.randint(0, S + 1, (B, T)), torch.rand(B, S) > 0.3, torch.randn(B, 4, T)
    for causal in (True, False):
        leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
        want = naive.attention_and_rest(*leaves, 0.3, start, mask, causal=causal)
        grads = torch.autograd.grad(want, leaves, [grad.double(), grad_rest.double()])
        options = {"causal": causal, "cells": 100}
        got = cuda.attention(q, k, v, start, mask, 0.3, 0.0, **options)
        back = cuda.attention_backward(grad, q, k, v, start, mask, 0.3, 0.0, grad_rest, **options)
        assert all(close(a, b) for a, b in zip((*got, *back), (*want, *grads), strict=True))
    want = naive.decode(q[:, :, 0].double(), k.double(), v.double(), 0.3, start[:, 3], mask)
    assert close(cuda.decode(q[:, :, 0], k, v, start[:, 3], mask, 0.3, 1e-10), want)


def test_large_heads_decode_through_the_products(ops, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops, "megamf", ops)
    q, k = torch.randn(1, 2, 2056), torch.randn(1, 1, 5, 2056)
    want = naive.decode(q.double(), k.double(), k.double(), 0.01, torch.tensor([2]))
    assert close(cuda.decode(q, k, k, torch.tensor([2]), None, 0.01, 0.0), want)


@pytest.mark.parametrize("gate_dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_permutation(ops, gate_dtype: torch.dtype) -> None:
    N, K, E, D = 20, 3, 5, 24
    expert, x = torch.randint(0, E, (N, K)), torch.randn(D, N).T
    order, inverse, count = ops.sort_by_expert(expert, E)
    assert all(torch.equal(a, b) for a, b in zip((order, inverse, count), rows.sort_by_expert(expert, E), strict=True))
    assert torch.equal(ops.permute(x, order, inverse, K), rows.permute(x, order, K))
    y, gate, grad = torch.randn(N * K, D), torch.rand(N, K).to(gate_dtype), torch.randn(D, N).T
    leaves = [t.double().requires_grad_() for t in (y, gate)]
    want = rows.unpermute(leaves[0], inverse, leaves[1])
    assert close(ops.unpermute(y, order, inverse, gate, K), want)
    grads = torch.autograd.grad(want, leaves, grad.double())
    got = ops.unpermute_backward(grad, y, order, gate)
    assert got[1].dtype == gate_dtype and close(got[0], grads[0]) and close(got[1], grads[1], 4e-3)
    ones = rows.unpermute(y.double(), inverse, torch.ones(N, K))
    assert close(ops.unpermute(y, order, inverse, None, K), ones)


def test_what_does_not_fit_is_refused(ops) -> None:
    x, index = torch.randn(4, 8), torch.arange(4)
    with pytest.raises(RuntimeError, match="order_R"):
        ops.permute(x, index.int(), index, 1)
    with pytest.raises(RuntimeError, match="gate"):
        ops.unpermute(x, index, index, torch.ones(3, 1), 1)
    with pytest.raises(RuntimeError, match="expected float32"):
        ops.stickbreaking_scan(torch.zeros(2, 2, dtype=torch.int32), None)
    with pytest.raises(RuntimeError, match="T <= S"):
        ops.stickbreaking_scan(torch.zeros(3, 2), None)
    with pytest.raises(RuntimeError, match="num_experts"):
        ops.sort_by_expert(index[:, None], 20000)
    with pytest.raises(RuntimeError, match="key mask"):
        ops.stickbreaking_decode_parts(
            x[None], x[None, None], x[None, None], None, torch.ones(2, 4).bool(), 1.0, -math.inf
        )

"""The grouped products in Triton: interpreted on odd shapes, and run on a GPU."""

from importlib.util import find_spec

import pytest
import torch

pytest.importorskip("triton")


def test_values_and_gradients_interpreted(run_interpreted):
    run_interpreted("grouped_linear_interpreted.py", "experts_interpreted.py")


@pytest.mark.skipif(
    not all(map(find_spec, ("megablocks", "stk"))),
    reason="needs `pip install --no-deps --no-build-isolation megablocks==0.10.0 stanford-stk==0.7.1`",
)
def test_megablocks_as_an_oracle(run_interpreted):
    run_interpreted("megablocks_interpreted.py")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("in_fan", "out_fan", "gated"), [(0, 0, False), (2, 0, False), (2, 1, False), (0, 2, True)])
def test_values_and_gradients_on_a_gpu(dtype, in_fan, out_fan, gated):
    from megamf.ops.grouped_linear import routed_linear

    generator = torch.Generator("cuda").manual_seed(0)
    N, K, E, D, F = 1000, 2, 8, 192, 384
    # The last expert gets nothing.
    expert = torch.randint(E - 1, (N * K,), device="cuda", generator=generator)
    order, count = expert.argsort(stable=True), torch.bincount(expert, minlength=E)

    def normal(*shape):
        return torch.randn(shape, device="cuda", generator=generator, dtype=torch.float32)

    x, w = normal(N * K // max(in_fan, 1), D), normal(E, D, F) / D**0.5
    inputs = [x.to(dtype), w.to(dtype)] + ([normal(N, K)] if gated else [])
    results = []
    for backend, dtypes in (("naive", torch.float64), ("triton", dtype)):
        leaves = [t.to(dtypes if i < 2 else t.dtype).detach().requires_grad_() for i, t in enumerate(inputs)]
        gate = leaves[2] if gated else None
        y = routed_linear(*leaves[:2], count, order, in_fan=in_fan, out_fan=out_fan, gate_NK=gate, backend=backend)
        grad = torch.linspace(-1, 1, y.numel(), device="cuda").view_as(y).to(y.dtype)
        results.append([y.detach(), *torch.autograd.grad(y, leaves, grad)])
    limit = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 2e-6}[dtype]
    for expected, found in zip(*results, strict=True):
        assert float((found.double() - expected).norm()) <= limit * float(expected.double().norm())

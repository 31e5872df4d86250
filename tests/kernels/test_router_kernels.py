"""The fused router in Triton: interpreted on odd shapes, and run on a GPU."""

import pytest
import torch

pytest.importorskip("triton")


def test_values_and_gradients_interpreted(run_interpreted):
    run_interpreted("router_interpreted.py")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_values_and_gradients_on_a_gpu(dtype):
    from megamf.ops.router import naive, route

    generator = torch.Generator("cuda").manual_seed(0)
    h = torch.randn(5000, 256, device="cuda", generator=generator).to(dtype)
    a = (0.1 * torch.randn(32, 256, device="cuda", generator=generator)).to(dtype)
    results = []
    for wide in (True, False):
        leaves = [(t.double() if wide else t.clone()).requires_grad_() for t in (h, a)]
        _, gate, prob, entropy, lse2, count = naive.route(*leaves, 2) if wide else route(*leaves, 2)
        total = (gate * torch.linspace(-1, 2, 10000, device="cuda").view_as(gate)).sum() + entropy + 0.1 * lse2
        total = total + (prob * torch.linspace(-1, 1, 32, device="cuda")).sum()
        results.append([count, gate, prob, entropy, lse2, *torch.autograd.grad(total, leaves)])
    for index, (expected, found) in enumerate(zip(*results, strict=True)):
        limit = 1e-2 if index >= 5 and dtype == torch.bfloat16 else 1e-5
        assert float((found.double() - expected).norm()) <= limit * float(expected.double().norm())

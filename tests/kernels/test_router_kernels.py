"""The fused router in Triton: compiled for the presets' shapes, interpreted on odd ones, and run on a GPU."""

import pytest
import torch

kernels = pytest.importorskip("megamf.kernels.router", reason="needs the package triton")

# (G, E, K): MLP and attention routers of the released models; a linear gate as wide as the model; the quickstart's.
SHAPES = [(256, 32, 2), (1024, 32, 2), (64, 8, 2)]
# A block of logits lives in registers: a spill means that TOKENS is too large.
SPILL_LIMIT = 0


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("kernel", ["_forward_kernel", "_logits_kernel", "_matrix_kernel"])
@pytest.mark.parametrize(("G", "E", "K"), SHAPES)
def test_kernels_compile_without_spills(compile_for, G, E, K, kernel, capability):
    function = getattr(kernels, kernel)
    types = {name: "*fp32" for name in function.arg_names if name.endswith("_ptr")}
    low = {"h_ptr", "a_ptr"} | ({"grad_h_ptr"} if kernel == "_logits_kernel" else set())
    types |= dict.fromkeys(low & types.keys(), "*bf16") | {"N": "i32", "tokens_a_part": "i32"}
    if "expert_ptr" in types:
        types["expert_ptr"] = "*i64"
    constants = {"G": G, "E": E, "K": K, "UPCAST": False, **kernels._blocks(G, E)}
    constants["PRECISION"] = "tf32" if kernel == "_forward_kernel" else "tf32x3"
    used = set(function.arg_names)
    found = compile_for(
        function,
        {name: kind for name, kind in types.items() if name in used},
        {name: value for name, value in constants.items() if name in used},
        capability,
        num_warps=4,
    )
    assert found.spills <= SPILL_LIMIT and found.shared <= 99 * 1024 and "mma" in found.ptx


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

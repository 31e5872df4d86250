"""The grouped products in Triton: compiled for the presets' shapes, interpreted on odd ones, and run on a GPU."""

from importlib.util import find_spec

import pytest
import torch

kernels = pytest.importorskip("megamf.kernels.grouped_linear", reason="needs the package triton")

# (D, F, L): the MLP experts of the released models and of the quickstart's.
SHAPES = [(1024, 2048, 32), (192, 384, 8)]
# No tile may need more registers than a thread has: a spill would sit in the inner loop.
SPILL_LIMIT = 0
TYPES = {"order_ptr": "*i64", "count_ptr": "*i64", "num_row_tiles": "i32"}
# (in_fan, out_fan, match_fan, gate): forward MLP in, forward MLP out, attention query, and dX of a gated output.
ROWS = {"gather": (2, 0, 0, False), "scatter": (0, 1, 0, True), "both": (2, 1, 0, False), "dx": (2, 0, 0, True)}
BASE = {"PRECISION": "ieee", "UPCAST": False, "order_ptr": None, "gate_ptr": None, "match_ptr": None, "dot_ptr": None}


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("mode", ROWS)
@pytest.mark.parametrize(("D", "F", "L"), SHAPES)
def test_rows_compile_without_spills(compile_for, D, F, L, mode, capability):
    in_fan, out_fan, match_fan, gated = ROWS[mode]
    transposed = mode == "dx"
    tiling = kernels.rows_tiling(torch.bfloat16, 65536, L, F)
    types = TYPES | dict.fromkeys(("x_ptr", "w_ptr", "y_ptr"), "*bf16")
    strides = {"stride_wl": D * F, "stride_wd": 1 if transposed else F, "stride_wf": D if transposed else 1}
    if gated:
        types["gate_ptr"] = "*fp32"
    if transposed:
        types |= {"match_ptr": "*bf16", "dot_ptr": "*fp32"}
    constants = {name: value for name, value in BASE.items() if name not in types and name in arguments("_rows_kernel")}
    constants |= strides | {
        "L": L, "D": D, "F": F, "IN_FAN": in_fan, "OUT_FAN": out_fan, "MATCH_FAN": match_fan, "HAS_GATE": gated,
        "HAS_MATCH": transposed, "BLOCK_M": tiling.m, "BLOCK_N": tiling.n, "BLOCK_K": tiling.k, "BLOCK_L": L,
        "GROUP_M": kernels.GROUP,
    }  # fmt: skip
    found = compile_for(
        kernels._rows_kernel, types, constants, capability, num_warps=tiling.num_warps, num_stages=tiling.num_stages
    )
    assert found.spills <= SPILL_LIMIT and found.shared <= 164 * 1024
    assert ("wgmma" in found.ptx) == (capability == 90) and "mma" in found.ptx


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("x_fan", "g_fan", "gated"), [(2, 0, False), (0, 2, True)])
@pytest.mark.parametrize(("D", "F", "L"), SHAPES)
def test_weight_gradients_compile_without_spills(compile_for, D, F, L, x_fan, g_fan, gated, capability):
    tiling = kernels.weights_tiling(torch.bfloat16, D, F)
    types = {"order_ptr": "*i64", "count_ptr": "*i64"} | dict.fromkeys(("x_ptr", "g_ptr", "dw_ptr"), "*bf16")
    if gated:
        types["gate_ptr"] = "*fp32"
    constants = {
        name: value for name, value in BASE.items() if name not in types and name in arguments("_weights_kernel")
    }
    constants |= {
        "L": L, "D": D, "F": F, "X_FAN": x_fan, "G_FAN": g_fan, "HAS_GATE": gated, "BLOCK_R": tiling.k,
        "BLOCK_D": tiling.m, "BLOCK_F": tiling.n, "BLOCK_L": L,
    }  # fmt: skip
    found = compile_for(
        kernels._weights_kernel, types, constants, capability, num_warps=tiling.num_warps, num_stages=tiling.num_stages
    )
    assert found.spills <= SPILL_LIMIT and found.shared <= 164 * 1024
    assert ("wgmma" in found.ptx) == (capability == 90) and "mma" in found.ptx


def arguments(name):
    return getattr(kernels, name).arg_names


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

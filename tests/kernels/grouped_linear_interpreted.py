"""Grouped products under Triton's interpreter against float64 sums over copies. Started by test_grouped_linear_kernels.

bfloat16 runs with operands raised to float32 (the interpreter multiplies raw bits of it) and is stored truncated.
"""

import pytest
import torch

from megamf.kernels import grouped_linear as kernels
from megamf.ops.grouped_linear import grouped_linear, routed_linear

LIMITS = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
LAYOUTS = [(0, 0, False), (2, 0, False), (2, 1, False), (1, 2, True), (0, 2, True), (2, 2, True), (0, 2, False)]
# Expert of every copy: mixed with an expert that has none, all on one expert, one token.
ROUTINGS = {
    "mixed": ([[0, 2], [4, 2], [2, 0], [0, 4], [4, 0], [2, 4], [1, 2], [2, 1], [0, 2]], 5),
    "one expert": ([[1, 1]] * 20, 3),
    "one token": ([[2, 0]], 4),
}


def tensors(routing, in_fan, dtype, D, F):
    generator = torch.Generator().manual_seed(0)
    expert_NK, L = torch.tensor(ROUTINGS[routing][0]), ROUTINGS[routing][1]
    order = expert_NK.flatten().argsort(stable=True)
    x = torch.randn(expert_NK.numel() // max(in_fan, 1), D, generator=generator).to(dtype)
    w = torch.randn(L, D, F, generator=generator).to(dtype)
    gate = torch.rand(expert_NK.shape, generator=generator)
    return expert_NK, order, torch.bincount(expert_NK.flatten(), minlength=L), x, w, gate


def oracle(x, w, gate, expert_NK, order, in_fan, out_fan):
    """One copy after the other, in float64."""
    K = expert_NK.shape[1]
    position = order.argsort().tolist()
    y = [None] * order.numel()
    for copy, expert in enumerate(expert_NK.flatten().tolist()):
        row = x[copy // in_fan] if in_fan else x[position[copy]]
        y[copy] = row @ w[expert] * (1.0 if gate is None else gate.flatten()[copy])
    if not out_fan:
        return torch.stack([y[copy] for copy in order.tolist()])
    return torch.stack(y) if out_fan == 1 else torch.stack(y).view(-1, K, w.shape[2]).sum(1)


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Memory that a kernel forgets to write shows as NaN."""
    plain = torch.Tensor.new_empty
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda self, *a, **k: plain(self, *a, **k).fill_(float("nan"))
        if (k.get("dtype") or self.dtype).is_floating_point else plain(self, *a, **k),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("routing", "dtype"),
    [("mixed", dtype) for dtype in LIMITS] + [(name, torch.float32) for name in ROUTINGS if name != "mixed"],
)
@pytest.mark.parametrize(("in_fan", "out_fan", "gated"), LAYOUTS)
def test_values_and_gradients(in_fan, out_fan, gated, routing, dtype):
    expert_NK, order, count, x, w, gate = tensors(routing, in_fan, dtype, 20, 35)
    results = []
    for wide in (True, False):
        leaves = [(t.double() if wide else t).requires_grad_() for t in [x, w] + [gate] * gated]
        used = leaves[2] if gated else None
        if wide:
            y = oracle(*leaves[:2], used, expert_NK, order, in_fan, out_fan)
        else:
            y = routed_linear(*leaves[:2], count, order, in_fan=in_fan, out_fan=out_fan, gate_NK=used)
        grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        results.append([y.detach(), *torch.autograd.grad(y, leaves, grad.to(y.dtype))])
    for expected, found in zip(*results, strict=True):
        assert torch.isfinite(found).all()
        assert float((found.double() - expected).norm()) <= LIMITS[dtype] * float(expected.norm()) + 1e-300


def test_naive_is_the_same_function():
    for in_fan, out_fan, gated in LAYOUTS:
        expert_NK, order, count, x, w, gate = tensors("mixed", in_fan, torch.float64, 4, 3)
        used = gate.double() if gated else None
        expected = oracle(x, w, used, expert_NK, order, in_fan, out_fan)
        found = routed_linear(x, w, count, order, in_fan=in_fan, out_fan=out_fan, gate_NK=used, backend="naive")
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("D", "F", "rows"), [(64, 128, 150), (192, 40, 33)])
def test_several_tiles_and_poisoned_neighbours(D, F, rows):
    """More than one tile a side; NaN rows of one expert stay its own."""
    count = torch.tensor([rows, 0, 7])
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(rows + 7, D, generator=generator), torch.randn(3, D, F, generator=generator)
    x[rows:] = float("nan")
    x, w = x.requires_grad_(), w.requires_grad_()
    y = grouped_linear(x, w, count, backend="triton")
    torch.testing.assert_close(y[:rows], x[:rows] @ w[0], rtol=1e-5, atol=1e-4)
    assert y[rows:].isnan().all()
    dx, dw = torch.autograd.grad(y[:rows].sum(), (x, w))
    torch.testing.assert_close(dw[0], x[:rows].sum(0)[:, None].expand(D, F), rtol=1e-5, atol=1e-4)
    assert (dw[1] == 0).all() and torch.isfinite(dx[:rows]).all()


def test_no_rows():
    x, w = torch.zeros(0, 8, requires_grad=True), torch.randn(3, 8, 5, requires_grad=True)
    y = grouped_linear(x, w, torch.zeros(3, dtype=torch.int64), backend="triton")
    dx, dw = torch.autograd.grad(y.sum(), (x, w))
    assert y.shape == (0, 5) and dx.shape == (0, 8) and (dw == 0).all()


def test_repeated_runs_are_equal():
    _, order, count, x, w, gate = tensors("mixed", 2, torch.float32, 20, 35)
    results = []
    for _ in range(2):
        leaves = [x.clone().requires_grad_(), w.clone().requires_grad_(), gate.clone().requires_grad_()]
        y = routed_linear(*leaves[:2], count, order, in_fan=2, out_fan=2, gate_NK=leaves[2])
        results.append([y.detach(), *torch.autograd.grad(y.square().sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_wrong_types_are_named():
    x, w, count = torch.zeros(2, 8).double(), torch.zeros(1, 8, 8).double(), torch.tensor([2])
    with pytest.raises(ValueError, match=r"'triton' got x torch.float64.*expected one of torch.bfloat16"):
        grouped_linear(x, w, count, backend="triton")


def test_registration():
    """Schema, fake kernels and autograd agree with the operators."""
    _, order, count, x, w, gate = tensors("mixed", 2, torch.float32, 4, 3)
    arguments = (x.requires_grad_(), w.requires_grad_(), count, order, gate.requires_grad_(), 2, 2)
    torch.library.opcheck(torch.ops.megamf.routed_linear.default, arguments)


def test_tall_tiles():
    tiling = kernels.rows_tiling(torch.bfloat16, 32768, 32, 2048)
    assert (tiling.m, tiling.n) == (128, 128)
    assert kernels.rows_tiling(torch.bfloat16, 2, 32, 2048).m == 16

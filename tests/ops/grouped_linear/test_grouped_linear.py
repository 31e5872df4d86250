"""Grouped products against one product an expert in float64."""

import logging

import pytest
import torch

from megamf.ops import backend as backends
from megamf.ops.grouped_linear import grouped_linear, implementation

LIMITS = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 6e-3}


def oracle(x: torch.Tensor, w: torch.Tensor, count: list[int], grad: torch.Tensor) -> list[torch.Tensor]:
    """[y, dx, dw] written out, in float64."""
    y = torch.zeros(x.shape[0], w.shape[2], dtype=torch.float64)
    dx, dw = torch.zeros_like(x, dtype=torch.float64), torch.zeros_like(w, dtype=torch.float64)
    begin = 0
    for e, n in enumerate(count):
        rows = slice(begin, begin + n)
        y[rows] = x[rows].double() @ w[e].double()
        dx[rows] = grad[rows].double() @ w[e].double().T
        dw[e] = x[rows].double().T @ grad[rows].double()
        begin += n
    return [y, dx, dw]


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("backend", ["auto", "torch", "loop"])
@pytest.mark.parametrize("count", [[3, 0, 5, 1], [0, 0, 0, 9], [9, 0, 0, 0], [0, 0, 0, 0], [40, 30, 20, 10], [6]])
@pytest.mark.parametrize(("D", "F"), [(16, 8), (7, 5), (64, 96), (1, 1)])
def test_values_and_gradients(D: int, F: int, count: list[int], backend: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(D + sum(count))
    R, L = sum(count), len(count)
    x, w, grad = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for shape in ((R, D), (L, D, F), (R, F))
    )
    x.requires_grad_()
    w.requires_grad_()
    y = grouped_linear(x, w, torch.tensor(count), backend=backend)
    got = [y.detach(), *torch.autograd.grad(y, (x, w), grad)]
    for a, b in zip(got, oracle(x.detach(), w.detach(), count, grad), strict=True):
        assert a.shape == b.shape and a.dtype == dtype and torch.isfinite(a).all()
        assert float((a.double() - b).norm()) <= LIMITS[dtype] * float(b.norm())


def test_transposed_operands() -> None:
    x, w = torch.randn(16, 6).T, torch.randn(3, 8, 16).mT
    count = torch.tensor([1, 2, 3])
    torch.testing.assert_close(grouped_linear(x, w, count), grouped_linear(x, w, count, backend="loop"))


def test_rule_of_the_loop_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    backends._logged.clear()
    x, w = torch.zeros(2, 8, dtype=torch.float64), torch.zeros(1, 8, 8, dtype=torch.float64)
    with caplog.at_level(logging.INFO, logger="megamf.ops.backend"):
        assert implementation(x, w) == implementation(x, w) == "loop"
        assert implementation(x.float(), w.float()) == implementation(x.bfloat16(), w.bfloat16(), "torch") == "torch"
        assert implementation(x.bfloat16()[:, :4], w.bfloat16()[:, :4]) == "loop"
        assert implementation(x.float(), w.float(), "loop") == "loop"
    loop = [r for r in caplog.records if "float64" in r.getMessage()]
    assert len(loop) == 1 and "loop over the experts" in loop[0].getMessage()


def test_wrong_arguments_are_named() -> None:
    x, w, count = torch.zeros(4, 8), torch.zeros(2, 8, 8), torch.tensor([1, 3])
    wrong = [
        ((x[:, :7], w, count), "expected"),
        ((x, w, count[:1]), "expected"),
        ((x, w.double(), count), "one dtype"),
        ((x, w, count.int()), "int64"),
        ((x, w, torch.tensor([1, 2])), "sum to 3"),
        ((x, w, torch.tensor([5, -1])), "smallest -1"),
    ]
    for args, message in wrong:
        with pytest.raises(ValueError, match=message):
            grouped_linear(*args)


def test_blocks_that_threads_share_out_have_the_same_bits_for_any_number_of_threads() -> None:
    x, w, count = torch.randn(900, 300), torch.randn(3, 300, 40), torch.tensor([700, 0, 200])
    grad = torch.randn(900, 40)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            leaves = [t.clone().requires_grad_() for t in (x, w)]
            y = grouped_linear(*leaves, count)
            results.append([y.detach(), *torch.autograd.grad(y, leaves, grad)])
    finally:
        torch.set_num_threads(before)
    for a, b in zip(results[0], oracle(x, w, count.tolist(), grad), strict=True):
        torch.testing.assert_close(a.double(), b, atol=1e-3, rtol=1e-4)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))

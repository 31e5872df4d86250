"""Which implementation runs, what is said when it cannot, and what MegaBlocks is asked for."""

import sys
from types import ModuleType

import pytest
import torch

from megamf.errors import UserError
from megamf.ops import backend
from megamf.ops import grouped_linear as ops
from megamf.ops.grouped_linear import grouped_linear, implementation, routed_linear

X, W, COUNT = torch.zeros(3, 8), torch.zeros(2, 8, 8), torch.tensor([1, 2])


def test_what_runs_where():
    assert implementation(X, W) == "torch" and implementation(X, W, "loop") == "loop"
    for name in ("triton", "megablocks"):
        with pytest.raises(UserError, match=rf"'{name}' (runs on cuda, the tensors are on cpu|needs the package)"):
            grouped_linear(X, W, COUNT, backend=name)
    with pytest.raises(UserError, match="'naive' does not exist; expected auto, torch, triton, megablocks, loop"):
        grouped_linear(X, W, COUNT, backend="naive")


@pytest.mark.parametrize(("name", "package"), [("triton", "triton"), ("megablocks", "megablocks")])
def test_missing_packages_are_named(monkeypatch, name, package):
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=rf"needs the package {package}, which is missing: install .*pip install"):
        grouped_linear(X, W, COUNT, backend=name)


def test_half_of_megablocks_is_not_enough(monkeypatch):
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None if name == "grouped_gemm" else name)
    assert "grouped_gemm" in backend.package_problem("megablocks")


@pytest.fixture
def megablocks(monkeypatch):
    """A stand-in for MegaBlocks' product, which takes rows, weights [L, D, F] and the counts on the CPU."""

    def gmm(a, b, batch_sizes, trans_b=False):
        assert not trans_b and batch_sizes.device.type == "cpu" and batch_sizes.dtype == torch.int64
        return torch.cat([x @ w for x, w in zip(a.split(batch_sizes.tolist()), b)])

    package, util = ModuleType("megablocks"), ModuleType("megablocks.grouped_gemm_util")
    package.grouped_gemm_util, util.ops = util, ModuleType("ops")
    util.ops.gmm = gmm
    monkeypatch.setitem(sys.modules, "megablocks", package)
    monkeypatch.setitem(sys.modules, "megablocks.grouped_gemm_util", util)
    monkeypatch.setattr(backend, "package_problem", lambda _: "")
    monkeypatch.setitem(ops.IMPLEMENTATIONS, "megablocks", frozenset({"cpu"}))
    yield
    del ops.megablocks, sys.modules["megamf.ops.grouped_linear.megablocks"]


def test_what_megablocks_is_asked_for(megablocks):
    x, w = torch.randn(3, 8).bfloat16(), torch.randn(2, 8, 8).bfloat16()
    expected = grouped_linear(x, w, COUNT, backend="loop")
    assert torch.equal(grouped_linear(x, w, COUNT, backend="megablocks"), expected)
    with pytest.raises(ValueError, match=r"'megablocks' got x torch.float32 .*expected one of torch.bfloat16"):
        grouped_linear(X, W, COUNT, backend="megablocks")


def test_what_routed_linear_refuses():
    order = torch.arange(4)
    for options, message in [
        ({"in_fan": 2, "out_fan": 0}, r"got x \(3, 8\).*in_fan 2"),
        ({"in_fan": 0, "out_fan": 0}, r"order \(4,\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            routed_linear(X, W, COUNT, order, **options)
    with pytest.raises(ValueError, match=r"got gates \(3, 1\), expected \[4 / out_fan, 2\]"):
        routed_linear(X[:2], W, COUNT, order, in_fan=2, out_fan=2, gate_NK=torch.zeros(3, 1))

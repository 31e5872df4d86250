"""An expert layer against MegaBlocks' own dropless MoE with the same weights, its Triton kernels interpreted.

MegaBlocks is built for GPUs: its compiled index operations are written out here, its kernels keep one tuning each, and
its check of Triton's version is answered. Started by test_grouped_linear_kernels.
"""

import sys
from types import ModuleType

import pytest
import torch
import triton
from triton.runtime import autotuner

from megamf.config import ModelConfig
from megamf.model.backends import Backends
from megamf.model.dispatch import LocalDispatcher
from megamf.model.mlp import ExpertMlp


def index_operations() -> ModuleType:
    """The module `megablocks_ops`, in plain torch."""

    def histogram(x, bins):
        return torch.bincount(x.long().flatten(), minlength=int(bins))[: int(bins)].to(torch.int32)

    def sort(x, _end_bit, values, indices):
        v, i = torch.sort(x, stable=True)
        values.copy_(v)
        indices.copy_(i)

    def exclusive_cumsum(x, dim, out):
        out.copy_(x.cumsum(dim) - x)

    def inclusive_cumsum(x, dim, out):
        out.copy_(x.cumsum(dim))

    def indices(padded_bins, block, _rows, columns, out):
        found, begin = [], 0
        for expert, end in enumerate(padded_bins.tolist()):
            found += list(range(expert * columns, (expert + 1) * columns)) * ((end - begin) // block)
            begin = end
        out.copy_(torch.tensor(found, dtype=out.dtype))

    module = ModuleType("megablocks_ops")
    module.__dict__.update(
        histogram=histogram, sort=sort, exclusive_cumsum=exclusive_cumsum, inclusive_cumsum=inclusive_cumsum,
        indices=indices,
    )  # fmt: skip
    return module


@pytest.fixture
def dropless_moe(monkeypatch):
    monkeypatch.setitem(sys.modules, "megablocks_ops", index_operations())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(triton, "__version__", "3.1.0")
    plain = autotuner.Autotuner.__init__

    def one_tuning(self, fn, arg_names, configs, *args, **kwargs):
        plain(self, fn, arg_names, configs[:1], *args, **kwargs)

    monkeypatch.setattr(autotuner.Autotuner, "__init__", one_tuning)
    arguments = pytest.importorskip("megablocks.layers.arguments")
    dmoe = pytest.importorskip("megablocks.layers.dmoe")

    def make(D, F, E, K):
        return dmoe.dMoE(
            arguments.Arguments(
                hidden_size=D, ffn_hidden_size=F, moe_num_experts=E, moe_top_k=K, moe_capacity_factor=0,
                mlp_impl="sparse", fp16=False, bf16=False, device=torch.device("cpu"), return_bias=False,
                init_method=torch.nn.init.normal_, output_layer_init_method=torch.nn.init.normal_,
            )
        )  # fmt: skip

    return make


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_layer_equals_megablocks(dropless_moe, backend):
    D, F, E, K = 128, 256, 4, 2
    config = ModelConfig(
        n_embd=D, ffd_hidden=F, n_mlp_experts=E, k_mlp=K, gate_type="linear", activation_function="gelu_new"
    )
    ours, theirs = ExpertMlp(config, LocalDispatcher(), Backends(experts=backend)), dropless_moe(D, F, E, K)
    generator = torch.Generator().manual_seed(0)
    mlp = theirs.experts.mlp
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        theirs.router.layer.weight.copy_(ours.gate.w_gate[-1].weight)
        mlp.w1.view(E, F, D).copy_(ours.experts.weight.mT)
        mlp.w2.view(E, F, D).copy_(ours.output_experts.weight)
    x_BTD = torch.randn(2, 16, D, generator=generator)
    grad = torch.randn(2, 16, D, generator=generator)
    results = []
    for layer, parameters in (
        (ours, [ours.gate.w_gate[-1].weight, ours.experts.weight, ours.output_experts.weight]),
        (theirs, [theirs.router.layer.weight, mlp.w1, mlp.w2]),
    ):
        x = x_BTD.clone().requires_grad_()
        y = layer(x)
        y = y[0] if isinstance(y, tuple) else y
        gate, w1, w2, dx = torch.autograd.grad(y, [*parameters, x], grad)
        w1 = w1 if layer is ours else w1.view(E, F, D).mT
        results.append([y.detach(), dx, gate, w1, w2.view(E, F, D)])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)

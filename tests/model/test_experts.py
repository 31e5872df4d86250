"""Expert layers under torch.compile, and backends by name."""

import pytest
import torch

from megamf.errors import UserError
from megamf.model.backends import Backends
from megamf.model.dispatch import LocalDispatcher
from megamf.model.mlp import ExpertMlp
from megamf.ops import backend


@pytest.mark.parametrize("experts", ["auto", "torch"])
def test_expert_layer_compiles_without_a_break(make_config, experts):
    """Values and gradients of the compiled graph; the compiler's own code generator is not what is tested."""
    layer = ExpertMlp(make_config(n_embd=16, ffd_hidden=32), LocalDispatcher(), Backends(experts=experts))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x_BTD = torch.randn(2, 5, 16, generator=generator)
    results = []
    for run in (layer, compiled):
        y_BTD, stats = run(x_BTD)
        loss = y_BTD.square().sum() + stats.entropy
        results.append([y_BTD.detach(), *torch.autograd.grad(loss, list(layer.parameters()))])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "package"), [("triton", "triton"), ("megablocks", "megablocks")])
def test_missing_package_is_named_before_anything_is_built(monkeypatch, name, package):
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=rf"experts.backend={name} needs the package {package}.*pip install"):
        Backends(experts=name)

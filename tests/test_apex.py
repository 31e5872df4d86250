"""NVIDIA apex is recognised by its modules, and its place is taken by stand-ins with the interface of the real ones."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

from megamf import apex
from megamf.config.run import Optim
from megamf.errors import UserError
from megamf.model.backends import Backends
from megamf.parallel.state import create_moments, optimizer_step
from megamf.parallel.zero import make_optimizer


class FusedLayerNorm(nn.LayerNorm):
    """apex's takes (shape, eps=)."""


class FusedAdam(torch.optim.Optimizer):
    """AdamW as apex's does it: updates are counted in the groups, moments are made when a tensor has none."""

    def __init__(self, params, lr, betas, eps, adam_w_mode=True, weight_decay=0.0):
        assert adam_w_mode
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            (b1, b2), t = group["betas"], group["step"]
            for p in group["params"]:
                if not self.state[p]:
                    self.state[p] = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
                m, v = self.state[p]["exp_avg"], self.state[p]["exp_avg_sq"]
                m.mul_(b1).add_(p.grad, alpha=1 - b1)
                v.mul_(b2).add_(p.grad**2, alpha=1 - b2)
                update = m / (1 - b1**t) / ((v / (1 - b2**t)).sqrt() + group["eps"])
                p.sub_(group["lr"] * (update + group["weight_decay"] * p))


@pytest.fixture
def nvidia(monkeypatch):
    for name, members in {
        "apex": {}, "apex.normalization": {"FusedLayerNorm": FusedLayerNorm}, "fused_layer_norm_cuda": {},
        "apex.optimizers": {"FusedAdam": FusedAdam}, "amp_C": {},
    }.items():  # fmt: skip
        module = ModuleType(name)
        module.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize(
    ("find", "key"), [("fused_layer_norm", "norm.backend"), ("fused_adam", "optim.implementation")]
)
def test_missing(find, key):
    with pytest.raises(UserError, match=rf"{key}=apex needs NVIDIA apex .*github.com/NVIDIA/apex.*PyPI is another"):
        getattr(apex, find)()
    with pytest.raises(UserError, match="NVIDIA apex"):
        Backends(norm="apex")


def test_the_other_package_named_apex_is_not_taken(monkeypatch):
    """It has no such modules, whatever else it has."""
    monkeypatch.setitem(sys.modules, "apex", ModuleType("apex"))
    with pytest.raises(UserError, match="another thing"):
        apex.fused_adam()


def test_layer_norm(nvidia):
    norm = Backends(norm="apex").layer_norm(8, 1e-3)
    assert type(norm) is FusedLayerNorm and norm.eps == 1e-3
    assert list(norm.state_dict()) == list(Backends().layer_norm(8, 1e-3).state_dict()) == ["weight", "bias"]


def test_updates_are_counted_and_equal_those_of_torch(nvidia):
    weights = []
    for implementation in ("torch", "apex"):
        p = nn.Parameter(torch.linspace(-1, 1, 6))
        optim = Optim(lr=0.1, implementation=implementation)
        optimizer = make_optimizer([{"params": [p], "weight_decay": 0.1}], optim)
        engine = SimpleNamespace(optimizer=optimizer, zero_optimization_stage=lambda: 0)
        create_moments(engine)
        assert optimizer_step(engine) == 0
        for _ in range(3):
            p.grad = p.detach() ** 2
            optimizer.step()
        assert optimizer_step(engine) == 3
        weights.append(p.detach())
    torch.testing.assert_close(*weights)

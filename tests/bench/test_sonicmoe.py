"""SonicMoE's layer is asked for by its own names, and what is wrong with it is said instead of measured."""

import sys
from enum import Enum
from types import ModuleType

import pytest
import torch
from torch import nn

from megamf.bench import sonicmoe
from megamf.config import ModelConfig

MODEL = ModelConfig(n_embd=16, att_hidden=16, ffd_hidden=96, n_mlp_experts=4, k_mlp=2)


class Activation(Enum):
    SWIGLU = "swiglu"


class MoE(nn.Module):
    """The constructor's and the call's signature of sonicmoe 0.1.2, around a plain product."""

    def __init__(
        self, num_experts, num_experts_per_tok, hidden_size, intermediate_size, activation_function, add_bias, std
    ):
        super().__init__()
        assert (num_experts, num_experts_per_tok, hidden_size, intermediate_size) == (4, 2, 16, 64)
        assert activation_function is Activation.SWIGLU and not add_bias and std > 0
        self.weight = nn.Parameter(torch.eye(hidden_size))

    def forward(self, hidden_states):
        return hidden_states @ self.weight, torch.zeros(())


@pytest.fixture
def installed(monkeypatch):
    package, enums = ModuleType("sonicmoe"), ModuleType("sonicmoe.enums")
    package.__spec__, package.MoE, enums.ActivationType = object(), MoE, Activation
    monkeypatch.setitem(sys.modules, "sonicmoe", package)
    monkeypatch.setitem(sys.modules, "sonicmoe.enums", enums)


def test_it_is_built_and_tried(installed):
    x = torch.randn(2, 3, 16, requires_grad=True)
    layer, problem = sonicmoe.layer(MODEL, "cpu", torch.float32, x)
    assert problem == "" and torch.equal(layer(x)[0], x)


def test_what_it_raises_is_the_reason(installed, monkeypatch):
    def fails(self, hidden_states):
        raise RuntimeError("no such GPU\nand more")

    monkeypatch.setattr(MoE, "forward", fails)
    x = torch.randn(2, 3, 16, requires_grad=True)
    assert sonicmoe.layer(MODEL, "cpu", torch.float32, x) == (
        None,
        "sonicmoe does not run here: RuntimeError: no such GPU",
    )


def test_missing(monkeypatch):
    monkeypatch.setattr(sonicmoe, "find_spec", lambda name: None)
    layer, problem = sonicmoe.layer(MODEL, "cpu", torch.float32, torch.empty(0))
    assert layer is None and "pip install sonic-moe" in problem


@pytest.mark.parametrize(("hidden", "expected"), [(2048, 1344), (96, 64), (1, 64)])
def test_the_width_of_the_same_flops(hidden, expected):
    assert sonicmoe.width(hidden) == expected

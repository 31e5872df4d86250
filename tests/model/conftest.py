"""Tiny models of every kind, and the portable file's form of each as an independent oracle."""

import pytest
import torch

from megamf.config import ModelConfig
from megamf.hf.configuration import to_public
from megamf.hf.portable.configuration_moduleformer import ModuleFormerConfig
from megamf.hf.portable.modeling_moduleformer import ModuleFormerForCausalLM
from megamf.model import ModuleFormer

TINY = {
    "vocab_size": 37, "n_layer": 2, "n_embd": 16, "n_head": 2, "att_hidden": 12, "ffd_hidden": 20,
    "n_att_experts": 4, "n_mlp_experts": 5, "k_att": 2, "k_mlp": 3, "gating_size": 6,
    "block_size": 8, "history_length": 8,
}  # fmt: skip
DENSE = {name: TINY[name] for name in ("vocab_size", "n_layer", "n_embd", "n_head", "att_hidden", "ffd_hidden")}
SHARED_KV = {"n_head": 1, "att_hidden": 16}


def tiny_config(**changes):
    if changes.get("kind") == "dense":
        return ModelConfig(**{**DENSE, **changes})
    return ModelConfig(**{**TINY, **changes})


def randomise(model, seed=0):
    """Weights large enough that routers decide and attention is far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 1.0 if ".ln_" in name and name.endswith("weight") else 0.0
            parameter.copy_(scale + 0.4 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture
def make_config():
    return tiny_config


@pytest.fixture
def make_model():
    def make(dtype=torch.float64, seed=0, **changes):
        return randomise(ModuleFormer(tiny_config(**changes)).to(dtype), seed).eval()

    return make


@pytest.fixture
def make_oracle():
    """The portable model with the weights of a given ModuleFormer."""

    def make(model, **changes):
        public = to_public(model.config) | {"aux_loss_weight": 0.01} | changes
        oracle = ModuleFormerForCausalLM(ModuleFormerConfig(**public)).to(model.lm_head.weight.dtype)
        oracle.load_state_dict(model.state_dict(), strict=True)
        return oracle.eval()

    return make


@pytest.fixture
def tokens():
    def make(batch, time, vocab=37, seed=0):
        return torch.randint(vocab, (batch, time), generator=torch.Generator().manual_seed(seed))

    return make

"""Tiny checkpoints, tokenizers and datasets."""

import pytest
import torch

from megamf.config import ModelConfig
from megamf.model import ModuleFormer

TINY = {
    "vocab_size": 300, "n_layer": 2, "n_embd": 16, "n_head": 1, "att_hidden": 16, "ffd_hidden": 20,
    "n_att_experts": 2, "n_mlp_experts": 3, "k_att": 1, "k_mlp": 2, "gating_size": 6,
    "block_size": 8, "history_length": 8,
}  # fmt: skip


def random_model(config, seed=0):
    model = ModuleFormer(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture
def model():
    """A float64 model in evaluation mode."""
    return random_model(ModelConfig(**TINY)).double().eval()


@pytest.fixture
def checkpoint(tmp_path, save_model):
    """(step directory, the model in it)."""

    def make(state=None, **changes):
        config = ModelConfig(**(changes if changes.get("kind") == "dense" else {**TINY, **changes}))
        model = random_model(config)
        return save_model(tmp_path / "run" / "checkpoints", model, 3, {"step": 3} | (state or {})), model

    return make

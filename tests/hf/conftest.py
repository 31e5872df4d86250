"""Tiny folders in the public layout, written by safetensors itself and not by the code under test."""

import json

import pytest
import torch
from safetensors.torch import save_file

from megamf.config import ModelConfig
from megamf.hf.configuration import to_public
from megamf.hf.layout import public_shapes

TINY = {
    "vocab_size": 41, "n_layer": 2, "n_embd": 16, "n_head": 2, "att_hidden": 12, "ffd_hidden": 20,
    "n_att_experts": 4, "n_mlp_experts": 5, "k_att": 2, "k_mlp": 3, "gating_size": 6,
    "block_size": 5, "history_length": 8, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SHARED_KV = {"n_head": 1, "att_hidden": 16}


@pytest.fixture
def tiny():
    return lambda **changes: ModelConfig(**{**TINY, **changes})


@pytest.fixture
def random_weights():
    """Name -> tensor of the public layout, large enough that routers decide."""

    def make(config, dtype=torch.float32, seed=0):
        generator = torch.Generator().manual_seed(seed)
        weights = {}
        for name, shape in public_shapes(config).items():
            scale = 1.0 if ".ln_" in name and name.endswith("weight") else 0.0
            weights[name] = (scale + 0.4 * torch.randn(shape, generator=generator)).to(dtype)
        return weights

    return make


@pytest.fixture
def public_folder(tmp_path, tiny, random_weights):
    """A folder with config.json and model.safetensors."""

    def make(name="public", dtype=torch.float32, weights=None, aux_loss_weight=0.01, **changes):
        config = tiny(**changes)
        folder = tmp_path / name
        folder.mkdir()
        tree = to_public(config, aux_loss_weight=aux_loss_weight) | {"architectures": ["ModuleFormerForCausalLM"]}
        tree["torch_dtype"] = str(dtype).removeprefix("torch.")
        (folder / "config.json").write_text(json.dumps(tree))
        save_file(
            weights or random_weights(config, dtype), str(folder / "model.safetensors"), metadata={"format": "pt"}
        )
        return folder

    return make

"""Tiny checkpoints, tokenizers and datasets."""

import pytest
import torch

from megamf.checkpoint import module_table, save
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


@pytest.fixture(autouse=True)
def one_thread():
    """Threads that wait for each other take far longer than the work of tiny models."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def model():
    """A float64 model in evaluation mode."""
    return random_model(ModelConfig(**TINY)).double().eval()


@pytest.fixture
def checkpoint(tmp_path):
    """(step directory, the model in it)."""

    def make(state=None, **changes):
        config = ModelConfig(**(changes if changes.get("kind") == "dense" else {**TINY, **changes}))
        model = random_model(config)
        tensors = {}
        for key, value in model.state_dict().items():
            parts = {f".{e}": value[e] for e in range(len(value))} if value.dim() == 3 else {"": value}
            tensors |= {f"weights/{key}{suffix}": part for suffix, part in parts.items()}
        tree, modules = config.model_dump(mode="json"), []
        if config.kind == "dense":
            tree = {"kind": "dense", **config.model_dump(mode="json", exclude_unset=True)}
        else:
            modules = module_table(config.n_layer, config.n_att_experts, config.n_mlp_experts)
        step = save(
            tmp_path / "run" / "checkpoints", 3, tensors, {"step": 3} | (state or {}), modules, tree, run_id="r"
        )
        return step, model

    return make

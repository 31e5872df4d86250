"""A tiny model whose routers decide, its checkpoint with all groups, and tokenised data."""

import numpy as np
import pytest
import torch

from megamf.checkpoint import GROUPS, Checkpoint, full_name, module_table, save
from megamf.config import ModelConfig
from megamf.data.indexed import IndexedWriter, Metadata
from megamf.model import ModuleFormer

TINY = {
    "vocab_size": 50, "n_layer": 2, "n_embd": 16, "n_head": 1, "att_hidden": 16, "ffd_hidden": 20,
    "n_att_experts": 4, "n_mlp_experts": 5, "k_att": 2, "k_mlp": 2, "gating_size": 6,
    "block_size": 8, "history_length": 8,
}  # fmt: skip


def random_model(seed=0, **changes):
    model = ModuleFormer(ModelConfig(**{**TINY, **changes}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.fixture
def make_model():
    return random_model


@pytest.fixture
def make_checkpoint(tmp_path):
    """make(model, name) -> opened checkpoint of step 3 with weights and both moments; closed at the end."""
    opened = []

    def make(model, name="source", groups=("weights", "exp_avg", "exp_avg_sq")):
        config = model.config
        tensors = {}
        for number, group in enumerate(group for group in GROUPS if group in groups):
            for key, value in model.state_dict().items():
                value = value.float() * (1 if group == "weights" else 0.1 * number) ** 2
                parts = {f".{e}": value[e] for e in range(len(value))} if value.dim() == 3 else {"": value}
                tensors |= {full_name(f"{key}{suffix}", group): part.clone() for suffix, part in parts.items()}
        table = module_table(
            config.n_layer,
            config.n_att_experts_per_layer or config.n_att_experts,
            config.n_mlp_experts_per_layer or config.n_mlp_experts,
        )
        tree = config.model_dump(mode="json")
        state = {"step": 3, "config": {"model": tree, "train": {"seq_len": 12}}, "run_id": "before"}
        save(tmp_path / name, 3, tensors, state, table, tree, run_id="before")
        opened.append(Checkpoint(tmp_path / name))
        return opened[-1]

    yield make
    for checkpoint in opened:
        checkpoint.close()


@pytest.fixture
def make_data(tmp_path):
    def make(name="data", seed=0, low=0, high=50, documents=8):
        rng = np.random.default_rng(seed)
        rows = [rng.integers(low, high, size=rng.integers(2, 40)) for _ in range(documents)]
        with IndexedWriter(tmp_path / name, 50) as writer:
            for row in rows:
                writer.add_document(row)
            tokens = sum(map(len, rows))
            writer.commit(Metadata("words", "abc", 50, 0, True, documents, tokens, 3 * tokens))
        return str(tmp_path / name)

    return make

"""Initial weights: their distributions, and that no layout changes them."""

import torch

from megamf.model import ModuleFormer, expert_indices, initialise
from megamf.model.dispatch import LocalDispatcher


class Part(LocalDispatcher):
    """As on rank `rank` of two."""

    def __init__(self, rank):
        self.rank = rank

    def num_slots(self, num_experts):
        return num_experts // 2

    def expert_range(self, num_experts):
        return range(self.rank * num_experts // 2, (self.rank + 1) * num_experts // 2)


def weights(config, seed=0, dispatcher=None, dtype=torch.float32):
    model = ModuleFormer(config, dispatcher).to(dtype)
    initialise(model, config, seed)
    return model


def test_distributions(make_config):
    for gate_type in ("mlp", "linear", "gmm"):
        config = make_config(
            gate_type=gate_type, n_embd=64, att_hidden=48, ffd_hidden=96, vocab_size=300, gating_size=64
        )
        for name, value in weights(config).state_dict().items():
            if value.dim() == 3:
                bound = 1 / value.shape[1]
                assert value.abs().max() <= bound and value.abs().max() > 0.98 * bound, name
                assert abs(value.std() * 3**0.5 / bound - 1) < 0.05, name
            elif ".ln_" in name and name.endswith("weight"):
                assert (value == 1).all(), name
            elif name.endswith(("bias", "temperature")):
                assert (value == 0).all(), name
            else:
                std = 1.0 if name.endswith("expert_centroids") else 0.02
                assert abs(value.std() / std - 1) < 0.2, name


def test_every_layout_has_the_same_weights(make_config):
    config = make_config(n_mlp_experts=6)
    whole = weights(config).state_dict()
    halves = [weights(config, dispatcher=Part(rank)) for rank in range(2)]
    experts = expert_indices(halves[0])
    assert set(experts) == {name for name, value in whole.items() if value.dim() == 3}
    for name, value in whole.items():
        parts = [half.state_dict()[name] for half in halves]
        found = torch.cat(parts) if name in experts else parts[0]
        assert torch.equal(found, value), name


def test_seed_and_tensor_names_matter(make_config):
    config = make_config()
    one, again, other = (weights(config, seed).state_dict() for seed in (0, 0, 1))
    name = "transformer.h.0.mlpf.experts.weight"
    assert torch.equal(one[name], again[name]) and not torch.equal(one[name], other[name])
    assert not torch.equal(one[name], one["transformer.h.1.mlpf.experts.weight"])
    assert not torch.equal(one[name][0], one[name][1])


def test_low_precision_weights_are_the_rounded_ones(make_config):
    config = make_config()
    full, low = weights(config).state_dict(), weights(config, dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(low[name], value.bfloat16()) for name, value in full.items())


def test_dense_models_are_covered(make_config):
    config = make_config(kind="dense")
    model = weights(config)
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())
    assert not expert_indices(model)

"""Parameter and FLOP formulas against published sizes, the built model and a list of its matrix products."""

import pytest
import torch

from megamf.config import ModelConfig, load_config, preset_names
from megamf.model.moduleformer import ModuleFormer
from megamf.plan import count_parameters, mfu, train_flops_per_token


@pytest.mark.parametrize(
    ("preset", "total", "experts", "with_routers", "active"),
    [
        ("molm-350m-4b", 4_142_526_464, 302.0, 315.0, 366.5),
        ("molm-700m-4b", 4_142_526_464, 604.0, 617.0, 668.5),
        ("molm-700m-8b", 8_182_046_720, 604.0, 630.0, 681.5),
    ],
)
def test_released_models_have_their_published_sizes(preset, total, experts, with_routers, active):
    counts = count_parameters(load_config(preset=preset).model)
    assert counts.total == total
    assert round(counts.active_experts / 1e6, 1) == experts
    assert round((counts.active - counts.head) / 1e6, 1) == with_routers
    assert round(counts.active / 1e6, 1) == active


@pytest.mark.parametrize("preset", preset_names())
def test_total_is_that_of_the_built_model(preset):
    model = load_config(preset=preset).model
    with torch.device("meta"):
        built = ModuleFormer(model)
    assert count_parameters(model).total == sum(p.numel() for p in built.parameters())


@pytest.mark.parametrize("gate_type", ["mlp", "linear", "gmm", "tanh"])
@pytest.mark.parametrize("heads", [1, 4])
def test_every_gate_and_projection_is_counted(gate_type, heads):
    model = ModelConfig(
        vocab_size=50, n_layer=3, n_embd=32, n_head=heads, att_hidden=32, ffd_hidden=24, n_att_experts=4,
        n_mlp_experts=6, k_att=2, k_mlp=3, gate_type=gate_type, gating_size=8,
    )  # fmt: skip
    with torch.device("meta"):
        built = ModuleFormer(model)
    parameters = dict(built.named_parameters())
    counts = count_parameters(model)
    assert counts.total == sum(p.numel() for p in parameters.values())
    matrices = {n: p for n, p in parameters.items() if p.dim() >= 2 and "wte" not in n}
    share = {"attn.q_proj": 2 / 4, "mlpf": 3 / 6}
    active = 0.0
    for name, parameter in matrices.items():
        kind = next((k for k in share if k in name and "experts.weight" in name), None)
        active += parameter.numel() * (share[kind] if kind else 1)
    assert counts.active_matmul == active


def test_dense_baselines_hold_the_active_experts_of_their_partners():
    for dense, sparse in (("dense-350m", "molm-350m-4b"), ("nano-dense", "nano")):
        experts = count_parameters(load_config(preset=sparse).model).active_experts
        config = load_config(preset=dense).model
        counts = count_parameters(config)
        biases = config.n_layer * 2 * config.att_hidden
        assert counts.active_experts + counts.key_value - biases == experts
        large = load_config(preset=f"{dense}-4x").model
        grown = count_parameters(large)
        assert grown.active_experts + grown.key_value - large.n_layer * 2 * large.att_hidden == 4 * experts


def test_flops_are_those_of_the_listed_products():
    model = ModelConfig(
        vocab_size=97, n_layer=2, n_embd=16, n_head=2, att_hidden=8, ffd_hidden=12, n_att_experts=4,
        n_mlp_experts=5, k_att=2, k_mlp=3, gating_size=6,
    )  # fmt: skip
    T = 10
    products = [(16, 97)]  # one token times a matrix [in, out]
    for _ in range(2):
        products += [(16, 6), (6, 4), (16, 6), (6, 5)]  # routers
        products += [(16, 8), (8, 16)] * 2 + [(16, 8)] * 2  # queries and outputs of two experts, keys, values
        products += [(16, 12), (12, 16)] * 3
    linear = T * sum(2 * a * b for a, b in products)
    # One query of head width 4: scores with, and a weighted sum of, the t + 1 keys up to its own position.
    attention = sum(2 * (2 * 4 * (t + 1)) for t in range(T)) * 2 * 2 * 2
    assert T * train_flops_per_token(model, T) == 3 * (linear + attention)


def test_dense_flops_count_every_weight_once():
    model = ModelConfig(kind="dense", vocab_size=50, n_layer=2, n_embd=16, n_head=2, att_hidden=16, ffd_hidden=64)
    weights = 2 * (4 * 16 * 16 + 2 * 16 * 64) + 50 * 16
    assert train_flops_per_token(model, 7) == 6 * weights + 6 * 2 * 16 * 8


def test_mfu():
    assert mfu(1000.0, 2e9, 4e12) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="must be positive, not 0"):
        mfu(1.0, 1.0, 0)


@pytest.mark.parametrize(
    ("layers", "width", "heads", "vocab", "total"),
    [
        (6, 512, 8, 50304, 70_426_624),
        (12, 768, 12, 50304, 162_322_944),
        (24, 1024, 16, 50304, 405_334_016),
        (16, 2048, 8, 50304, 1_011_781_632),
        (24, 2048, 16, 50304, 1_414_647_808),
        (32, 2560, 32, 50304, 2_775_208_960),
    ],
)
def test_pythia_models_have_their_published_sizes(layers, width, heads, vocab, total):
    model = ModelConfig(
        kind="gpt_neox", vocab_size=vocab, n_layer=layers, n_embd=width, n_head=heads, att_hidden=width,
        ffd_hidden=4 * width, parallel_residual=True, rotary_fraction=0.25, rotary_base=10000,
    )  # fmt: skip
    counts = count_parameters(model)
    assert counts.total == total
    with torch.device("meta"):
        built = ModuleFormer(model)
    parameters = dict(built.named_parameters())
    assert sum(p.numel() for p in parameters.values()) == total
    assert counts.active_matmul == sum(p.numel() for n, p in parameters.items() if p.dim() == 2 and "wte" not in n)
    assert counts.active == total - vocab * width
    # Products of all queries with the keys up to them, and of the weights with the values: as wide as the model.
    assert train_flops_per_token(model, 99) == 6 * counts.active_matmul + 6 * layers * width * 100

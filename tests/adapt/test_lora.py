"""Adapters in a model: nothing changes at first, gradients are those of W + s A B, and nothing else has one."""

import copy
import functools

import pytest
import torch

from megamf.adapt import lora
from megamf.adapt.lora import adapter_shapes, attach, scaling, targets
from megamf.config import ModelConfig
from megamf.config.run import Tune
from megamf.model import ModuleFormer, experts, initialise
from megamf.model.objective import Objective
from megamf.model.tuning import logical_parts, specialise
from megamf.ops.grouped_linear import routed_linear
from megamf.parallel.state import global_shapes

SIZES = {"vocab_size": 61, "n_layer": 2, "n_embd": 16, "ffd_hidden": 20, "bos_token_id": None, "eos_token_id": 0}
SPARSE = {"n_att_experts": 4, "n_mlp_experts": 5, "n_mlp_experts_per_layer": [5, 3], "gating_size": 8}
MODELS = {
    "shared keys": SIZES | SPARSE | {"n_head": 1, "att_hidden": 16},
    "projected keys": SIZES | SPARSE | {"n_head": 2, "att_hidden": 12},
    "gpt_neox": SIZES
    | {"kind": "gpt_neox", "n_head": 2, "att_hidden": 16, "parallel_residual": True}
    | {"rotary_fraction": 0.5, "rotary_base": 100.0},
    "dense": SIZES | {"kind": "dense", "n_head": 2, "att_hidden": 12},
}


def make_model(name: str) -> ModuleFormer:
    config = ModelConfig(**MODELS[name])
    model = ModuleFormer(config)
    initialise(model, config, 0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return model.double()


def adapted(model: ModuleFormer, tune: Tune, *, moved: bool) -> ModuleFormer:
    """A copy with adapters; moved: B is not zero."""
    model = copy.deepcopy(model)
    specialise(model, tune, {})
    attach(model, tune, seed=3)
    generator = torch.Generator().manual_seed(2)
    if moved:
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.detach().copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def logical(model: ModuleFormer) -> dict[str, torch.Tensor]:
    parts = logical_parts(model)
    return {parts[name].key: parameter for name, parameter in model.named_parameters()}


def loss_of(model: ModuleFormer) -> torch.Tensor:
    input_BT = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(4))
    loss, sums, _ = Objective(model, 64)(input_BT, input_BT.roll(-1, 1), None)
    return loss if sums is None else loss + sums.entropy_M.sum()


@pytest.mark.parametrize("name", MODELS)
def test_outputs_stay_as_they_are_at_first(name):
    model = make_model(name)
    tuned = adapted(model, Tune(strategy="lora", lora_rank=3), moved=False)
    assert torch.equal(loss_of(tuned), loss_of(model))
    again = adapted(model, Tune(strategy="lora", lora_rank=3), moved=False)
    assert all(torch.equal(value, logical(again)[key]) for key, value in logical(tuned).items())
    drawn = [value for key, value in logical(tuned).items() if key.endswith("lora_A")]
    assert all(value.unique().numel() == value.numel() for value in drawn)


@pytest.mark.parametrize("chosen", ["attention", "mlp", "all"])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_the_sum(name, chosen):
    model = make_model(name).train()
    tune = Tune(strategy="lora", lora_rank=3, lora_alpha=5.0, lora_targets=chosen, embeddings=chosen == "mlp")
    tuned = adapted(model, tune, moved=True).train()
    loss = loss_of(tuned)
    loss.backward()
    found = logical(tuned)

    pairs = {key: value.detach().requires_grad_() for key, value in found.items() if "lora_" in key}
    whole = {}
    for key, value in model.named_parameters():
        prefix = key.removesuffix(".weight")
        value = value.detach()
        if f"{prefix}.lora_A" in pairs:
            a, b = pairs[f"{prefix}.lora_A"], pairs[f"{prefix}.lora_B"]
            value = value + scaling(tune) * (a @ b if value.dim() == 3 else b @ a)
        whole[key] = (
            value.requires_grad_() if not value.requires_grad and key.endswith(("wte.weight", "head.weight")) else value
        )

    class Called(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inside = [model]

        def forward(self, input_BT, **options):
            output = torch.func.functional_call(model, whole, (input_BT,), options)
            return output

        @property
        def lm_head(self):
            return lambda hidden, label, chunk: torch.func.functional_call(
                model.lm_head, {"weight": whole["lm_head.weight"]}, (hidden, label, chunk)
            )

    expected = loss_of(Called())
    expected.backward()
    assert abs(loss.item() - expected.item()) <= 1e-10 * abs(expected.item())
    for key, value in found.items():
        wanted = pairs[key].grad if key in pairs else None
        if tune.embeddings and key in ("transformer.wte.weight", "lm_head.weight"):
            wanted = whole[key].grad
        assert (value.grad is None) == (wanted is None) == (not value.requires_grad), key
        if wanted is not None:
            assert (value.grad - wanted).norm() <= 1e-10 * wanted.norm(), key
            assert wanted.norm() > 0


@pytest.mark.parametrize("chosen", ["attention", "mlp", "all"])
@pytest.mark.parametrize("name", MODELS)
def test_shapes_by_formula_are_those_of_the_model(name, chosen):
    tune = Tune(strategy="lora", lora_rank=3, lora_targets=chosen)
    model = make_model(name)
    shapes = global_shapes(adapted(model, tune, moved=False))
    base = global_shapes(model)
    assert {key: shape for key, shape in shapes.items() if key not in base} == adapter_shapes(model.config, tune)
    assert {key: shapes[key] for key in base} == base
    assert len(list(targets(model.config, chosen))) == len(adapter_shapes(model.config, tune)) // 2


def test_no_adapters_unless_asked_for():
    model = make_model("dense")
    names = [name for name, _ in model.named_parameters()]
    attach(model, Tune(), 0)
    assert [name for name, _ in model.named_parameters()] == names


def test_adapters_inside_fused_products(monkeypatch):
    """Where tokens are gathered and scattered inside of products, adapters add the same."""
    tuned = adapted(make_model("shared keys"), Tune(strategy="lora", lora_rank=3), moved=True).train()
    loss_of(tuned).backward()
    expected = {name: parameter.grad for name, parameter in tuned.named_parameters() if parameter.requires_grad}
    tuned.zero_grad()
    for module in (lora, experts):
        monkeypatch.setattr(module, "routed_linear", functools.partial(routed_linear, backend="naive"))
    monkeypatch.setattr(experts.RoutedExperts, "fuses", lambda *_: True)
    loss_of(tuned).backward()
    for name, parameter in tuned.named_parameters():
        if parameter.requires_grad:
            assert (parameter.grad - expected[name]).norm() <= 1e-9 * expected[name].norm(), name

"""ReLU in the place of another activation, and calibration with the routers fixed."""

import copy

import pytest
import torch

from megamf.compress.moefication import (
    Choices,
    calibrate,
    calibrate_layer,
    capture_inputs,
    convert,
    dense_layers,
    relufy,
    sparse_layers,
)
from megamf.compress.moefication.training import RIDGES
from megamf.errors import UserError


def learnable():
    """Counting up by one: a little model learns it."""
    start = torch.randint(3, 30, (16, 1), generator=torch.Generator().manual_seed(0))
    return start + torch.arange(12)


@pytest.mark.parametrize("form", ["llama", "t5-gated", "bert"])
def test_relufied_models_learn(make_model, form):
    model = make_model(form, torch.float32)
    losses = relufy(model, dense_layers(model), learnable(), 12, lr=3e-3, batch=8)
    assert {layer.activation for layer in dense_layers(model)} == {"relu"}
    assert losses[-1] < 0.9 * losses[0]
    assert model.config.to_dict().get("hidden_act", "relu") == "relu"
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(UserError, match="in 0 steps"):
        relufy(model, dense_layers(model), learnable(), 0)


@pytest.mark.parametrize("what", ["out", "ffn", "all"])
def test_calibration_trains_what_was_asked_for(make_model, what):
    model = make_model("opt", torch.float32)
    layers = dense_layers(model)
    inputs = capture_inputs(model, layers, learnable(), 100)
    convert(model, layers, inputs, Choices(expert_size=8, share=0.5, split="random", epochs=1))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    losses = calibrate(model, learnable(), 10, what=what, lr=3e-3, batch=8)
    assert losses[-1] < losses[0]
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert not any(".router." in name for name in changed)
    outputs = {name for name in before if name.endswith(("out_EFO", "out_bias_O"))}
    if what == "out":
        assert changed == outputs
    else:
        assert outputs < changed and any("gate_EDF" in name for name in changed)
        assert ("model.decoder.embed_tokens.weight" in changed) == (what == "all")


def test_models_without_a_loss_need_a_teacher(make_model, windows):
    model = make_model("bert-relu", torch.float32)
    teacher = copy.deepcopy(model)
    layers = dense_layers(model)
    convert(model, layers, capture_inputs(model, layers, windows, 60), Choices(16, 0.5, "random", epochs=1))
    with pytest.raises(UserError, match="needs the dense model"):
        calibrate(model, windows, 2)
    losses = calibrate(model, windows, 12, teacher=teacher, lr=3e-3)
    assert losses[-1] < losses[0]


def test_fitting_a_layer_is_least_squares(make_model, windows):
    model = make_model("llama-relu")
    layers = dense_layers(model)
    inputs = capture_inputs(model, layers, windows, 96)
    convert(model, layers, inputs, Choices(16, 0.5, "random", epochs=1))
    layer, sparse, x_ND = layers[0], sparse_layers(model)[0], inputs[0].double()
    start = sparse.out_EFO.detach().clone()
    with torch.no_grad():
        wanted = layer.output(x_ND)
        error = (sparse.by_mask(x_ND) - wanted).square().mean().item() / wanted.var().item()
        before, after = calibrate_layer(sparse, layer, x_ND, ridge=1e-9)
        now = (sparse.by_mask(x_ND) - wanted).square().mean().item() / wanted.var().item()
    assert before == pytest.approx(error) and after == pytest.approx(now)
    assert after < 0.7 * before
    # Nowhere near is anything better: the optimum.
    generator = torch.Generator().manual_seed(0)
    fitted = sparse.out_EFO.detach().clone()
    for _ in range(5):
        sparse.out_EFO.data = fitted + 1e-3 * torch.randn(fitted.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            assert (sparse.by_mask(x_ND) - wanted).square().mean().item() / wanted.var().item() > after
    sparse.out_EFO.data = start.clone()
    calibrate_layer(sparse, layer, x_ND, ridge=1e9)
    assert torch.allclose(sparse.out_EFO, start, atol=1e-6)


def test_the_pull_is_chosen_on_tokens_that_were_not_fitted(make_model, windows):
    """With fewer tokens than neurons the weakest pull explains them all, and others worse than the weights did."""
    model = make_model("llama-relu")
    layers = dense_layers(model)
    inputs = capture_inputs(model, layers, windows, 96)
    convert(model, layers, inputs, Choices(16, 0.5, "random", epochs=1))
    layer, sparse = layers[0], sparse_layers(model)[0]
    start = sparse.out_EFO.detach().clone()
    generator = torch.Generator().manual_seed(0)
    few, other = (torch.randn(n, layer.gate_DM.shape[0], generator=generator, dtype=torch.float64) for n in (40, 400))

    def error(x_ND):
        with torch.no_grad():
            return (sparse.by_mask(x_ND) - layer.output(x_ND)).square().mean().item()

    errors = {}
    for ridge in (*RIDGES, None):
        sparse.out_EFO.data = start.clone()
        calibrate_layer(sparse, layer, few, ridge)
        errors[ridge] = error(other)
    best, worst = min(errors.values()), max(errors.values())
    assert errors[RIDGES[0]] == worst > 1.2 * best and errors[None] < best + 0.2 * (worst - best)

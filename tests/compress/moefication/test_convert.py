"""Whole models: all experts equal the dense model, fewer equal a brute-force choice, and what is refused."""

import copy

import pytest
import torch
from torch import nn

from megamf.compress.moefication import Choices, SparseFfn, capture_inputs, convert, dense_layers, sparse_layers
from megamf.compress.moefication.models import outputs
from megamf.compress.moefication.speed import accelerate
from megamf.errors import UserError

FORMS = ["llama", "llama-relu", "opt", "t5", "t5-gated", "bert-relu", "bert", "gpt2", "neox", "megamf"]


def converted(model, windows, **choices):
    layers = dense_layers(model)
    inputs = capture_inputs(model, layers, windows, 64)
    given = {"expert_size": 16, "by_magnitude": True, "epochs": 2} | choices
    about, reports = convert(model, layers, inputs, Choices(**given))
    return layers, inputs, about, reports


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_all_experts_are_the_dense_model(make_model, windows, form):
    dense = make_model(form)
    expected = outputs(dense, windows)
    for router in ("truth", "mlp", "similarity"):
        model = copy.deepcopy(dense)
        layers, inputs, _, _ = converted(model, windows, share=1.0, split="random", router=router)
        assert len(sparse_layers(model)) == len(layers) == (4 if form.startswith("t5") else 2)
        assert torch.allclose(outputs(model, windows), expected, rtol=1e-11, atol=1e-11)
        # Not only by the shortcut for all experts: every expert chosen one by one.
        for sparse, layer, x_ND in zip(sparse_layers(model), layers, inputs):
            x_ND = x_ND.double()
            expert_NK, _ = sparse.choose(sparse.scores(x_ND))
            assert torch.allclose(sparse.by_expert(x_ND, expert_NK, None), layer.output(x_ND), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("form", ["llama", "opt", "t5"])
@torch.no_grad()
def test_the_ground_truth_is_the_brute_force_choice(make_model, windows, form):
    model = make_model(form)
    layers, inputs, about, _ = converted(model, windows, share=0.5, split="clustering", router="truth")
    for sparse, layer, x_ND in zip(sparse_layers(model), layers, inputs):
        x_ND = x_ND[:8].double()
        h_NM, y_NO = layer.hidden(x_ND), sparse(x_ND)
        # Neurons of each expert, found by comparing weights.
        columns = [[layer.gate_DM[:, m].tolist() for m in range(layer.num_neurons)].index(w.tolist())
                   for w in sparse.gate_EDF.transpose(1, 2).flatten(0, 1)]  # fmt: skip
        assert sorted(columns) == list(range(layer.num_neurons))
        experts = torch.tensor(columns).view(sparse.num_experts, -1)
        for h_M, y_O in zip(h_NM, y_NO):
            mass = sorted(((h_M[m].abs().sum().item(), e) for e, m in enumerate(experts)), reverse=True)
            kept = torch.cat([experts[e] for _, e in mass[: about["num_selected"]]])
            expected = h_M[kept] @ layer.out_MO[kept]
            expected = expected if layer.out_bias_O is None else expected + layer.out_bias_O
            assert torch.allclose(y_O, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("router", ["similarity", "mlp"])
@torch.no_grad()
def test_every_way_to_compute_gives_the_same(make_model, windows, router, weighted):
    for form in ("llama", "opt"):
        model = make_model(form)
        _, inputs, _, _ = converted(model, windows, split="random", share=0.5, router=router, weighted=weighted)
        for sparse, x_ND in zip(sparse_layers(model), inputs):
            x_ND = x_ND.double()
            expected = sparse.by_mask(x_ND)
            assert torch.allclose(sparse(x_ND), expected, rtol=1e-11, atol=1e-11)
            accelerate(model)
            assert torch.allclose(sparse(x_ND), expected, rtol=1e-11, atol=1e-11)
            _, weight_NK = sparse.choose(sparse.scores(x_ND))
            if weighted:
                assert weight_NK[:, 0].eq(1).all() and weight_NK.gt(0).all() and weight_NK.le(1).all()


def test_reports_and_inputs(make_model, windows):
    model = make_model("llama-relu")
    layers, inputs, about, reports = converted(model, windows, share=0.5)
    assert [tuple(x.shape) for x in inputs] == [(64, 16)] * 2
    assert about["num_selected"] == 2 and about["activation"] == "relu"
    assert all(0 < r.recovered <= r.recovered_truth + 1e-6 <= 1 + 2e-6 and 0.2 < r.active < 0.8 for r in reports)
    assert reports[0].name == layers[0].name == "model.layers.0.mlp"


def test_refusals_leave_the_model_alone(make_model, windows):
    model = make_model("llama")
    layers = dense_layers(model)
    inputs = capture_inputs(model, layers, windows, 32)
    for choices, message in (
        (Choices(expert_size=16), "use silu, whose neurons are never zero"),
        (Choices(expert_size=24, by_magnitude=True), "sizes that divide: 1, 2, 4, 8, 16, 32"),
        (Choices(expert_size=64, by_magnitude=True), "two or more experts of 64"),
        (Choices(expert_size=16, share=0.2, by_magnitude=True), "leaves 0 for a token"),
        (Choices(expert_size=16, share=0.0, by_magnitude=True), "leaves 0 for a token"),
        (Choices(expert_size=16, share=1.5, by_magnitude=True), "expected 0.2500"),
    ):
        with pytest.raises(UserError, match=message):
            convert(model, layers, inputs, choices)
    assert not any(isinstance(module, SparseFfn) for module in model.modules())
    with pytest.raises(UserError, match=r"no feed-forward layer of a known form. Supported: Llama.*BERT"):
        dense_layers(nn.Sequential(nn.Linear(2, 2)))
    model.model.layers[0].mlp.act_fn = nn.Sigmoid()
    with pytest.raises(UserError, match="is none of relu, silu"):
        dense_layers(model)

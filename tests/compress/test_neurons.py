"""Neuron groups: where they lie, what they weigh, zeroing, and the choice by score."""

import pytest
import torch
from compress_models import MODELS, llama, molm, neox
from transformers import BertConfig, BertModel

from megamf.compress.neurons import (
    NeuronGroup,
    choose,
    neuron_groups,
    neuron_sums,
    pieces,
    prunable_parameters,
    removed_parameters,
    zero_neurons,
)
from megamf.errors import UserError


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("attention", ["neurons", "heads"])
def test_groups_hold_every_element_of_their_matrices_once(name, attention):
    if (name, attention) == ("molm", "heads"):
        pytest.skip("keys and values are shared by the experts")
    model = MODELS[name]()
    seen = {}
    groups = neuron_groups(model, attention=attention)
    for group in groups:
        for piece in pieces(model, group):
            weight = seen.setdefault(piece.name, torch.zeros(model.get_parameter(piece.name).shape))
            weight = weight if piece.expert is None else weight[piece.expert]
            weight.index_add_(
                piece.dim,
                piece.index_CU.flatten(),
                torch.ones_like(weight.index_select(piece.dim, piece.index_CU.flatten())),
            )
    assert all((count == 1).all() for count in seen.values())
    assert prunable_parameters(groups) == sum(count.numel() for count in seen.values())
    blocks = ("mlp", "attn.q_proj.experts", "attn.q_proj.output_experts", "attention", "self_attn")
    left = {n for n, _ in model.named_parameters() if any(f".{b}." in n for b in blocks)} - set(seen)
    ends = {
        "llama": (),
        "qwen2": (),
        "mistral": (),
        "neox": ("dense.bias", "4h_to_h.bias"),
        "molm": ("k_proj", "v_proj", "gate"),
    }[name]
    assert all(any(end in one for end in ends) for one in left), left


def test_a_neuron_weighs_what_its_rows_and_columns_do():
    model = llama("qwen2")
    sizes = {(g.layer, g.kind): g for g in neuron_groups(model)}
    assert sizes[0, "ffn"].parameters == 3 * 24 and sizes[0, "ffn"].count == 20
    assert sizes[1, "qk"].parameters == 2 * (1 + 3) * 25 and sizes[1, "qk"].count == 2
    assert sizes[1, "vo"].parameters == 25 + 3 * 24 and sizes[1, "vo"].count == 4
    assert {g.kind: g.parameters for g in neuron_groups(molm(), experts="modules")} == {
        "attention_module": 2 * 16 * 12,
        "mlp_module": 2 * 16 * 10,
    }


def test_zeroing_sets_the_named_rows_and_columns_and_no_others():
    model, whole = llama(), llama()
    group = next(g for g in neuron_groups(model) if g.kind == "qk" and g.layer == 1 and g.head == 1)
    zero_neurons(model, {group: torch.tensor([True, False])})
    gone = {"q_proj": [h * 4 + c for h in (3, 4, 5) for c in (1, 3)], "k_proj": [5, 7]}
    for name, parameter in model.named_parameters():
        expected = whole.get_parameter(name).clone()
        for of, rows in gone.items():
            if name == f"model.layers.1.self_attn.{of}.weight":
                expected.data[rows] = 0
        assert torch.equal(parameter, expected), name


def test_sums_over_neurons_are_those_of_a_model_with_only_that_neuron():
    model = neox()
    for group in neuron_groups(model):
        sums = neuron_sums(model, group, lambda name: model.get_parameter(name).detach().abs())
        for neuron in (0, group.count - 1):
            other = neox()
            keep = torch.ones(group.count, dtype=torch.bool)
            keep[neuron] = False
            zero_neurons(other, {group: keep})
            lost = sum((a.abs().sum() - b.abs().sum()).item() for a, b in zip(model.parameters(), other.parameters()))
            assert sums[neuron].item() == pytest.approx(lost, rel=1e-4)


def group_of(count: int, parameters: int, layer: int = 0, **more) -> NeuronGroup:
    return NeuronGroup(layer, "ffn", count, None, parameters, **more)


@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.4, 0.7])
def test_the_ratio_is_met_to_half_a_neuron_and_the_rest_is_above_one_threshold(ratio):
    groups = [group_of(50, 7, 0), group_of(30, 11, 1), group_of(8, 20, 2)]
    torch.manual_seed(3)
    scores = {group: torch.rand(group.count) for group in groups}
    keep = choose(scores, groups, ratio)
    assert abs(removed_parameters(keep) - ratio * prunable_parameters(groups)) <= 10
    highest_gone = max((scores[g][~keep[g]].max().item() for g in groups if (~keep[g]).any()), default=-1)
    assert highest_gone < min(scores[g][keep[g]].min().item() for g in groups)


def test_the_layer_budget_takes_the_lowest_of_every_group_and_leaves_equal_sizes():
    groups = [group_of(40, 5, 0), group_of(40, 5, 1)]
    scores = {groups[0]: torch.arange(40.0), groups[1]: 100 - torch.arange(40.0)}
    keep = choose(scores, groups, 0.25, "layer")
    assert keep[groups[0]].tolist() == [False] * 10 + [True] * 30
    assert keep[groups[1]].tolist() == [True] * 30 + [False] * 10


def test_what_stays_is_a_multiple_of_channels():
    groups = [group_of(45, 3, 0), group_of(32, 6, 1, unit=2), group_of(12, 5, 2, unit=64)]
    torch.manual_seed(4)
    scores = {group: torch.rand(group.count) for group in groups}
    for budget in ("global", "layer"):
        keep = choose(scores, groups, 0.3, budget, multiple=8)
        for group in groups:
            left = int(keep[group].sum())
            assert left == group.count or left * group.unit % 8 == 0
        assert removed_parameters(keep) == pytest.approx(0.3 * prunable_parameters(groups), abs=25)


def test_a_ratio_of_the_whole_model_takes_more_of_the_neurons():
    groups = [group_of(100, 4)]
    scores = {groups[0]: torch.arange(100.0)}
    assert (~choose(scores, groups, 0.2, of=800)[groups[0]]).sum() == 40


def test_what_cannot_be_done_is_refused():
    groups = [group_of(4, 4)]
    scores = {groups[0]: torch.arange(4.0)}
    with pytest.raises(UserError, match="leaves nothing"):
        choose(scores, groups, 0.9)
    with pytest.raises(UserError, match=r"outside \[0, 1\)"):
        choose(scores, groups, 1.0)
    with pytest.raises(UserError, match="no scores"):
        choose({}, groups, 0.5)
    with pytest.raises(UserError, match="not finite"):
        choose({groups[0]: torch.full((4,), float("nan"))}, groups, 0.5)
    with pytest.raises(UserError, match="budget"):
        choose(scores, groups, 0.5, budget="row")
    with pytest.raises(UserError, match=r"expected torch\.bool"):
        zero_neurons(llama(), {group_of(4, 4): torch.ones(5, dtype=torch.bool)})
    bert = BertModel(
        BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    )
    with pytest.raises(UserError, match=r"BertModel .*'bert'.* not supported.*llama.*gpt_neox, moduleformer"):
        neuron_groups(bert)
    with pytest.raises(UserError, match="not for a ModuleFormer"):
        neuron_groups(molm(), attention="heads")

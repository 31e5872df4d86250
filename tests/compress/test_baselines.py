"""Scores against sums written out in float64, one meaning of the ratio for all methods, and bad requests."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

from megamf.compress.baselines import (
    METHODS,
    NEURON_METHODS,
    gradient_scores,
    loss_gradients,
    magnitude_scores,
    prune_baseline,
    random_scores,
)
from megamf.compress.documents import mean_loss
from megamf.compress.neurons import neuron_groups, zero_neurons
from megamf.errors import UserError
from megamf.hf.modeling import ModuleFormerForCausalLM
from megamf.hf.portable.configuration_moduleformer import ModuleFormerConfig

TOKENS = [torch.randint(19, (n,), generator=torch.Generator().manual_seed(n)) for n in (17, 9, 1, 12, 14)]


def llama():
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=19, hidden_size=16, intermediate_size=24, num_hidden_layers=5, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=True,
        )
    )  # fmt: skip


def neox():
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=19, hidden_size=16, intermediate_size=24, num_hidden_layers=5, num_attention_heads=2,
            max_position_embeddings=32,
        )
    )  # fmt: skip


def molm():
    return ModuleFormerForCausalLM(
        ModuleFormerConfig(
            vocab_size=19, n_layer=5, n_embd=16, n_head=1, att_hidden=16, ffd_hidden=12, n_att_experts=3,
            n_mlp_experts=4, gating_size=8, block_size=16, history_length=16,
        )
    )  # fmt: skip


@pytest.fixture(params=[llama, neox, molm], ids=["llama", "neox", "molm"])
def model(request):
    torch.manual_seed(0)
    model = request.param().double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def only(groups, group, neuron):
    """Masks that remove one neuron."""
    keep = {other: torch.ones(other.count, dtype=torch.bool) for other in groups}
    keep[group][neuron] = False
    return keep


def test_scores_are_those_of_the_weights_that_zeroing_takes(model):
    groups = neuron_groups(model)
    for parameter in model.parameters():
        parameter.grad = None
    loss, count = 0.0, sum(len(row) - 1 for row in TOKENS)
    for row in TOKENS:
        if len(row) > 1:
            probability = model(input_ids=row[None]).logits[0, :-1].log_softmax(-1)
            loss = loss - probability.gather(-1, row[1:, None]).sum() / count
    loss.backward()
    oracle = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    gradients = loss_gradients(model, TOKENS, batch=3)
    for name, value in oracle.items():
        torch.testing.assert_close(gradients[name], value, rtol=1e-9, atol=1e-12)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())

    magnitude, taylor = magnitude_scores(model, groups), gradient_scores(model, TOKENS, groups, batch=2)
    whole = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    by_kind = {(group.kind, group.layer): group for group in groups}
    for group in by_kind.values():
        neuron = group.count // 2
        zero_neurons(model, only(groups, group, neuron))
        squares = change = size = 0.0
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                gone = whole[name] - parameter
                squares += gone.square().sum().item()
                change += (gone * oracle.get(name, torch.zeros(()))).abs().sum().item()
                size += (gone != 0).sum().item()
                parameter.copy_(whole[name])
        assert size == group.parameters
        assert magnitude[group][neuron].item() == pytest.approx((squares / size) ** 0.5, rel=1e-5)
        assert taylor[group][neuron].item() == pytest.approx(change / size, rel=1e-4, abs=1e-12)


def test_random_scores_depend_on_seed_and_place_alone(model):
    groups = neuron_groups(model)
    first, again, other = random_scores(groups, 1), random_scores(groups[::-1], 1), random_scores(groups, 2)
    assert all(torch.equal(first[group], again[group]) for group in groups)
    assert not torch.equal(first[groups[0]], other[groups[0]]) and not torch.equal(first[groups[0]], first[groups[-1]])


def test_all_methods_reach_the_same_ratio_and_leave_the_model_alone(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    loss = mean_loss(model, TOKENS)
    methods = METHODS if model.config.model_type != "moduleformer" else METHODS[:-1]
    for method in methods:
        pruned = prune_baseline(method, model, TOKENS, 0.4, seed=3, length=13)
        sizes = [sum(p.numel() for p in m.parameters()) for m in (model, pruned.model)]
        assert pruned.reached == pytest.approx((sizes[0] - sizes[1]) / pruned.whole)
        # The nearest whole number of neurons, layers or dimensions of a tiny model.
        assert pruned.reached == pytest.approx(0.4, abs=0.06), method
        assert mean_loss(pruned.model, TOKENS) != loss
        assert len(pruned.detail["layers"]) == 2 if method == "layers" else pruned.detail
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    for method in (*NEURON_METHODS, "layers"):
        same = prune_baseline(method, model, TOKENS, 0.0).model
        assert type(same) is type(model)
        assert all(torch.equal(value, before[name]) for name, value in same.state_dict().items())


def test_protected_layers_lose_nothing():
    torch.manual_seed(0)
    model = llama()
    pruned = prune_baseline("gradient", model, TOKENS, 0.2, protect=(1, 2), attention="none", budget="global")
    widths = [layer.mlp.up_proj.out_features for layer in pruned.model.model.layers]
    assert widths[0] == widths[3] == widths[4] == 24 and sum(widths) < 5 * 24
    assert pruned.reached == pytest.approx(0.2, abs=0.01)
    with pytest.raises(UserError, match="protect=3,2 leaves no layer to prune: the model has 5"):
        prune_baseline("random", model, TOKENS, 0.1, protect=(3, 2))
    with pytest.raises(UserError, match="leaves nothing"):
        prune_baseline("random", model, TOKENS, 0.5, protect=(2, 2))


def test_the_ratio_is_a_share_of_all_matrices_or_of_all_parameters():
    torch.manual_seed(0)
    model = llama()
    total = sum(p.numel() for p in model.parameters())
    for method in METHODS:
        pruned = prune_baseline(method, model, TOKENS, 0.2, of="all", length=13)
        assert pruned.whole == total and pruned.reached == pytest.approx(0.2, abs=0.09), method
    for method in NEURON_METHODS:
        pruned = prune_baseline(method, model, TOKENS, 0.5, attention="none")
        assert pruned.whole == 9600 and pruned.reached == pytest.approx(0.5, abs=0.01), method
        assert pruned.detail["neurons"].keys() == {"ffn"}


def test_bad_requests_are_refused():
    torch.manual_seed(0)
    model = llama()
    with pytest.raises(UserError, match="method 'best' is not one of random, magnitude, gradient, layers, slicing"):
        prune_baseline("best", model, TOKENS, 0.2)
    with pytest.raises(UserError, match="of='some' is not one of prunable, all"):
        prune_baseline("layers", model, TOKENS, 0.2, of="some")
    for method in METHODS:
        with pytest.raises(UserError, match=r"ratio=1.0 is outside \[0, 1\)"):
            prune_baseline(method, model, TOKENS, 1.0)
        with pytest.raises(UserError, match=r"model_type 'gpt2'.*llama"):
            prune_baseline(method, GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=2)), TOKENS, 0)
    for method in (*NEURON_METHODS, "slicing"):
        with pytest.raises(UserError, match=r"leaves nothing|slicing cannot leave"):
            prune_baseline(method, model, TOKENS, 0.999)
    with pytest.raises(UserError, match="nothing to predict"):
        prune_baseline("gradient", model, [torch.tensor([1]), torch.tensor([2])], 0.2)
    with pytest.raises(UserError, match="one window needs 256"):
        prune_baseline("slicing", model, TOKENS, 0.2)
    with pytest.raises(UserError, match=r"model_type 'moduleformer'\) cannot be sliced"):
        prune_baseline("slicing", molm(), TOKENS, 0.2, length=8)

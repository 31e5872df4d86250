"""Removed neurons compute what zeroed ones do; nothing removed changes nothing."""

import copy

import pytest
import torch
from compress_models import MODELS, llama, molm, neox
from transformers import GPTNeoXForCausalLM, LlamaForCausalLM

from megamf.compress.neurons import choose, neuron_groups, prunable_parameters, removed_parameters, zero_neurons
from megamf.compress.remove import remove_neurons
from megamf.errors import UserError


def random_keep(model, ratio: float, seed: int = 0, budget: str = "global", kinds: tuple = (), **options):
    groups = [g for g in neuron_groups(model, **options) if not kinds or g.kind in kinds]
    generator = torch.Generator().manual_seed(seed)
    scores = {group: torch.rand(group.count, generator=generator) for group in groups}
    return choose(scores, groups, ratio, budget)


@torch.no_grad()
def logits(model, padded: bool = False) -> torch.Tensor:
    ids_BT = torch.randint(40, (2, 11), generator=torch.Generator().manual_seed(5))
    mask_BT = torch.ones_like(ids_BT)
    if padded:
        mask_BT[1, :4] = 0
    return model(input_ids=ids_BT, attention_mask=mask_BT).logits[mask_BT.bool()]


CASES = {
    "global": {"budget": "global"},
    "ffn only, equal": {"budget": "layer", "kinds": ("ffn",)},
    "queries and keys": {"kinds": ("qk", "qk_plain")},
    "values": {"kinds": ("vo",)},
    "heads": {"attention": "heads"},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", MODELS)
def test_removed_is_zeroed(name, case):
    if (name, case) == ("molm", "heads"):
        pytest.skip("heads share keys and values between the experts")
    model = MODELS[name]().double()
    for ratio in (0.2, 0.5):
        keep = random_keep(model, ratio, **CASES[case])
        zeroed = copy.deepcopy(model)
        zero_neurons(zeroed, keep)
        small = remove_neurons(model, keep)
        assert model.num_parameters() - small.num_parameters() == removed_parameters(keep) > 0
        for padded in (False, True):
            difference = (logits(small, padded) - logits(zeroed, padded)).abs().max().item()
            assert difference < 1e-12
        assert (logits(small) - logits(model)).abs().max().item() > 1e-6
        plain = case == "ffn only, equal"
        assert (type(small) is type(model)) == plain


@pytest.mark.parametrize("name", MODELS)
def test_nothing_removed_changes_no_bit(name):
    model = MODELS[name]().bfloat16()
    keep = {group: torch.ones(group.count, dtype=torch.bool) for group in neuron_groups(model)}
    small = remove_neurons(model, keep)
    assert type(small) is type(model)
    assert small.state_dict().keys() == model.state_dict().keys()
    for key, tensor in model.state_dict().items():
        assert torch.equal(small.state_dict()[key], tensor)
        assert small.state_dict()[key].data_ptr() != tensor.data_ptr()
    assert torch.equal(logits(small), logits(model))
    assert small.config.to_dict() == model.config.to_dict()


@pytest.mark.parametrize("name", MODELS)
def test_pruned_models_generate_with_their_cache_what_they_generate_without(name):
    model = MODELS[name]().double()
    small = remove_neurons(model, random_keep(model, 0.3))
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": 99}
    with_cache = small.generate(ids, use_cache=True, **options)
    assert torch.equal(with_cache, small.generate(ids, use_cache=False, **options))
    assert with_cache.shape[1] == 11


def test_heads_leave_a_plain_llama_where_its_configuration_takes_the_number():
    model = llama().double()
    group = next(g for g in neuron_groups(model, attention="heads") if g.kind == "head")
    keep = {g: torch.tensor([False, True]) for g in neuron_groups(model, attention="heads") if g.kind == "head"}
    small = remove_neurons(model, keep)
    assert type(small) is LlamaForCausalLM
    assert (small.config.num_attention_heads, small.config.num_key_value_heads, small.config.head_dim) == (3, 1, 4)
    zero_neurons(model, keep)
    assert (logits(small) - logits(model)).abs().max().item() < 1e-12
    with pytest.raises(UserError, match=r"layer 0 head: 0 of 2 neurons would stay, at least 1"):
        remove_neurons(model, {group: torch.zeros(2, dtype=torch.bool)})


def test_whole_modules_go_with_their_router_rows():
    model = molm().double()
    keep = random_keep(model, 0.3, experts="modules")
    small = remove_neurons(model, keep)
    assert type(small) is type(model)
    assert small.config.n_mlp_experts_per_layer != [4, 4] or small.config.n_att_experts_per_layer != [3, 3]
    masked = copy.deepcopy(model)
    for group, mask in keep.items():
        block = masked.transformer.h[group.layer]
        gate = (block.mlpf if group.kind == "mlp_module" else block.attn.q_proj).gate
        row = gate.w_gate[-1]
        hide = torch.zeros(group.count, dtype=torch.float64).masked_fill(~mask, -torch.inf)
        masked_logits(gate, row, hide)
    assert (logits(small) - logits(masked)).abs().max().item() < 1e-12
    rows = sum((~mask).sum().item() for mask in keep.values()) * model.config.gating_size
    assert model.num_parameters() - small.num_parameters() == removed_parameters(keep) + rows


def masked_logits(gate, row, hide):
    """A router that never chooses the hidden modules: its last matrix sees one more input that is always 1."""
    weight = torch.cat([row.weight, torch.where(hide.isinf(), -1e9, 0.0)[:, None]], dim=1)
    before = gate.w_gate[:-1]
    row.weight = torch.nn.Parameter(weight)
    one = torch.nn.ConstantPad1d((0, 1), 1.0)
    gate.w_gate = torch.nn.Sequential(*before, one, row)


def test_an_expert_may_lose_everything_and_its_router_row_stays():
    model = molm().double()
    groups = [g for g in neuron_groups(model) if g.kind == "ffn" and g.expert == 1]
    keep = {group: torch.zeros(group.count, dtype=torch.bool) for group in groups}
    small = remove_neurons(model, keep)
    zero_neurons(model, keep)
    assert small.config.pruned_layers[0]["ffn"] == [10, 0, 10, 10]
    assert (logits(small) - logits(model)).abs().max().item() < 1e-12


def test_gradients_reach_what_is_left():
    model = neox()
    small = remove_neurons(model, random_keep(model, 0.3)).train()
    ids = torch.arange(12)[None]
    small(input_ids=ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in small.parameters())
    assert prunable_parameters(neuron_groups(model)) > 0
    assert not isinstance(small, GPTNeoXForCausalLM) or type(small) is not GPTNeoXForCausalLM

"""The model against the portable file in float64: values, gradients, cache, documents, padding; parameter counts."""

import pytest
import torch
import torch.nn.functional as F

from megamf.config import load_config
from megamf.hf.layout import public_shapes
from megamf.model import ModuleFormer
from megamf.model.losses import balance_terms, pack

KINDS = [
    {"gate_type": gate, **kv}
    for gate in ("mlp", "linear", "gmm")
    for kv in ({}, {"n_head": 1, "att_hidden": 16}, {"n_head": 1, "att_hidden": 12})
]


def relative(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("loss_type", ["mi", "switch"])
def test_values_and_gradients(make_model, make_oracle, tokens, kind, loss_type):
    model = make_model(**kind)
    oracle = make_oracle(model, aux_loss_type=loss_type)
    input_BT = tokens(2, 11)
    theirs = oracle(input_BT, labels=input_BT)
    theirs.loss.backward()

    output = model(input_BT)
    logits = model.logits(output.hidden_BTD)
    sums = pack(output.stats)
    aux = balance_terms(sums, sums)[loss_type]
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), input_BT[:, 1:].flatten()) + 0.01 * aux
    loss.backward()

    assert relative(logits, theirs.logits) < 1e-12
    assert relative(aux, theirs.aux_loss) < 1e-12
    assert relative(loss, theirs.loss) < 1e-12
    expected = dict(oracle.named_parameters())
    for name, parameter in model.named_parameters():
        assert relative(parameter.grad, expected[name].grad) < 1e-10, name


def test_float32_agrees_with_float64(make_model, tokens):
    model = make_model()
    input_BT = tokens(2, 9)
    exact = model.logits(model(input_BT).hidden_BTD)
    model.float()
    assert relative(model.logits(model(input_BT).hidden_BTD).double(), exact) < 1e-5


@pytest.mark.parametrize("kind", [{}, {"n_head": 1, "att_hidden": 16}, {"kind": "dense"}], ids=str)
@pytest.mark.parametrize("portions", [[1] * 9, [4, 1, 1, 3], [8, 1]], ids=str)
def test_cache_gives_the_same_as_one_pass(make_model, tokens, kind, portions):
    model = make_model(**kind)
    input_BT = tokens(3, 9)
    whole = model(input_BT).hidden_BTD
    cache = model.new_cache()
    with torch.no_grad():
        parts = [model(part, cache=cache).hidden_BTD for part in input_BT.split(portions, dim=1)]
    assert relative(torch.cat(parts, dim=1), whole) < 1e-12
    assert cache.length == 9


def test_beam_selection_and_crop(make_model, tokens):
    model = make_model()
    input_BT = tokens(3, 8)
    order = torch.tensor([2, 2, 0])
    with torch.no_grad():
        cache = model.new_cache()
        model(input_BT[:, :7], cache=cache)
        cache.select(order)
        cache.crop(-2)
        found = model(input_BT[order][:, 5:], cache=cache).hidden_BTD
    assert relative(found, model(input_BT[order]).hidden_BTD[:, 5:]) < 1e-12


def test_history_is_seen_but_carries_no_gradient(make_model, tokens):
    model = make_model()
    input_BT = tokens(2, 8)
    cache = model.new_cache()
    first = torch.randn(2, 4, 16, dtype=torch.float64, requires_grad=True)
    whole_input = torch.cat([first, model.transformer.wte(input_BT[:, 4:])], dim=1)
    whole = model(None, embedding_BTD=whole_input).hidden_BTD[:, 4:]
    model(None, embedding_BTD=first, cache=cache)
    second = model(input_BT[:, 4:], cache=cache).hidden_BTD
    assert relative(second, whole) < 1e-12
    assert torch.autograd.grad(second.sum(), first, allow_unused=True)[0] is None


def test_history_can_be_cut(make_model, tokens):
    model = make_model(n_layer=1)
    input_BT = tokens(2, 9)
    cache = model.new_cache()
    with torch.no_grad():
        model(input_BT[:, :6], cache=cache)
        cache.keep_last(2)
        found = model(input_BT[:, 6:], cache=cache).hidden_BTD
        # One layer: what the last three see of the two before them depends on these alone.
        expected = model(input_BT[:, 4:]).hidden_BTD[:, 2:]
    assert relative(found, expected) < 1e-12


def test_documents_do_not_see_each_other(make_model, tokens):
    model = make_model()
    input_BT = tokens(1, 12)
    start_BT = torch.tensor([[0] * 5 + [5] * 4 + [9] * 3], dtype=torch.int32)
    packed = model(input_BT, start_BT=start_BT).hidden_BTD
    apart = torch.cat([model(part).hidden_BTD for part in input_BT.split([5, 4, 3], dim=1)], dim=1)
    assert relative(packed, apart) < 1e-12


def test_left_padding_by_start_and_by_mask(make_model, tokens):
    model = make_model()
    input_BT = tokens(2, 9)
    pad_B = torch.tensor([0, 4], dtype=torch.int32)
    start_BT = pad_B[:, None].expand(2, 9).contiguous()
    mask_BS = torch.arange(9)[None] >= pad_B[:, None]
    by_start = model(input_BT, start_BT=start_BT).hidden_BTD
    by_mask = model(input_BT, key_mask_BS=mask_BS).hidden_BTD
    alone = model(input_BT[1:, 4:]).hidden_BTD
    assert relative(by_start[1:, 4:], alone) < 1e-12
    assert relative(by_mask[1:, 4:], alone) < 1e-12


def test_any_mask_agrees_with_the_oracle(make_model, make_oracle, tokens):
    model = make_model()
    oracle = make_oracle(model)
    input_BT = tokens(3, 10)
    mask_BS = torch.rand(3, 10, generator=torch.Generator().manual_seed(1)) < 0.6
    found = model.logits(model(input_BT, key_mask_BS=mask_BS).hidden_BTD)
    assert relative(found, oracle(input_BT, attention_mask=mask_BS.long()).logits) < 1e-12


@pytest.mark.parametrize("mode", ["experts", "full"])
@pytest.mark.parametrize("changes", [{"sample_topk": 1}, {"resid_pdrop": 0.2, "moe_pdrop": 0.1}], ids=str)
def test_activation_checkpointing_changes_nothing(make_model, tokens, mode, changes):
    gradients = []
    for chosen in ("none", mode):
        model = make_model(**changes).train()
        model.set_activation_checkpointing(chosen)
        torch.manual_seed(3)
        output = model(tokens(2, 7))
        (model.logits(output.hidden_BTD).square().mean() + pack(output.stats).entropy_M.sum()).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, recomputed in zip(*gradients):
        assert torch.equal(plain, recomputed)


def test_unknown_checkpointing_mode(make_model):
    with pytest.raises(ValueError, match="'some' is not one of none, experts, full"):
        make_model().set_activation_checkpointing("some")


@pytest.mark.parametrize(
    ("preset", "count"),
    [("molm-350m-4b", 4_142_526_464), ("molm-700m-4b", 4_142_526_464), ("molm-700m-8b", 8_182_046_720)],
)
def test_released_sizes(preset, count):
    config = load_config(preset=preset).model
    with torch.device("meta"):
        model = ModuleFormer(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == public_shapes(config)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_parameter_names_are_the_public_ones(make_config, kind):
    config = make_config(**kind)
    found = {name: tuple(value.shape) for name, value in ModuleFormer(config).state_dict().items()}
    assert found == public_shapes(config)


def test_bfloat16_routes_like_its_own_weights_in_float32(make_model, tokens):
    model = make_model(torch.bfloat16)
    input_BT = tokens(2, 6)
    output = model(input_BT)
    assert output.hidden_BTD.dtype == torch.bfloat16
    assert all(stats.prob_E.dtype == torch.float32 for stats in output.stats)
    low = model.logits(output.hidden_BTD).float()
    model.float()
    high = model.logits(model(input_BT).hidden_BTD)
    cosine = F.cosine_similarity(low.flatten(), high.flatten(), dim=0)
    assert cosine > 0.98

"""The parallel forms against literal zeroing: every neuron by itself, in float64, through the layer's own code."""

import copy

import pytest
import torch
from compress_models import MODELS, llama, molm

from megamf.compress.neurons import layers_of, neuron_groups, zero_neurons
from megamf.compress.relevance import impacts
from megamf.errors import UserError

DOCUMENTS = [torch.randint(40, (n,), generator=torch.Generator().manual_seed(n)) for n in (9, 14)]


def sublayer(layer, kind: str):
    """The attention or the feed-forward layer of a layer."""
    if kind in ("ffn", "mlp_module"):
        return layer.mlp if hasattr(layer, "mlp") else layer.mlpf
    return next(getattr(layer, name) for name in ("self_attn", "attention", "attn") if hasattr(layer, name))


def outputs(model, document) -> dict:
    """(layer, part) -> arguments, named arguments and output of both parts of each layer."""
    found, handles = {}, []
    for index, layer in enumerate(layers_of(model)):
        for kind in ("ffn", "attention"):

            def keep(module, arguments, named, output, key=(index, kind)):
                found[key] = (arguments, named, output[0] if isinstance(output, tuple) else output)

            handles.append(sublayer(layer, kind).register_forward_hook(keep, with_kwargs=True))
    with torch.no_grad():
        model(input_ids=document[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def literal(model, group, neuron: int, run: dict) -> float:
    """Root mean square over tokens of the change of the layer's output, with the layer run again on its input."""
    part = "ffn" if group.kind in ("ffn", "mlp_module") else "attention"
    arguments, named, whole = run[group.layer, part]
    layer = layers_of(model)[group.layer]
    before = copy.deepcopy(layer.state_dict())
    mask = torch.ones(group.count, dtype=torch.bool)
    mask[neuron] = False
    zero_neurons(model, {group: mask})
    with torch.no_grad():
        again = sublayer(layer, group.kind)(*arguments, **named)
    layer.load_state_dict(before)
    again = again[0] if isinstance(again, tuple) else again
    return (again - whole).square().sum(-1).mean().sqrt().item()


OPTIONS = {"neurons": {}, "heads": {"attention": "heads"}, "modules": {"experts": "modules"}}


@pytest.mark.parametrize(
    ("name", "option"),
    [*((name, "neurons") for name in MODELS), ("llama", "heads"), ("neox", "heads"), ("molm", "modules")],
)
def test_closed_forms_are_literal_zeroing(name, option):
    model = MODELS[name]().double().eval()
    for parameter in model.parameters():
        # Larger than at initialisation, so that attention is far from even, biases are there and nothing is linear.
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    groups = neuron_groups(model, **OPTIONS[option])
    found = impacts(model, groups, DOCUMENTS)
    kinds, runs = set(), [outputs(model, document) for document in DOCUMENTS]
    for group in groups:
        if group.layer and group.kind in kinds and (group.head or group.expert):
            continue
        kinds.add(group.kind)
        for number, run in enumerate(runs):
            for neuron in {0, group.count // 2, group.count - 1}:
                expected = literal(model, group, neuron, run)
                # Changes are handed back in float32.
                assert found.values[group][number, neuron].item() == pytest.approx(expected, rel=2e-7, abs=1e-12)
    assert kinds == {group.kind for group in groups}


def test_changes_are_those_of_the_whole_layer_where_attention_comes_beside_the_mlp():
    """A GPT-NeoX layer adds both parts to its input, so that the layer's own output changes as much."""
    model = MODELS["neox"]().double().eval()
    group = next(g for g in neuron_groups(model) if g.kind == "vo" and g.layer == 1)
    found = impacts(model, [group], DOCUMENTS[:1])
    other = copy.deepcopy(model)
    mask = torch.ones(group.count, dtype=torch.bool)
    mask[3] = False
    zero_neurons(other, {group: mask})
    states = []
    for one in (model, other):
        handle = layers_of(one)[1].register_forward_hook(lambda _m, _a, output: states.append(output))
        one(input_ids=DOCUMENTS[0][None])
        handle.remove()
    change = (states[0] - states[1]).square().sum(-1).mean().sqrt().item()
    assert found.values[group][0, 3].item() == pytest.approx(change, rel=2e-7)
    assert found.stream[0, 0, 1].item() == pytest.approx(states[0].square().sum(-1).mean().sqrt().item(), rel=1e-6)
    norms = sorted(states[0][0].square().sum(-1).sqrt().tolist())
    assert found.stream[1, 0, 1].item() == pytest.approx(norms[(len(norms) - 1) // 2], rel=1e-6)
    for norm, stream in zip(("document", "token"), found.stream, strict=True):
        assert torch.equal(found.relative(norm)[group], found.values[group] / stream[:, 1:2])


def test_queries_and_keys_are_measured_on_the_first_tokens():
    for build in (llama, molm):
        model = build().double()
        groups = neuron_groups(model)
        cut = impacts(model, groups, DOCUMENTS, qk_tokens=6)
        short = impacts(model, groups, [document[:6] for document in DOCUMENTS])
        for group in groups:
            if group.kind == "qk":
                assert torch.equal(cut.values[group], short.values[group])


def test_lower_precision_is_measured_in_float32_and_chunks_do_not_matter(monkeypatch):
    model = llama().bfloat16()
    groups = neuron_groups(model)
    found = impacts(model, groups, DOCUMENTS)
    monkeypatch.setattr("megamf.compress.relevance.WEIGHTS_IN_MEMORY", 1)
    again = impacts(model, groups, DOCUMENTS)
    for group in groups:
        assert found.values[group].dtype == torch.float32
        torch.testing.assert_close(found.values[group], again.values[group])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_bad_documents_are_refused():
    model = llama()
    groups = neuron_groups(model)
    with pytest.raises(UserError, match="without a token"):
        impacts(model, groups, [DOCUMENTS[0], DOCUMENTS[0][:0]])
    with pytest.raises(UserError, match="0 documents"):
        impacts(model, groups, [])
    with pytest.raises(UserError, match="token id 40"):
        impacts(model, groups, [torch.tensor([1, 40])])
    with pytest.raises(UserError, match="qk_tokens=1"):
        impacts(model, groups, DOCUMENTS, qk_tokens=1)
    window = MODELS["mistral"]()
    window.config.sliding_window = 8
    with pytest.raises(UserError, match="14 tokens, the model attends to 8"):
        impacts(window, neuron_groups(window), DOCUMENTS)


def test_experts_that_no_token_chose_change_nothing():
    model = molm().eval()
    document = DOCUMENTS[0][:2]
    chosen = {}
    handles = [
        router.register_forward_hook(lambda m, _, out, name=name: chosen.update({name: set(out[0].flatten().tolist())}))
        for name, router in model.named_modules()
        if name.endswith(".gate")
    ]
    groups = neuron_groups(model)
    found = impacts(model, groups, [document])
    for handle in handles:
        handle.remove()
    idle = 0
    for group in groups:
        place = "mlpf" if group.kind == "ffn" else "attn.q_proj"
        if group.expert not in chosen[f"transformer.h.{group.layer}.{place}.gate"]:
            assert not found.values[group].any(), group
            idle += 1
        else:
            assert found.values[group].any(), group
    assert idle, "some experts are left out by two tokens"

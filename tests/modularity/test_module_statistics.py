"""Use of modules against a second, token-by-token computation of the routing."""

import itertools
import json
import math

import pytest
import torch
import torch.nn.functional as F

from megamf.data.indexed import IndexedDataset
from megamf.errors import UserError
from megamf.modularity.places import Place
from megamf.modularity.statistics import Statistics, collect, read_statistics, summary


def routed_by_hand(model, prefix, seq_len):
    """Place -> (softmax probabilities of every token), from the inputs of the norms, document by document."""
    found = {}
    with IndexedDataset(prefix) as dataset:
        tokens = dataset.tokens(0, dataset.num_tokens).astype("int64")
        ends = [int(end) for end in dataset.document_ends]
    starts = {0, *ends[:-1]}
    for begin in range(0, len(tokens) - 1, seq_len):
        end = min(begin + seq_len, len(tokens) - 1)
        cuts = sorted({begin, end, *(s for s in starts if begin < s < end)})
        for a, b in itertools.pairwise(cuts):
            h = model.transformer.wte(torch.from_numpy(tokens[a:b])[None])
            for layer, block in enumerate(model.transformer.h):
                for kind, norm, part in (("attention", block.ln_1, block.attn), ("mlp", block.ln_2, block.mlpf)):
                    gate = (part.q_proj if kind == "attention" else part).gate.w_gate
                    x = norm(h)
                    logits = F.gelu(x[0] @ gate[0].weight.T + gate[0].bias) @ gate[3].weight.T
                    found.setdefault(Place(layer, kind), []).append(logits.softmax(-1))
                    h = h + (part(x, None, None, None) if kind == "attention" else part(x))[0]
    return {place: torch.cat(parts) for place, parts in found.items()}


def test_against_token_by_token(make_model, make_data):
    model, prefix = make_model().double(), make_data()
    found = collect(model, prefix, seq_len=12, batch=3)
    with torch.no_grad():
        expected = routed_by_hand(model, prefix, 12)
    assert found.tokens == len(expected[Place(0, "mlp")])
    used = {(Place(m.layer, m.kind), m.index): m for m in found.modules}
    assert len(used) == 2 * (4 + 5)
    for place, prob_NE in expected.items():
        top, chosen = prob_NE.topk(2, dim=-1)
        for index in range(prob_NE.shape[1]):
            mask = chosen == index
            module = used[place, index]
            assert module.frequency == pytest.approx(mask.any(1).double().mean().item(), abs=1e-12)
            assert module.mean_gate == pytest.approx(top[mask].mean().item() if mask.any() else 0.0, rel=1e-9)
            assert module.mean_prob == pytest.approx(prob_NE[:, index].mean().item(), rel=1e-9)
        router = next(r for r in found.routers if Place(r.layer, r.kind) == place)
        mean = prob_NE.mean(0)
        assert router.entropy == pytest.approx(-(mean * mean.log()).sum().item(), rel=1e-9)
        conditional = -(prob_NE * prob_NE.log()).sum(1).mean().item()
        assert router.conditional_entropy == pytest.approx(conditional, rel=1e-9)
        assert router.mutual_information == pytest.approx(router.entropy - conditional, abs=1e-12)


def test_the_batch_does_not_matter(make_model, make_data):
    model, prefix = make_model().double(), make_data()
    one, many = (collect(model, prefix, seq_len=12, batch=batch) for batch in (1, 5))
    assert [m.frequency for m in one.modules] == [m.frequency for m in many.modules]
    assert [m.mean_prob for m in one.modules] == pytest.approx([m.mean_prob for m in many.modules], rel=1e-12)


def test_loads_are_relative_to_layer_and_kind(make_model, make_data):
    found = collect(make_model(n_att_experts_per_layer=[4, 2]), make_data(), seq_len=12, batch=4)
    load = found.relative_load()
    assert {place: len(values) for place, values in load.items()}[Place(1, "attention")] == 2
    for place, values in load.items():
        largest = max(found.frequencies()[place])
        assert max(values) == 1.0
        assert values == pytest.approx([f / largest for f in found.frequencies()[place]])
    row = next(row for row in summary(found, (0.5,)) if (row["layer"], row["kind"]) == (0, "mlp"))
    assert row["below_0.5"] == sum(value < 0.5 for value in load[Place(0, "mlp")]) / 5


def test_files(make_model, make_data, tmp_path):
    found = collect(make_model(), make_data(), seq_len=12, batch=4)
    path = tmp_path / "use.json"
    path.write_text(json.dumps({"checkpoint": "x", "statistics": [found.model_dump()]}))
    assert read_statistics(path).statistics == [found] and isinstance(found, Statistics)
    assert all(math.isfinite(router.mutual_information) for router in found.routers)
    found.check({place: len(values) for place, values in found.frequencies().items()})
    with pytest.raises(UserError, match=r"layer 0, mlp has 5 modules in them and 4 in the checkpoint"):
        found.check(dict.fromkeys(found.frequencies(), 4))
    for content in ("{", "{}", "[]", '{"checkpoint": "x", "statistics": [{"data": "x"}]}'):
        path.write_text(content)
        with pytest.raises(UserError, match="no file of module statistics"):
            read_statistics(path)


def test_other_vocabularies_are_refused(make_model, make_data):
    with pytest.raises(UserError, match="vocabulary of 40"):
        collect(make_model(vocab_size=40), make_data(), seq_len=12, batch=4)

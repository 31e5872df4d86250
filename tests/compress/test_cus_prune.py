"""The choice of Cus-Prun: quantifier over documents, intersection over dimensions, ratio, report."""

import pytest
import torch
from compress_models import llama, molm

from megamf.compress import cus_prune
from megamf.compress.cus_prune import Settings, describe, intersect, over_documents, ranks, select
from megamf.compress.neurons import NeuronGroup, neuron_groups, prunable_parameters, removed_parameters
from megamf.compress.relevance import impacts
from megamf.errors import UserError

FIRST, SECOND = NeuronGroup(0, "ffn", 6, None, 3), NeuronGroup(1, "ffn", 4, None, 5)


def documents(seed: int, count: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(40, (8 + i,), generator=generator) for i in range(count)]


def scored(seed: int) -> dict[NeuronGroup, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {group: torch.rand(group.count, generator=generator) for group in (FIRST, SECOND)}


@pytest.mark.parametrize("share", [1.0, 0.5, 0.2])
def test_a_threshold_above_the_score_is_above_the_share_of_documents(share):
    changes = {FIRST: torch.rand(5, 6, generator=torch.Generator().manual_seed(0))}
    score_C = over_documents(changes, share)[FIRST]
    for threshold in (0.1, 0.3, 0.5, 0.9):
        below_C = (changes[FIRST] <= threshold).double().mean(0) >= share
        assert torch.equal(score_C <= threshold, below_C)


@pytest.mark.parametrize("scale", ["value", "rank"])
def test_the_intersection_holds_what_every_dimension_has_below_the_threshold(scale):
    dimensions = {"language": scored(1), "domain": scored(2), "task": scored(3)}
    combined = intersect(dimensions, scale)
    each = {n: s if scale == "value" else ranks(s) for n, s in dimensions.items()}
    for threshold in (0.2, 0.5, 0.8):
        for group in (FIRST, SECOND):
            sets = [set((s[group] <= threshold).nonzero().flatten().tolist()) for s in each.values()]
            assert set((combined[group] <= threshold).nonzero().flatten().tolist()) == set.intersection(*sets)


def test_ranks_are_shares_of_the_parameters_that_would_go():
    scores = {FIRST: torch.tensor([5.0, 1, 9, 3, 8, 7]), SECOND: torch.tensor([2.0, 10, 4, 6])}
    rank = ranks(scores)
    for group, values in scores.items():
        for n, value in enumerate(values.tolist()):
            gone = sum(3 for v in scores[FIRST].tolist() if v <= value)
            gone += sum(5 for v in scores[SECOND].tolist() if v <= value)
            assert rank[group][n].item() == pytest.approx(gone / 38)


def test_the_selection_follows_the_impacts_and_the_report_the_selection():
    model = llama().double()
    sets = {"language": documents(1), "task": documents(2)}
    settings = Settings(ratio=0.3, relative="none")
    seen = []
    selection = select(model, sets, settings, on_document=lambda done, total: seen.append((done, total)))
    assert seen == [(i, 6) for i in range(1, 7)]
    groups = neuron_groups(model)
    each = [impacts(model, groups, rows).values for rows in sets.values()]
    worst = {group: torch.cat([values[group] for values in each]).amax(0) for group in groups}
    threshold = max(worst[g][~selection.keep[g]].max().item() for g in groups if not selection.keep[g].all())
    for group in groups:
        free = (~selection.keep[group]).sum() < group.count - group.least
        if free:
            assert torch.equal(worst[group] > threshold, selection.keep[group])
    report = describe(model, selection, settings)
    assert report["threshold"] == pytest.approx(threshold)
    total = prunable_parameters(groups)
    assert report["ratio_reached"] == pytest.approx(removed_parameters(selection.keep) / total)
    assert report["ratio_reached"] == pytest.approx(0.3, abs=100 / total)
    assert report["removed_neurons"] <= min(report["irrelevant"].values())
    kept = {kind: sum(row[kind]["kept"] for row in report["layers"]) for kind in ("ffn", "qk", "vo")}
    for kind, count in kept.items():
        assert count == sum(int(mask.sum()) for group, mask in selection.keep.items() if group.kind == kind)
    before = {key: value.clone() for key, value in llama().double().state_dict().items()}
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_ratio_of_everything_counts_the_embedding_and_the_layer_budget_keeps_sizes_equal():
    model = llama()
    settings = Settings(ratio=0.2, of="all", budget="layer", attention="none")
    selection = select(model, {"language": documents(1)}, settings)
    assert removed_parameters(selection.keep) / model.num_parameters() == pytest.approx(0.2, abs=0.01)
    assert len({int(mask.sum()) for mask in selection.keep.values()}) == 1
    relative = select(model, {"language": documents(1)}, Settings())
    changes = impacts(model, list(relative.scores), documents(1))
    for group, score in relative.scores.items():
        expected = (changes.values[group] / changes.stream[0, :, group.layer, None]).amax(0)
        torch.testing.assert_close(score, expected)


def test_whole_modules_can_be_chosen():
    selection = select(molm(), {"language": documents(1)}, Settings(ratio=0.3, experts="modules"))
    assert {group.kind for group in selection.keep} == {"attention_module", "mlp_module"}
    assert all(int(mask.sum()) >= 2 for mask in selection.keep.values())


def test_what_cannot_be_done_is_refused():
    model = llama()
    with pytest.raises(UserError, match="task has 1 documents: at least 2"):
        select(model, {"task": documents(1, 1)}, Settings())
    with pytest.raises(UserError, match="no dimension is given"):
        select(model, {}, Settings())
    with pytest.raises(UserError, match="leaves nothing"):
        select(model, {"task": documents(1)}, Settings(ratio=0.99))
    for settings, message in (
        (Settings(ratio=1.0), r"ratio=1\.0 is outside"),
        (Settings(of="half"), "of='half' is not one of prunable, all"),
        (Settings(share=0.0), r"share=0\.0 is outside \(0, 1\]"),
        (Settings(scale="log"), "scale='log' is not one of value, rank"),
        (Settings(attention="some"), "attention='some'"),
    ):
        with pytest.raises(UserError, match=message):
            select(model, {"task": documents(1)}, settings)
    assert cus_prune.DIMENSIONS == ("language", "domain", "task")

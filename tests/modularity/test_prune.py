"""Which modules go: thresholds, shares, baselines; the model in memory and the one on disk."""

import itertools

import pytest
import torch

from megamf.checkpoint import Checkpoint
from megamf.checkpoint.layout import expert_name
from megamf.errors import UserError
from megamf.evaluate.load import load_model
from megamf.model import ModuleFormer
from megamf.modularity import prune
from megamf.modularity.edit import Kept, module_counts, rearrange
from megamf.modularity.places import Place, module_size, with_counts
from megamf.modularity.statistics import collect


def scores_of(config, seed=0):
    return prune.random_scores(config, seed)


def test_tau(make_model):
    config = make_model().config
    scores = {place: [0.0, 0.2, 0.5, 1.0, 0.9][:count] for place, count in module_counts(config).items()}
    everything = {place: list(range(count)) for place, count in module_counts(config).items()}
    assert prune.keep_above(config, scores, 0.0) == everything
    assert prune.keep_above(config, scores, 0.5)[Place(0, "mlp")] == [2, 3, 4]
    # Never fewer than k: the best two stay.
    assert prune.keep_above(config, scores, 1.0)[Place(0, "mlp")] == [3, 4]
    for tau in (-0.1, 1.01):
        with pytest.raises(UserError, match=r"outside 0\.\.1"):
            prune.keep_above(config, scores, tau)


def test_share_takes_the_lowest_scores_first(make_model):
    model = make_model()
    config = model.config
    scores = scores_of(config)
    total = sum(parameter.numel() for parameter in model.parameters())
    for share in (0.0, 0.1, 0.25):
        keep = prune.keep_share(config, scores, share)
        gone = {place: set(range(len(scores[place]))) - set(kept) for place, kept in keep.items()}
        removed = sum(module_size(config, place.kind) * len(indices) for place, indices in gone.items())
        assert share * total - max(module_size(config, k) for k in ("attention", "mlp")) < removed <= share * total
        small = ModuleFormer(with_counts(config, {place: len(kept) for place, kept in keep.items()}))
        assert total - sum(parameter.numel() for parameter in small.parameters()) == removed
        # Of all modules, save where only k are left.
        free = {place for place, kept in keep.items() if len(kept) > 2}
        highest = max((scores[place][i] for place in gone for i in gone[place]), default=-1)
        assert all(highest < scores[place][i] for place in free for i in keep[place])
    with pytest.raises(UserError, match="at most 0"):
        prune.keep_share(config, scores, 0.9)
    with pytest.raises(UserError, match=r"outside \[0, 1\)"):
        prune.keep_share(config, scores, 1.0)


def test_baselines(make_model, make_checkpoint):
    model = make_model()
    with torch.no_grad():
        model.transformer.h[0].mlpf.experts.weight[2] *= 10
        model.transformer.h[0].mlpf.output_experts.weight[1] *= 0
    norms = prune.norm_scores(make_checkpoint(model), model.config)
    here = norms[Place(0, "mlp")]
    assert here[2] == 1.0 and min(here) == here[1]
    experts = model.transformer.h[1].attn.q_proj
    expected = [
        (experts.experts.weight[e].square().sum() + experts.output_experts.weight[e].square().sum()).sqrt().item()
        for e in range(4)
    ]
    assert norms[Place(1, "attention")] == pytest.approx([value / max(expected) for value in expected], rel=1e-6)
    first, again, other = (scores_of(model.config, seed) for seed in (0, 0, 1))
    assert first == again != other
    assert len(set(itertools.chain(*first.values()))) == 18


def test_memory_and_disk_agree(make_model, make_checkpoint, tmp_path):
    model = make_model(n_att_experts_per_layer=[4, 3])
    source = make_checkpoint(model)
    keep = prune.keep_share(model.config, scores_of(model.config), 0.2)
    path = rearrange(source, tmp_path / "out", {p: [Kept(i) for i in kept] for p, kept in keep.items()}, what={})
    on_disk, _ = load_model(path)
    in_memory = prune.pruned_model(model, keep)
    assert in_memory.state_dict().keys() == on_disk.state_dict().keys()
    for name, value in in_memory.state_dict().items():
        assert torch.equal(value, on_disk.state_dict()[name]), name
    ids = torch.randint(50, (2, 9))
    assert torch.equal(in_memory(ids).hidden_BTD, on_disk(ids).hidden_BTD)


def test_nothing_pruned_changes_nothing(make_model):
    model = make_model()
    everything = {place: list(range(count)) for place, count in module_counts(model.config).items()}
    ids = torch.randint(50, (2, 9))
    assert torch.equal(prune.pruned_model(model, everything)(ids).hidden_BTD, model(ids).hidden_BTD)


def test_curve(make_model):
    model = make_model()
    scores = scores_of(model.config)
    points = prune.curve(
        model.config,
        [0.0, 0.3],
        lambda share: prune.keep_share(model.config, scores, share),
        lambda keep: float(sum(map(len, keep.values()))),
        itemsize=4,
        seq_len=12,
    )
    total = sum(parameter.numel() for parameter in model.parameters())
    assert points[0].parameters == total and points[0].pruned_share == 0 and points[0].bytes == 4 * total
    assert points[0].loss == 18 and points[1].loss == points[1].attention + points[1].mlp < 18
    assert 0.2 < points[1].pruned_share <= 0.3 and points[1].flops_per_token < points[0].flops_per_token


@pytest.fixture
def undecided(make_model, make_data):
    """(model whose routers give all modules the same probability, its use on data, modules that are chosen)."""
    model = make_model(n_mlp_experts=6)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gate.w_gate.3.weight"):
                parameter.zero_()
    data = make_data()
    statistics = collect(model, data, seq_len=12, batch=4)
    chosen = {
        place: [i for i, frequency in enumerate(frequencies) if frequency]
        for place, frequencies in statistics.frequencies().items()
    }
    assert sum(map(len, chosen.values())) < sum(module_counts(model.config).values())
    return model, statistics, chosen


def test_rescaled_outputs_undo_the_growth_of_the_gates(undecided):
    model, statistics, chosen = undecided
    ids = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(0))
    whole = model(ids).hidden_BTD
    grown = prune.pruned_model(model, chosen)(ids).hidden_BTD
    rescaled = prune.pruned_model(model, chosen, prune.remaining_shares(statistics, chosen))(ids).hidden_BTD
    assert not torch.allclose(grown, whole, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(rescaled, whole, rtol=1e-5, atol=1e-5)


def test_rescaling_is_the_same_on_disk_and_gradients_shrink_as_weights_grow(undecided, make_checkpoint, tmp_path):
    model, statistics, chosen = undecided
    scale = prune.remaining_shares(statistics, chosen)
    source = make_checkpoint(model)
    slots = {place: [Kept(i, scale[place]) for i in kept] for place, kept in chosen.items()}
    path = rearrange(source, tmp_path / "out", slots, what={})
    on_disk, _ = load_model(path)
    for name, value in prune.pruned_model(model, chosen, scale).state_dict().items():
        assert torch.equal(value, on_disk.state_dict()[name]), name
    place, kept = next((place, kept) for place, kept in chosen.items() if scale[place] < 1)
    inner, outer = (expert_name(key, kept[0]) for key in place.expert_keys())
    with Checkpoint(path) as edited:
        for name, powers in ((inner, (0, 0)), (outer, (-1, -2))):
            moved = expert_name(name.rsplit(".", 1)[0], 0)
            for group, power in zip(("exp_avg", "exp_avg_sq"), powers):
                expected = source.tensor(name, group) * scale[place] ** power
                torch.testing.assert_close(edited.tensor(moved, group), expected)


def test_where_nothing_goes_nothing_is_rescaled(undecided):
    model, statistics, _ = undecided
    everything = {place: list(range(count)) for place, count in module_counts(model.config).items()}
    assert set(prune.remaining_shares(statistics, everything).values()) == {1.0}

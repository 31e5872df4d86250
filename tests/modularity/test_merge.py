"""Averages, task vectors and merged duplicates."""

import pytest
import torch

from megamf.checkpoint import Checkpoint, verify
from megamf.errors import UserError
from megamf.evaluate.load import load_model
from megamf.modularity import merge
from megamf.modularity.edit import rearrange
from megamf.modularity.places import Place
from megamf.modularity.similarity import similarity


def test_average_and_task_arithmetic(make_model, make_checkpoint, tmp_path):
    parts = [make_checkpoint(make_model(seed=seed), f"part{seed}") for seed in range(3)]
    coefficients = merge.task_arithmetic(2, [0.5])
    assert coefficients == [0.0, 0.5, 0.5] and merge.task_arithmetic(2, [1.0, 0.25]) == [-0.25, 1.0, 0.25]
    path = merge.combine(parts, [0.2, 0.3, 0.5], tmp_path / "out", what={"rule": "test"})
    with Checkpoint(path) as merged:
        assert not verify(path) and merged.groups == ("weights",)
        for key in merged.logical_shapes():
            expected = sum(c * part.full(key).double() for c, part in zip((0.2, 0.3, 0.5), parts)).float()
            assert torch.equal(merged.full(key), expected), key
        assert {row.provenance for row in merged.modules} == {"merged"}
        assert [parent["coefficient"] for parent in merged.state["origin"]["parents"]] == [0.2, 0.3, 0.5]
        assert "optimizer_step" not in merged.state
    alone = merge.combine(parts[:1], [1.0], tmp_path / "alone", what={})
    with Checkpoint(alone) as copy:
        assert all(torch.equal(copy.full(key), parts[0].full(key)) for key in copy.logical_shapes())


def test_what_does_not_fit_is_refused(make_model, make_checkpoint, tmp_path):
    first = make_checkpoint(make_model(), "first")
    wider = make_checkpoint(make_model(ffd_hidden=24), "wider")
    with pytest.raises(
        UserError, match=r"not of one architecture: .*experts.weight is \[5, 16, 24\] and \[5, 16, 20\]"
    ):
        merge.combine([first, wider], [0.5, 0.5], tmp_path / "out", what={})
    with pytest.raises(UserError, match="2 checkpoints and 1 coefficients"):
        merge.combine([first, first], [1.0], tmp_path / "out", what={})
    with pytest.raises(UserError, match="2 tuned checkpoints and 3 scales"):
        merge.task_arithmetic(2, [1.0, 2.0, 3.0])
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="already holds checkpoints"):
        merge.combine([first], [1.0], first.path.parent, what={})


def test_groups():
    place = Place(0, "mlp")
    matrix = torch.eye(5)
    for i, j, value in ((0, 3, 0.99), (3, 4, 0.98), (0, 4, 0.97), (1, 2, 0.96)):
        matrix[i, j] = matrix[j, i] = value
    assert merge.group_duplicates({place: matrix}, 0.95, {place: 2}) == {place: [[0, 3, 4], [1, 2]]}
    # A pair that is not alike enough keeps its modules out of one group.
    matrix[0, 4] = matrix[4, 0] = 0.5
    assert merge.group_duplicates({place: matrix}, 0.95, {place: 2}) == {place: [[0, 3], [1, 2]]}
    assert merge.group_duplicates({place: matrix}, 0.95, {place: 4}) == {place: [[0, 3]]}
    assert merge.group_duplicates({place: matrix}, 0.995, {place: 2}) == {}


def test_identical_modules_become_one_without_a_trace(make_model, make_checkpoint, make_data, tmp_path):
    """Two halves of one module: each is chosen alone (k = 1 of them), so their sum must do what either did."""
    model = make_model(k_mlp=1, n_mlp_experts=3, gating_size=16)
    with torch.no_grad():
        for block in model.transformer.h:
            experts = block.mlpf
            for tensor in (experts.experts.weight, experts.output_experts.weight):
                tensor[2] = tensor[0]
            rows = experts.gate.w_gate[3].weight
            # The copies share their tokens' choice, and nobody chooses the second.
            rows.zero_()
            experts.gate.w_gate[0].bias.fill_(4.0)
            rows[0], rows[1], rows[2] = 0.02, -0.5, 0.02
    data = make_data(documents=20)
    alike = similarity(model, data, seq_len=12, tokens=200)
    groups = {
        place: found
        for place, found in merge.group_duplicates(alike, 0.9999, dict.fromkeys(alike, 1)).items()
        if place.kind == "mlp"
    }
    assert groups == {Place(layer, "mlp"): [[0, 2]] for layer in (0, 1)}
    rows = merge.merged_rows(model, data, groups, seq_len=12, tokens=400)
    source = make_checkpoint(model)
    shares = {place: [0.6, 0.1, 0.3] for place in groups}
    arrangement = merge.merge_duplicates(source, model, groups, rows, shares)
    path = rearrange(source, tmp_path / "out", arrangement, what={})
    with Checkpoint(path) as merged:
        assert merged.model["n_mlp_experts"] == 2
        made = next(row for row in merged.modules if row.provenance == "merged")
        assert made.index == 0 and made.origin == "L00.mlp.000 + L00.mlp.002"
        old = source.full("transformer.h.1.mlpf.experts.weight")
        new = merged.full("transformer.h.1.mlpf.experts.weight")
        torch.testing.assert_close(new, old[[0, 1]])
    # Two equal modules shared the probability, each with half of it; the one that is left has all.
    small, _ = load_model(path)
    ids = torch.randint(50, (2, 12), generator=torch.Generator().manual_seed(0))
    caught = {}
    for name, which in (("before", model), ("after", small)):
        gate = which.transformer.h[0].mlpf.gate
        hook = gate.register_forward_hook(lambda _, __, out, name=name: caught.update({name: out}))
        with torch.no_grad():
            which(ids)
        hook.remove()
    assert torch.equal(caught["after"].expert_NK, torch.zeros_like(caught["after"].expert_NK))
    torch.testing.assert_close(caught["after"].gate_NK, 2 * caught["before"].gate_NK, rtol=0.02, atol=0)

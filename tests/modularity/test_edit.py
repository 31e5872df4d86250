"""Checkpoints with other modules: tensor by tensor, exact identities, refusals that leave nothing."""

import pytest
import torch

from megamf.checkpoint import Checkpoint, verify
from megamf.errors import UserError
from megamf.evaluate.load import load_model
from megamf.modularity.edit import Kept, Made, find_modules, rearrange
from megamf.modularity.places import Place

MISFIT = Made(lambda _: torch.ones(2, 2), lambda: torch.ones(6), "merged", "x")
GATES = ("mlp", "linear", "gmm")


def ids(batch=2, time=9):
    return torch.randint(50, (batch, time), generator=torch.Generator().manual_seed(0))


def logits_of(path):
    model, _ = load_model(path, torch.float64)
    return model.logits(model(ids()).hidden_BTD)


@pytest.mark.parametrize("gate", GATES)
def test_keeping_everything_changes_nothing(make_model, make_checkpoint, tmp_path, gate):
    source = make_checkpoint(make_model(gate_type=gate))
    path = rearrange(source, tmp_path / "out", {}, what={"job": "test"})
    with Checkpoint(path) as copy:
        assert not verify(path)
        assert copy.groups == source.groups and copy.model == source.model and copy.step == 3
        assert copy.modules == source.modules
        for group in source.groups:
            assert copy.logical_shapes(group) == source.logical_shapes(group)
            for key in source.logical_shapes(group):
                assert torch.equal(copy.full(key, group), source.full(key, group))
        origin = copy.state["origin"]
        assert origin["name"] == "step-00000003" and origin["run_id"] == "before" and origin["edit"] == {"job": "test"}
        assert copy.manifest.run_id not in ("before", "")


@pytest.mark.parametrize("gate", GATES)
def test_modules_that_cannot_be_chosen_leave_no_trace(make_model, make_checkpoint, tmp_path, gate):
    """Their probability is zero: without them everything is as before."""
    model = make_model(gate_type=gate)
    gone = {Place(0, "attention"): [1], Place(1, "mlp"): [0, 3, 4]}
    with torch.no_grad():
        for place, indices in gone.items():
            gate_module = model.get_submodule(f"{place.prefix}.gate")
            if gate == "gmm":
                gate_module.temperature.fill_(9.0)
            elif gate == "mlp":
                gate_module.w_gate[0].bias.fill_(9.0)  # all units of the router on: a negative row stays out
            else:
                norm = model.transformer.h[place.layer].ln_1 if place.kind == "attention" else None
                (norm or model.transformer.h[place.layer].ln_2).bias.fill_(9.0)
            rows = gate_module.expert_rows()
            for index in range(len(rows)):
                rows[index] = rows[index].abs() * (-300 if index in indices else 1)
            if gate == "gmm":
                centre = gate_module.w_gate(torch.randn(64, 16, generator=torch.Generator().manual_seed(1))).mean(0)
                rows.copy_(centre + 0.1 * rows.abs() / rows.abs().max())
                rows[indices] = -centre
                gate_module.w_gate.weight.mul_(0.0)
                gate_module.w_gate.weight[:, 0] = centre
                # x_0 is one and the same positive number for every token.
                block = model.transformer.h[place.layer]
                norm = block.ln_1 if place.kind == "attention" else block.ln_2
                norm.weight[0], norm.bias[0] = 0.0, 1.0
    source = make_checkpoint(model)
    keep = {
        place: [Kept(i) for i in range(4 if place.kind == "attention" else 5) if i not in indices]
        for place, indices in gone.items()
    }
    path = rearrange(source, tmp_path / "out", keep, what={})
    torch.testing.assert_close(logits_of(path), logits_of(source.path), rtol=1e-12, atol=1e-12)
    with Checkpoint(path) as small:
        assert small.model["n_att_experts_per_layer"] == [3, 4] and small.model["n_mlp_experts_per_layer"] == [5, 2]
        assert small.model["n_att_experts"] == 4 and small.state["config"]["model"] == small.model
        key = "transformer.h.1.mlpf.experts.weight"
        for group in source.groups:
            assert torch.equal(small.full(key, group), source.full(key, group)[[1, 2]])
        rows = Place(0, "attention").rows_key(model.config)
        assert torch.equal(small.full(rows, "exp_avg"), source.full(rows, "exp_avg")[[0, 2, 3]])
        assert [m.id for m in small.modules if (m.layer, m.kind) == (1, "mlp")] == ["L01.mlp.001", "L01.mlp.002"]


def test_new_modules(make_model, make_checkpoint, tmp_path):
    source = make_checkpoint(make_model(), groups=("weights", "master", "exp_avg", "exp_avg_sq"))
    place = Place(0, "mlp")
    shapes = {"experts": (16, 20), "output_experts": (20, 16)}
    made = Made(lambda part: torch.full(shapes[part], 0.5), lambda: torch.arange(6.0), "inserted", "test")
    slots = [*(Kept(i) for i in range(5)), made]
    path = rearrange(source, tmp_path / "out", {place: slots}, what={})
    with Checkpoint(path) as grown:
        weight = grown.full("transformer.h.0.mlpf.experts.weight")
        assert weight.shape == (6, 16, 20) and torch.equal(weight[5], torch.full((16, 20), 0.5))
        assert torch.equal(grown.full("transformer.h.0.mlpf.experts.weight", "master")[5], torch.full((16, 20), 0.5))
        assert not grown.full("transformer.h.0.mlpf.output_experts.weight", "exp_avg")[5].any()
        rows = grown.full(place.rows_key(make_model().config))
        assert torch.equal(rows[5], torch.arange(6.0)) and rows.shape == (6, 6)
        assert not grown.full(place.rows_key(make_model().config), "exp_avg_sq")[5].any()
        row = next(m for m in grown.modules if (m.layer, m.kind, m.index) == (0, "mlp", 5))
        assert (row.provenance, row.origin) == ("inserted", "test") and row.id.startswith("L00.mlp.005-")
        assert grown.model["n_mlp_experts_per_layer"] == [6, 5]


@pytest.mark.parametrize(
    ("arrangement", "message"),
    [
        ({Place(0, "mlp"): [Kept(0)]}, "layer 0, mlp: 1 modules would be left, but a token uses 2"),
        ({Place(0, "mlp"): [Kept(0), Kept(5)]}, r"it has 0\.\.4"),
        ({Place(0, "mlp"): [Kept(0), Kept(0)]}, "cannot be kept"),
        ({Place(2, "mlp"): [Kept(0), Kept(1)]}, "has no layer 2"),
        (
            {
                Place(0, "mlp"): [
                    Kept(0),
                    Kept(1),
                    Made(lambda _: torch.ones(2, 2), lambda: torch.ones(6), "merged", "x"),
                ]
            },
            r"shape \[2, 2\], this model needs \[16, 20\]",
        ),
    ],
)
def test_refusals_leave_nothing(make_model, make_checkpoint, tmp_path, arrangement, message):
    source = make_checkpoint(make_model())
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(UserError, match=message):
        rearrange(source, tmp_path / "out", arrangement, what={})
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_existing_checkpoints_are_safe(make_model, make_checkpoint):
    source = make_checkpoint(make_model())
    with pytest.raises(UserError, match="already holds checkpoints"):
        rearrange(source, source.path.parent, {}, what={})


def test_modules_by_id(make_model, make_checkpoint):
    source = make_checkpoint(make_model())
    assert find_modules(source, ["L00.mlp.003", "L01.attention.000"]) == {
        Place(0, "mlp"): {3}, Place(1, "attention"): {0},
    }  # fmt: skip
    with pytest.raises(UserError, match="has no module L07"):
        find_modules(source, ["L07.mlp.000"])

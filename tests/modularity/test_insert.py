"""New modules: where they come from, and that quiet ones change nothing."""

import pytest
import torch

from megamf.checkpoint import Checkpoint, verify
from megamf.errors import UserError
from megamf.evaluate.load import load_model
from megamf.modularity import insert
from megamf.modularity.edit import model_of, rearrange
from megamf.modularity.places import Place


def grow(source, out, template, row, numbers=None, zero_output=False):
    numbers = numbers or {"attention": 1, "mlp": 2}
    slots = insert.arrangement(source, numbers, template, row, zero_output=zero_output)
    return rearrange(source, out, slots, what={"job": "insert"})


def random_parts(source):
    model = model_of(source)
    return (
        lambda place, number: insert.random_template(model, place, number, 7),
        lambda place, number, made: insert.random_row(model, place, number, 7),
    )


def test_random_modules_are_like_fresh_ones_and_repeat(make_model, make_checkpoint, tmp_path):
    source = make_checkpoint(make_model())
    first, again = (grow(source, tmp_path / name, *random_parts(source)) for name in ("one", "two"))
    with Checkpoint(first) as one, Checkpoint(again) as two:
        assert not verify(first) and one.model["n_att_experts"] == 5 and one.model["n_mlp_experts"] == 7
        for key in one.logical_shapes():
            assert torch.equal(one.full(key), two.full(key))
        new = one.full("transformer.h.0.mlpf.experts.weight")[5:]
        assert new.abs().max() <= 1 / 16 and new.std() == pytest.approx(1 / 16 / 3**0.5, rel=0.1)
        assert not torch.equal(new[0], new[1])
        old = source.full("transformer.h.0.mlpf.experts.weight")
        assert torch.equal(one.full("transformer.h.0.mlpf.experts.weight")[:5], old)
        rows = [row for row in one.modules if row.provenance == "inserted"]
        assert len(rows) == 2 * 3 and {row.origin for row in rows} == {"random"}
        assert {row.index for row in rows if row.kind == "mlp"} == {5, 6}


def test_copies_come_from_the_most_used(make_model, make_checkpoint, tmp_path):
    source = make_checkpoint(make_model())
    model = model_of(source)
    frequencies = {Place(layer, "mlp"): [0.1, 0.7, 0.3, 0.7, 0.0] for layer in (0, 1)}
    assert insert.most_used(frequencies, Place(0, "mlp"), 7) == [1, 3, 2, 0, 4, 1, 3]

    def template(noise):
        return lambda place, number: insert.copied_template(
            source, model, place, insert.most_used(frequencies, place, 2)[number], noise, number
        )

    exact = grow(source, tmp_path / "exact", template(0.0), lambda *a: a[2].row(), {"attention": 0, "mlp": 2})
    noisy = grow(source, tmp_path / "noisy", template(0.1), lambda *a: a[2].row(), {"attention": 0, "mlp": 2})
    with Checkpoint(exact) as one, Checkpoint(noisy) as two:
        for key in (*Place(1, "mlp").expert_keys(), Place(1, "mlp").rows_key(model)):
            old = source.full(key)
            assert torch.equal(one.full(key)[5:], old[[1, 3]])
            off = two.full(key)[5] - old[1]
            assert 0.03 < (off.square().mean() / old[1].square().mean()).sqrt() < 0.3
        assert [row.origin for row in one.modules if row.provenance == "inserted"][:2] == [
            "before/L00.mlp.001", "before/L00.mlp.003",
        ]  # fmt: skip


def test_transplants_keep_their_origin(make_model, make_checkpoint, tmp_path):
    source, donor = make_checkpoint(make_model()), make_checkpoint(make_model(seed=5, n_mlp_experts=3), "donor")
    template = lambda place, _: insert.copied_template(donor, model_of(donor), place, 2, 0.0, 0)  # noqa: E731
    path = grow(source, tmp_path / "out", template, random_parts(source)[1], {"attention": 0, "mlp": 1})
    with Checkpoint(path) as grown:
        for key in Place(1, "mlp").expert_keys():
            assert torch.equal(grown.full(key)[5], donor.full(key)[2])
        assert grown.modules[-1].origin == "before/L01.mlp.002"
    with pytest.raises(UserError, match="ffd_hidden is 24 there and 20 here"):
        insert.check_widths(model_of(source), make_model(ffd_hidden=24).config, "mlp", donor.path)
    insert.check_widths(model_of(source), make_model(ffd_hidden=24).config, "attention", donor.path)


@pytest.mark.parametrize("gate", ["mlp", "linear"])
def test_quiet_modules_change_nothing(make_model, make_checkpoint, make_data, tmp_path, gate):
    model = make_model(gate_type=gate)
    with torch.no_grad():
        # Features with a common direction, as trained routers have them.
        for block in model.transformer.h:
            for norm, part in ((block.ln_1, block.attn.q_proj), (block.ln_2, block.mlpf)):
                if gate == "mlp":
                    part.gate.w_gate[0].bias.fill_(1.5)
                else:
                    norm.bias.fill_(1.5)
    source, data = make_checkpoint(model), make_data(documents=20)
    numbers = {"attention": 2, "mlp": 1}
    rows = insert.quiet_rows(model, data, seq_len=12, tokens=300, new=numbers)
    path = grow(source, tmp_path / "out", random_parts(source)[0], lambda place, *_: rows[place], numbers)
    ids = torch.randint(50, (4, 12), generator=torch.Generator().manual_seed(3))
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-6)):
        before, after = (load_model(where, dtype)[0] for where in (source.path, path))
        with torch.no_grad():
            old, new = (m.logits(m(ids).hidden_BTD) for m in (before, after))
        torch.testing.assert_close(new, old, rtol=tolerance, atol=tolerance)


def test_where_no_module_can_be_quiet(make_model, make_data):
    data = make_data()
    with pytest.raises(UserError, match="logits are bounded"):
        insert.quiet_rows(make_model(gate_type="gmm"), data, seq_len=12, new={"attention": 1, "mlp": 1})
    model = make_model(gate_type="linear")
    with torch.no_grad():
        # Every feature occurs with both signs.
        model.transformer.wte.weight[25:] = -model.transformer.wte.weight[:25]
        model.transformer.h[0].ln_1.bias.zero_()
    with pytest.raises(UserError, match="layer 0, attention: no direction is positive"):
        insert.quiet_rows(model, data, seq_len=12, new={"attention": 1, "mlp": 0})


def test_zero_output(make_model, make_checkpoint, tmp_path):
    source = make_checkpoint(make_model())
    path = grow(source, tmp_path / "out", *random_parts(source), zero_output=True)
    with Checkpoint(path) as grown:
        assert not grown.full("transformer.h.1.attn.q_proj.output_experts.weight")[4].any()
        assert grown.full("transformer.h.1.attn.q_proj.experts.weight")[4].any()


def test_the_table_knows_the_load_only_after_training(make_model, make_checkpoint):
    with pytest.raises(UserError, match=r"does not say how often L00\.attention\.000 is used"):
        insert.table_frequencies(make_checkpoint(make_model()))

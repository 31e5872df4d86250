"""Frozen and trained parts: the same outputs, and exactly the gradients that the whole model has there."""

import copy

import pytest
import torch

from megamf.config.run import Tune
from megamf.model.objective import Objective
from megamf.model.tuning import logical_parts, specialise

INSERTED = {(0, "attention"): 1, (0, "mlp"): 2, (1, "mlp"): 1}
ROWS = {"mlp": "w_gate.3.weight", "linear": "w_gate.0.weight", "gmm": "expert_centroids"}


def total_loss(model, tokens, rows):
    objective = Objective(model, 64, measure_rows=rows)
    input_BT = tokens(2, 9)
    loss, sums, norm = objective(input_BT, input_BT.roll(-1, 1), None)
    return loss + 0.1 * sums.prob_ME.square().sum() + sums.entropy_M.sum() + (0.0 if norm is None else 0.3 * norm)


@pytest.mark.parametrize("gate_type", ["mlp", "linear", "gmm"])
@pytest.mark.parametrize("strategy", ["inserted", "router_rows"])
@pytest.mark.parametrize("embeddings", [False, True])
def test_gradients_are_those_of_the_whole_model(make_model, tokens, strategy, gate_type, embeddings):
    whole = make_model(gate_type=gate_type)
    tuned = copy.deepcopy(whole)
    specialise(tuned, Tune(strategy=strategy, embeddings=embeddings), INSERTED)
    for model in (whole, tuned):
        model.train()
        total_loss(model, tokens, "none").backward()
    wanted = {name: parameter.grad for name, parameter in whole.named_parameters()}
    parts, trained = logical_parts(tuned), {}
    assert {part.key for part in parts.values()} == wanted.keys()
    for name, parameter in tuned.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        if parameter.requires_grad:
            part = parts[name]
            own = part.experts or part.rows
            expected = wanted[part.key] if own is None else wanted[part.key][own.start : own.stop]
            assert (parameter.grad - expected).norm() <= 1e-10 * expected.norm(), name
            trained[part.key] = parameter.shape[0]
    rows = {f"transformer.h.{layer}.{'attn.q_proj' if kind == 'attention' else 'mlpf'}" for layer, kind in INSERTED}
    experts = {f"{prefix}.{part}.weight" for prefix in rows for part in ("experts", "output_experts")}
    if strategy == "router_rows":
        routers = {f"{prefix}.gate.{ROWS[gate_type]}" for prefix in rows}
    else:
        routers = {name for name in wanted if ".gate." in name}
    ends = {"transformer.wte.weight", "lm_head.weight"} if embeddings else set()
    assert trained.keys() == experts | routers | ends
    assert all(trained[f"transformer.h.{layer}.mlpf.experts.weight"] == INSERTED[layer, "mlp"] for layer in (0, 1))


@pytest.mark.parametrize("strategy", ["inserted", "router_rows"])
def test_the_norm_is_of_inserted_rows_alone(make_model, tokens, strategy):
    model = make_model()
    specialise(model, Tune(strategy=strategy), INSERTED)
    routers = [block.attn.q_proj.gate for block in model.transformer.h] + [b.mlpf.gate for b in model.transformer.h]
    expected = sum(
        routers[index].expert_rows()[-count:].square().sum().item() for index, count in ((0, 1), (2, 2), (3, 1))
    )
    input_BT = tokens(1, 4)
    norm = Objective(model, 64, measure_rows="inserted")(input_BT, None, None)[2]
    assert norm.item() == pytest.approx(expected)
    norm.backward()
    if strategy == "router_rows":
        assert routers[2].inserted_rows.grad.all()
    else:
        grad = routers[2].w_gate[3].weight.grad
        assert not grad[:-2].any() and grad[-2:].all()


def test_more_inserted_than_there_are(make_model):
    with pytest.raises(ValueError, match="layer 1 has 5 mlp modules, 6 cannot"):
        specialise(make_model(), Tune(strategy="inserted"), {(1, "mlp"): 6})


def test_everything_trains_unless_asked(make_model):
    model = make_model()
    before = dict(model.named_parameters())
    specialise(model, Tune(), INSERTED)
    assert dict(model.named_parameters()) == before and all(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(model.lm_head.weight, before["lm_head.weight"])

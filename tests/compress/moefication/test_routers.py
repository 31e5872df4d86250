"""Routers: scores by their definitions, and training that finds what there is to find."""

import torch
import torch.nn.functional as F

from megamf.compress.moefication import SparseFfn, dense_layers
from megamf.compress.moefication.routers import centres, recovered, train_mlp_router, truth


def test_centres_and_similarity(make_model):
    layer = dense_layers(make_model("opt"))[0]
    label_M = torch.arange(64) % 4
    centre_ED = centres(layer, label_M)
    for e in range(4):
        rows = [layer.gate_DM[:, m].float() for m in range(64) if m % 4 == e]
        mean = sum(row / row.norm() for row in rows) / len(rows)
        assert torch.allclose(centre_ED[e], mean, atol=1e-6)
    sparse = SparseFfn((4, 16, 16, 16), 2, "similarity", "relu")
    sparse.centre_ED.data = centre_ED
    x_ND = torch.randn(9, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found_NE = sparse.scores(x_ND)
    expected_NE = torch.stack([-(F.normalize(x_ND, dim=-1) - c).norm(dim=-1) for c in centre_ED], dim=1)
    assert torch.allclose(found_NE, expected_NE, atol=1e-5)


def test_truth_and_recovered():
    h_NM = torch.tensor([[1.0, -2.0, 0.0, 4.0], [0.0, 0.0, 0.0, 0.0]])
    score_NE = truth(h_NM, torch.tensor([0, 1, 0, 1]))
    assert score_NE.tolist() == [[1.0, 6.0], [0.0, 0.0]]
    assert abs(recovered(score_NE, torch.tensor([[1.0, 0.0], [1.0, 0.0]]), 1) - 1 / 7) < 1e-6
    assert recovered(score_NE, score_NE, 1) > 6 / 7 - 1e-6


def test_training_learns_which_experts_answer():
    generator = torch.Generator().manual_seed(0)
    w_ED = torch.randn(8, 12, generator=generator)
    x_ND = torch.randn(1500, 12, generator=generator)
    score_NE = torch.relu(x_ND @ w_ED.t())
    centre_ED = 0.1 * torch.randn(8, 12, generator=generator)
    router = train_mlp_router(x_ND, score_NE, centre_ED, 2)
    before = train_mlp_router(x_ND, score_NE, centre_ED, 2, epochs=0)
    assert before.epoch == 0 and torch.equal(before.first_ED, centre_ED) and torch.equal(before.last_EE, torch.eye(8))
    assert router.recovered > 0.6 > before.recovered + 0.1
    again = train_mlp_router(x_ND, score_NE, centre_ED, 2)
    assert torch.equal(again.first_ED, router.first_ED) and again.epoch == router.epoch

"""Copies of modules are found, others are not."""

import pytest
import torch

from megamf.modularity.places import Place
from megamf.modularity.similarity import closest_pairs, similarity


@pytest.mark.parametrize("changes", [{}, {"n_head": 2, "att_hidden": 12}])
def test_copies_are_found(make_model, make_data, changes):
    model = make_model(**changes)
    with torch.no_grad():
        for tensor in (model.transformer.h[1].mlpf.experts.weight, model.transformer.h[1].mlpf.output_experts.weight):
            tensor[4] = tensor[1]
        for part in ("experts", "output_experts"):
            weight = getattr(model.transformer.h[0].attn.q_proj, part).weight
            weight[2] = weight[0]
        weight = model.transformer.h[1].attn.q_proj.experts.weight
        weight[3] = weight[2]  # looks alike, answers otherwise
    found = similarity(model, make_data(), seq_len=12, tokens=64)
    pairs = {place: closest_pairs(matrix, 0.999) for place, matrix in found.items()}
    assert [(i, j) for i, j, _ in pairs[Place(1, "mlp")]] == [(1, 4)]
    assert [(i, j) for i, j, _ in pairs[Place(0, "attention")]] == [(0, 2)]
    assert pairs[Place(1, "attention")] == [] and pairs[Place(0, "mlp")] == []
    for matrix in found.values():
        assert torch.allclose(matrix.diagonal(), torch.ones(len(matrix)), atol=1e-5)


def test_against_the_definition(make_model, make_data):
    model = make_model().double()
    matrix = similarity(model, make_data(), seq_len=12, tokens=30)[Place(0, "mlp")]
    from megamf.data.indexed import IndexedDataset

    seen = []
    hook = model.transformer.h[0].ln_2.register_forward_hook(lambda _, __, out: seen.append(out.detach()[0]))
    with IndexedDataset(make_data("again")) as dataset, torch.no_grad():
        tokens = torch.from_numpy(dataset.tokens(0, 36).astype("int64"))
        ends = [int(end) for end in dataset.document_ends]
        start = torch.tensor([max([0, *(e for e in ends if e <= t)]) for t in range(36)])
        for at in range(0, 36, 12):
            model(tokens[None, at : at + 12], start_BT=(start[at : at + 12] - at).clamp(min=0)[None].int())
    hook.remove()
    x = torch.cat(seen)[:30]
    experts = model.transformer.h[0].mlpf
    with torch.no_grad():
        y = [
            torch.nn.functional.gelu(x @ experts.experts.weight[e], approximate="tanh")
            @ experts.output_experts.weight[e]
            for e in (0, 3)
        ]
    expected = (y[0] * y[1]).sum() / (y[0].norm() * y[1].norm())
    assert float(matrix[0, 3]) == pytest.approx(expected.item(), rel=1e-5)

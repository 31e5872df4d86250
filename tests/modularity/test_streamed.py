"""A model of which one block at a time is in memory shows what the whole one does."""

import pytest
import torch

from megamf.evaluate.load import load_model
from megamf.evaluate.weights import open_weights
from megamf.modularity import insert, streamed
from megamf.modularity.similarity import similarity
from megamf.modularity.statistics import collect
from megamf.modularity.streamed import StreamedModel


@pytest.fixture
def both(make_model, make_checkpoint):
    """(the whole model, the streamed one) from one checkpoint with uneven layers."""
    path = make_checkpoint(make_model(n_layer=3, n_mlp_experts_per_layer=[5, 4, 5])).path
    with open_weights(path, torch.float32) as weights:
        yield load_model(path)[0], StreamedModel(weights, torch.float32, "cpu")


def test_forward_passes_are_the_same(both):
    ids = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(0))
    whole, part = (model.logits(model(ids).hidden_BTD) for model in both)
    assert torch.equal(whole, part)


def test_one_block_at_a_time(both, make_data):
    _, part = both
    seen = []

    def look(*_):
        present = [i for i, block in enumerate(part.transformer.h) if not next(block.parameters()).is_meta]
        seen.append(present)

    for block in part.transformer.h:
        block.ln_1.register_forward_hook(look)
    collect(part, make_data(), seq_len=12, batch=2)
    # Every layer once, whatever the number of batches.
    assert seen == sorted(seen) and {tuple(present) for present in seen} == {(0,), (1,), (2,)} and len(seen) > 6


@pytest.mark.parametrize("tokens", [2**16, 30])
def test_statistics_and_similarity_are_the_same(both, make_data, monkeypatch, tokens):
    monkeypatch.setattr(streamed, "GROUP_TOKENS", tokens)
    data, steps = make_data(), []
    whole, part = (collect(m, data, seq_len=12, batch=3, on_batch=lambda *at: steps.append(at)) for m in both)
    assert whole == part
    assert steps[-1][0] == steps[-1][1] == len(steps) // 2
    alike = [similarity(model, data, seq_len=12, tokens=60) for model in both]
    assert alike[0].keys() == alike[1].keys()
    assert all(torch.equal(alike[0][place], alike[1][place]) for place in alike[0])


def test_quiet_rows_are_the_same(both, make_data):
    data, new = make_data(), {"attention": 1, "mlp": 0}
    # Few tokens: a direction in which all their features are positive is there.
    whole, part = (insert.quiet_rows(model, data, seq_len=12, tokens=3, new=new) for model in both)
    assert len(whole) == 3 and all(torch.equal(whole[place], part[place]) for place in whole)

"""Continuations scored in batches, against one forward pass for every token."""

import pytest
import torch

from megamf.errors import UserError
from megamf.evaluate.scoring import score, windows

PAIRS = [
    ([5], [7, 9]),
    ([1, 2, 3, 4], [8]),
    ([200, 11], [12, 13, 14, 15]),
    (list(range(20, 40)), [41, 42]),  # longer than a window: the oldest tokens go
]


def one_by_one(model, context, continuation, seq_len):
    row = [*context, *continuation][-(seq_len + 1) :]
    total, greedy = 0.0, True
    for at in range(len(row) - len(continuation), len(row)):
        logits = model.logits(model(torch.tensor([row[:at]])).hidden_BTD)[0, -1]
        total += logits.log_softmax(-1)[row[at]].item()
        greedy &= logits.argmax().item() == row[at]
    return total, greedy


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_against_one_token_at_a_time(model, batch):
    with torch.no_grad():
        expected = [one_by_one(model, *pair, seq_len=9) for pair in PAIRS]
        best = model.logits(model(torch.tensor([[5]])).hidden_BTD)[0, -1].argmax().item()
    found = score(model, PAIRS, seq_len=9, batch=batch)
    assert [item.logprob for item in found] == pytest.approx([total for total, _ in expected], rel=1e-12)
    assert [item.greedy for item in found] == [greedy for _, greedy in expected]
    assert score(model, [([5], [best])], seq_len=9, batch=batch)[0].greedy


def test_windows_predict_every_token_once():
    ids = list(range(100, 111))
    pairs = list(windows(ids, 0, 4))
    assert [token for _, continuation in pairs for token in continuation] == ids
    assert pairs == [([0], ids[:4]), ([103], ids[4:8]), (ids[6:8], ids[8:])]
    assert list(windows([], 0, 4)) == []


def test_windows_are_those_of_the_harness():
    utils = pytest.importorskip("lm_eval.utils")
    for length in (1, 3, 4, 5, 8, 11):
        ids = list(range(100, 100 + length))
        theirs = [utils.make_disjoint_window(pair) for pair in utils.get_rolling_token_windows(ids, 0, 4, 1)]
        assert [(list(a), list(b)) for a, b in windows(ids, 0, 4)] == [(list(a), list(b)) for a, b in theirs]


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (([], [1]), "empty context"),
        (([1], []), "empty continuation"),
        (([1], list(range(10))), "10 tokens, more than the 9"),
        (([1], [300]), "token id 300"),
    ],
)
def test_mistakes(model, pair, message):
    with pytest.raises(UserError, match=message):
        score(model, [pair], seq_len=9, batch=2)

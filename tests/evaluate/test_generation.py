"""Sampling rules against distributions by hand; batches, stopping, streaming."""

import pytest
import torch

from megamf.errors import UserError
from megamf.evaluate.generation import Sampling, generate, next_token, stream_text


def draw(prob, sampling, count=20000):
    logits = torch.tensor(prob).log().expand(count, -1)
    picked = next_token(logits, sampling, torch.Generator().manual_seed(sampling.seed))
    return torch.bincount(picked, minlength=len(prob)) / count


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(), [0.1, 0.4, 0.3, 0.2]),
        (Sampling(temperature=0), [0, 1, 0, 0]),
        (Sampling(temperature=0.5), [0.01 / 0.3, 0.16 / 0.3, 0.09 / 0.3, 0.04 / 0.3]),
        (Sampling(top_k=2), [0, 4 / 7, 3 / 7, 0]),
        (Sampling(top_k=9), [0.1, 0.4, 0.3, 0.2]),
        (Sampling(top_p=0.75), [0, 4 / 9, 3 / 9, 2 / 9]),
        (Sampling(top_p=0.35), [0, 1, 0, 0]),
        (Sampling(top_p=1e-9), [0, 1, 0, 0]),
        (Sampling(top_k=3, top_p=0.5), [0, 4 / 7, 3 / 7, 0]),
    ],
    ids=str,
)
def test_distributions(sampling, expected):
    assert draw([0.1, 0.4, 0.3, 0.2], sampling).tolist() == pytest.approx(expected, abs=0.015)


@pytest.mark.parametrize(
    ("name", "value"), [("temperature", -1), ("temperature", float("nan")), ("top_k", -1), ("top_p", 0), ("top_p", 1.1)]
)
def test_wrong_settings(name, value):
    with pytest.raises(UserError, match=f"{name}={value}"):
        Sampling(**{name: value})


def run(model, prompts, steps, sampling=None, eod=None):
    rows = list(generate(model, prompts, steps, sampling or Sampling(temperature=0), eod))
    return [[row[b] for row in rows] for b in range(len(prompts))]


def greedy(model, prompt, steps):
    """Without cache and without padding."""
    tokens = list(prompt)
    for _ in range(steps):
        hidden = model(torch.tensor([tokens])).hidden_BTD
        tokens.append(model.logits(hidden[:, -1]).argmax().item())
    return tokens[len(prompt) :]


PROMPTS = [[5, 9, 200, 31], [8], [17, 3, 250, 77, 12, 6, 90]]


def test_a_batch_of_unequal_prompts(model):
    assert run(model, PROMPTS, 9) == [greedy(model, prompt, 9) for prompt in PROMPTS]


def test_rows_stop_by_themselves(model):
    expected = [greedy(model, prompt, 9) for prompt in PROMPTS]
    eod = expected[1][3]
    for row, full in zip(run(model, PROMPTS, 9, eod=eod), expected):
        end = full.index(eod) if eod in full else len(full)
        assert [token for token in row if token is not None] == full[:end]
        assert all(token is None for token in row[end:])
    assert len(run(model, [PROMPTS[1]], 9, eod=eod)[0]) == expected[1].index(eod)


def test_the_seed_decides(model):
    one, again, other = (run(model, PROMPTS, 12, Sampling(temperature=2.0, seed=seed)) for seed in (0, 0, 1))
    assert one == again != other


def test_refused_prompts(model):
    for prompts, message in (
        ([], "no prompt"),
        ([[1], []], "prompt 1 has no token"),
        ([[1, 300]], "token id 300, outside the model's vocabulary of 300"),
        ([[-1]], "token id -1"),
    ):
        with pytest.raises(UserError, match=message):
            next(generate(model, prompts, 3, Sampling()))


class Bytes:
    """A tokenizer of single UTF-8 bytes."""

    def decode(self, ids):
        return bytes(ids).decode("utf-8", "replace")


def test_characters_appear_when_they_are_complete():
    text = "aé中😀\n"
    pieces = list(stream_text(Bytes(), text.encode()))
    assert pieces == list(text)
    assert list(stream_text(Bytes(), "x中".encode()[:-1])) == ["x", "\ufffd"]
    assert list(stream_text(Bytes(), [])) == []

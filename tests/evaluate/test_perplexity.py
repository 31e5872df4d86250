"""Perplexity against document-by-document evaluation, window edges, bytes, and refused data."""

import math

import numpy as np
import pytest
import torch

from megamf.data.indexed import IndexedDataset, IndexedWriter, Metadata
from megamf.errors import UserError
from megamf.evaluate.perplexity import Windows, measure, together

EOD = 7


def documents(lengths, seed=0, vocab=300):
    rng = np.random.default_rng(seed)
    return [np.append(rng.integers(8, vocab, size=length), EOD) for length in lengths]


@pytest.fixture
def dataset(tmp_path):
    def make(docs, name="data", vocab=300, size=None, sha="abc"):
        with IndexedWriter(tmp_path / name, vocab) as writer:
            for document in docs:
                writer.add_document(document)
            metadata = None
            if size is not None:
                tokens = sum(map(len, docs))
                metadata = Metadata("words", sha, vocab, EOD, True, len(docs), tokens, size)
            writer.commit(metadata)
        return tmp_path / name

    return make


def nats(model, document, seq_len, offset):
    """Sum and number of -log p over one document that begins `offset` tokens into a window."""
    total, count = 0.0, 0
    tokens = torch.tensor(document)
    for position in range(1, len(document)):
        begin = max(0, (offset + position - 1) // seq_len * seq_len - offset)
        hidden = model(tokens[None, begin:position]).hidden_BTD
        total -= model.logits(hidden)[0, -1].log_softmax(-1)[tokens[position]].item()
        count += 1
    return total, count


@pytest.mark.parametrize("seq_len", [4, 9, 100])
@pytest.mark.parametrize("batch", [1, 3])
def test_against_single_documents(model, dataset, seq_len, batch):
    docs = documents([5, 0, 11, 3, 1])
    prefix = dataset(docs, size=111)
    expected = [nats(model, doc, seq_len, sum(map(len, docs[:i]))) for i, doc in enumerate(docs)]
    loss = sum(total for total, _ in expected) / sum(count for _, count in expected)
    with torch.no_grad():
        found = measure(model, prefix, seq_len=seq_len, batch=batch)
    assert found.tokens == sum(len(doc) - 1 for doc in docs)
    assert found.loss == pytest.approx(loss, rel=1e-10)
    assert found.perplexity == pytest.approx(math.exp(loss), rel=1e-10)
    tokens = sum(map(len, docs))
    assert found.bits_per_byte == pytest.approx(loss / math.log(2) * tokens / 111, rel=1e-10)


def test_every_token_is_predicted_once(dataset):
    docs = documents([5, 0, 11, 3, 1, 30])
    with IndexedDataset(dataset(docs)) as opened:
        windows = Windows(opened, 6)
        labels = np.concatenate([windows[i][1] for i in range(len(windows))])
    expected = np.concatenate([doc[1:] for doc in docs])
    assert labels[labels != -100].tolist() == expected.tolist()


def test_batches_are_spread(dataset):
    with IndexedDataset(dataset(documents([99]))) as opened:
        windows = Windows(opened, 10)
        assert len(windows) == 10
        assert windows.batches(4, None) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
        assert windows.batches(4, 2) == [[0, 1, 2, 3], [8, 9]]
        assert windows.batches(4, 99) == windows.batches(4, None)


def test_limit_and_progress(model, dataset):
    seen = []
    prefix = dataset(documents([99]))
    found = measure(model, prefix, seq_len=10, batch=2, max_batches=3, on_batch=lambda *at: seen.append(at))
    assert seen == [(1, 3), (2, 3), (3, 3)] and found.tokens < 99 and found.bits_per_byte is None


def test_bytes_measured_by_the_tokenizer(model, dataset):
    class Tokenizer:
        name, sha256, vocab_size, eod_id = "words", "abc", 300, EOD

        def decode(self, ids):
            return "é" * len(ids)

    docs = documents([5, 9])
    found = measure(model, dataset(docs), seq_len=8, batch=2, tokenizer=Tokenizer())
    # Two bytes a token, none for the document ends.
    assert found.bytes == pytest.approx(found.tokens * 28 / 16)


def test_several_datasets_weigh_by_tokens(model, dataset):
    parts = [documents([5, 9]), documents([20], seed=1)]
    results = [measure(model, dataset(docs, f"d{i}", size=50), seq_len=64, batch=1) for i, docs in enumerate(parts)]
    whole = together(results)
    joined = measure(model, dataset([*parts[0], *parts[1]], "all", size=100), seq_len=64, batch=1)
    assert whole.loss == pytest.approx(joined.loss) and whole.tokens == joined.tokens
    nats = sum(result.loss * result.tokens for result in results)
    assert whole.bits_per_byte == pytest.approx(nats / math.log(2) / sum(result.bytes for result in results))


def test_refused_data(model, dataset):
    class Other:
        name, sha256, vocab_size, eod_id = "other", "xyz", 300, EOD

    large = documents([9], vocab=400)
    cases = [
        (
            dataset(large, "large", vocab=400),
            {},
            r"holds token id \d+, outside .* vocabulary of 300",
        ),
        (dataset(documents([9]), "told", vocab=400, size=9), {}, "vocabulary of 400 .* model has 300"),
        (dataset(documents([9]), "sha", size=9), {"tokenizer": Other()}, "sha256 abc.* has sha256 xyz"),
        (dataset([np.array([EOD])] * 3, "short"), {}, "nothing to predict"),
    ]
    for prefix, options, message in cases:
        with pytest.raises(UserError, match=message):
            measure(model, prefix, seq_len=16, batch=2, **options)

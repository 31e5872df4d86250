"""Blends against a naive packing that joins whole epochs in memory, and their proportions against the weights."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megamf.data.blend import MAX_PERIOD, Blend, Documents, integer_shares, source_schedule
from megamf.data.indexed import IndexedDataset, IndexedWriter
from megamf.data.shuffle import derive_key, permute
from megamf.errors import UserError

EOD = 0
NUM_DOCUMENTS = (30, 11)


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    """Two datasets whose tokens are all different within one, so that a token tells where it came from."""
    folder = tmp_path_factory.mktemp("blend")
    rng = np.random.default_rng(0)
    made = []
    for name, count in zip("ab", NUM_DOCUMENTS):
        token = 1
        with IndexedWriter(folder / name, 60_000) as writer:
            for length in rng.integers(0, 20, count):
                writer.add_document([*range(token, token + length), EOD])
                token += length
            writer.commit()
        made.append(IndexedDataset(folder / name))
    return made


def naive_epoch(documents: Documents, seq_len: int, seed: int, source: int, epoch: int) -> list[list[int]]:
    """The windows of one epoch in their order, by joining everything."""
    count = documents.end - documents.begin
    order = permute(np.arange(count), count, derive_key("documents", seed, source, epoch))
    joined = [t for d in order for t in documents.dataset.document(documents.begin + int(d)).tolist()]
    num = (len(joined) - 1) // seq_len
    windows = [joined[n * seq_len : (n + 1) * seq_len + 1] for n in range(num)]
    return [windows[n] for n in permute(np.arange(num), num, derive_key("windows", seed, source, epoch))]


@pytest.mark.parametrize("seq_len", [1, 7, 32])
@pytest.mark.parametrize("span", [(0, 30), (4, 19)])
def test_one_source_against_naive_packing(datasets, seq_len, span):
    documents = Documents(datasets[0], *span)
    blend = Blend([documents], [2.5], seq_len, seed=5)
    expected = [w for epoch in range(3) for w in naive_epoch(documents, seq_len, 5, 0, epoch)]
    assert blend.num_windows * 3 == len(expected)
    got = [blend.sample(i) for i in range(len(expected))]
    assert [tokens.tolist() for tokens in got] == expected
    assert {tokens.dtype for tokens in got} == {np.dtype(np.int64)}


def test_two_sources_against_naive_packing(datasets):
    documents = [Documents.all_of(dataset) for dataset in datasets]
    blend = Blend(documents, [3, 1], 8, seed=1)
    queues = [[w for e in range(9) for w in naive_epoch(d, 8, 1, s, e)] for s, d in enumerate(documents)]
    taken = [0, 0]
    for i in range(100):
        source, rank = blend.locate(i)
        assert rank == taken[source]
        assert blend.sample(i).tolist() == queues[source][rank]
        taken[source] += 1
    assert taken == [75, 25]


def test_every_window_of_an_epoch_once(datasets):
    blend = Blend([Documents.all_of(datasets[0])], [1], 16, seed=3)
    for epoch in range(3):
        numbers = range(epoch * blend.num_windows, (epoch + 1) * blend.num_windows)
        inputs = np.concatenate([blend.sample(i)[:-1] for i in numbers])
        inputs = inputs[inputs != EOD]
        assert len(set(inputs.tolist())) == len(inputs)
        assert len(inputs) > datasets[0].num_tokens - NUM_DOCUMENTS[0] - 16


def test_sample_depends_on_seed_and_number_only(datasets):
    documents = [Documents.all_of(dataset) for dataset in datasets]
    first, second = (Blend(documents, [0.7, 0.3], 16, seed=9) for _ in range(2))
    numbers = [*np.random.default_rng(0).integers(0, 500, 60).tolist(), 10**9]
    in_order = {int(i): first.sample(int(i)).tolist() for i in sorted(numbers)}
    assert all(second.sample(int(i)).tolist() == in_order[int(i)] for i in numbers)
    other = Blend(documents, [0.7, 0.3], 16, seed=10)
    assert [other.sample(i).tolist() for i in range(5)] != [first.sample(i).tolist() for i in range(5)]


def test_epochs_differ(datasets):
    blend = Blend([Documents.all_of(datasets[0])], [1], 16, seed=3)
    num = blend.num_windows
    epochs = [[blend.sample(e * num + i).tolist() for i in range(num)] for e in range(2)]
    assert epochs[0] != epochs[1]


def test_documents_keep_to_their_span(datasets):
    held = Blend([Documents(datasets[0], 20, 30)], [1], 4, seed=0)
    trained = Blend([Documents(datasets[0], 0, 20)], [1], 4, seed=0)
    tokens = [{t for i in range(b.num_windows * 3) for t in b.sample(i).tolist()} - {EOD} for b in (held, trained)]
    assert tokens[0]
    assert not tokens[0] & tokens[1]


WEIGHTS = st.lists(st.integers(1, 30).map(lambda n: n / 10) | st.integers(1, 50), min_size=1, max_size=7)


@settings(max_examples=40, deadline=None)
@given(WEIGHTS)
def test_proportions_within_one_sample_at_any_prefix(weights):
    shares = integer_shares(weights)
    total = sum(Fraction(repr(float(w))) for w in weights)
    assert [Fraction(share, sum(shares)) for share in shares] == [Fraction(repr(float(w))) / total for w in weights]
    source_of, rank_of = source_schedule(shares)
    counts = np.zeros(len(weights), dtype=np.int64)
    bound = 1 - Fraction(1, 2 * max(1, len(weights) - 1))
    for time, (source, rank) in enumerate(zip(source_of, rank_of), start=1):
        assert rank == counts[source]
        counts[source] += 1
        ideal = [Fraction(share * time, sum(shares)) for share in shares]
        assert all(abs(int(count) - want) <= bound for count, want in zip(counts, ideal))
    assert counts.tolist() == shares


def test_awkward_weights_are_rounded_to_the_longest_period():
    weights = [0.123456789, 1 / 3, 2.718281828]
    shares = integer_shares(weights)
    assert sum(shares) == MAX_PERIOD
    for share, weight in zip(shares, weights):
        assert abs(share - weight / sum(weights) * MAX_PERIOD) < 1
    source_of, _ = source_schedule(shares)
    counts = np.cumsum(np.eye(3, dtype=np.int64)[source_of], axis=0)
    ideal = np.arange(1, MAX_PERIOD + 1)[:, None] * np.array(shares) / MAX_PERIOD
    assert np.abs(counts - ideal).max() < 1


def test_vanishing_weight():
    with pytest.raises(UserError, match=r"1e-09 is less than 1/65536 of .* 1\.0"):
        integer_shares([1, 1e-9])


def test_equal_weights_take_turns():
    assert source_schedule(integer_shares([2, 2, 2]))[0].tolist() == [0, 1, 2]


def test_source_smaller_than_one_sample(datasets):
    size = datasets[1].num_tokens
    with pytest.raises(
        UserError, match=rf"b has {size} tokens in 11 documents; one sample of seq_len {size} takes {size + 1}"
    ):
        Blend([Documents.all_of(datasets[1])], [1], size, seed=0)
    assert Blend([Documents.all_of(datasets[1])], [1], size - 1, seed=0).num_windows == 1


def test_ids_outside_the_vocabulary_name_the_document(tmp_path):
    with IndexedWriter(tmp_path / "d", 1000) as writer:
        for n in range(20):
            writer.add_document([1, 2, 999 if n == 13 else 3, 4, 0])
        writer.commit()
    blend = Blend([Documents.all_of(IndexedDataset(tmp_path / "d"))], [1], 6, seed=0, vocab_size=999)
    with pytest.raises(UserError, match=r"token id 999 in document 13 of .*d \(sample \d+\) .* vocabulary of 999"):
        for i in range(blend.num_windows):
            blend.sample(i)


def test_negative_sample():
    with pytest.raises(IndexError):
        Blend.locate(Blend.__new__(Blend), -1)

"""Micro batches: the same global batch for any number of ranks, document starts, masked labels, clear refusals."""

import threading

import numpy as np
import pytest
import torch

from megamf.config import validate
from megamf.config.run import Source
from megamf.data.indexed import IndexedDataset, IndexedWriter, Metadata
from megamf.data.loader import (
    StepLoader,
    document_end,
    micro_batch,
    open_train,
    open_valid,
    source_names,
    valid_bytes_per_token,
)
from megamf.data.tokenizer import train_sentencepiece
from megamf.data.zigzag import join_parts
from megamf.errors import UserError

EOD, VOCAB = 2, 5000


def write(prefix, count, *, seed=0, vocab_size=VOCAB, eod_id=EOD, sha="ab", metadata=True, num_bytes=900):
    rng = np.random.default_rng(seed)
    with IndexedWriter(prefix, vocab_size) as writer:
        for n in range(count):
            # The first token of a document is its own, so that it tells which documents were read.
            writer.add_document([1000 + n, *rng.integers(3, 900, rng.integers(0, 30)), eod_id])
        described = Metadata("t", sha, vocab_size, eod_id, True, count, writer.num_tokens, num_bytes)
        writer.commit(described if metadata else None)


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "a", 100)
    write(tmp_path / "b", 40, seed=1)
    return tmp_path


def configuration(folder, *, train=(("a", 1.0),), valid=(), seq_len=16, global_batch=8, **data):
    return validate(
        {
            "run": {"seed": 4},
            "model": {"vocab_size": VOCAB},
            "train": {"seq_len": seq_len, "global_batch": global_batch},
            "data": {
                "train": [{"path": str(folder / name), "weight": weight} for name, weight in train],
                "valid": [{"path": str(folder / name), "weight": weight} for name, weight in valid],
                **data,
            },
        }
    )


def rows(batches):
    return [row.tolist() for batch in batches for row in batch.input_BT]


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("size", [1, 2])
def test_union_over_ranks_is_the_same(folder, num_ranks, size):
    blend = open_train(configuration(folder, train=(("a", 0.6), ("b", 0.4))))
    for consumed in (0, 8, 800):
        union = []
        for rank in range(num_ranks):
            with StepLoader(blend, 8, size, rank, num_ranks, EOD, True) as loader:
                batches = loader.step(consumed)
            assert [batch.input_BT.shape for batch in batches] == [(size, 16)] * (8 // num_ranks // size)
            union += rows(batches)
        assert union == [blend.sample(i)[:-1].tolist() for i in range(consumed, consumed + 8)]


@pytest.mark.parametrize("context", [2, 4])
def test_ranks_that_share_sequences_hold_their_parts(folder, context):
    """Labels and document starts are those of the whole sequence, which the parts join to."""
    blend = open_train(configuration(folder))
    with StepLoader(blend, 8, 2, 1, 2, EOD, True) as loader:
        whole = loader.step(8)
    parts = []
    for context_rank in range(context):
        with StepLoader(blend, 8, 2, 1, 2, EOD, True, context_rank, context) as loader:
            parts.append(loader.step(8))
    for n, batch in enumerate(whole):
        for name in ("input_BT", "label_BT", "start_BT"):
            assert torch.equal(join_parts([getattr(part[n], name) for part in parts]), getattr(batch, name)), name
    with StepLoader(blend, 8, 2, 0, 1, EOD, False, 1, context) as loader:
        assert loader.step(0)[0].start_BT is None


def test_resume_equals_continuing(folder):
    config = configuration(folder)
    with StepLoader(open_train(config), 8, 2, 0, 2, EOD, True) as loader:
        straight = [loader.step(consumed) for consumed in range(0, 200, 8)]
    with StepLoader(open_train(config), 8, 2, 0, 2, EOD, True) as loader:
        resumed = [loader.step(consumed) for consumed in range(80, 200, 8)]
        again = loader.step(0)
    for one, other in zip([*straight[10:], straight[0]], [*resumed, again]):
        for a, b in zip(one, other):
            assert torch.equal(a.input_BT, b.input_BT)
            assert torch.equal(a.label_BT, b.label_BT)
            assert torch.equal(a.start_BT, b.start_BT)


def test_starts_and_labels_against_a_loop():
    rng = np.random.default_rng(0)
    samples = [rng.choice([EOD, 7, 8, 9], 21, p=[0.3, 0.3, 0.2, 0.2]) for _ in range(50)] + [np.full(21, EOD)]
    batch = micro_batch(samples, EOD)
    assert (batch.input_BT.dtype, batch.label_BT.dtype, batch.start_BT.dtype) == (torch.int64, torch.int64, torch.int32)
    for row, tokens in enumerate(samples):
        start = 0
        for t in range(20):
            if t and tokens[t - 1] == EOD:
                start = t
            assert batch.input_BT[row, t] == tokens[t]
            assert batch.start_BT[row, t] == start
            assert batch.label_BT[row, t] == (-100 if tokens[t] == EOD else tokens[t + 1])


def test_without_document_mask():
    sample = np.array([5, EOD, 6, 7])
    batch = micro_batch([sample], None)
    assert batch.start_BT is None
    assert batch.label_BT.tolist() == [[EOD, 6, 7]]


def test_reads_ahead_and_leaves_no_thread(folder):
    before = threading.active_count()
    blend = open_train(configuration(folder))
    with StepLoader(blend, 8, 2, 0, 1, EOD, False) as loader:
        first = loader.step(0)
        assert first[0].start_BT is None
        assert threading.active_count() == before + 1
        assert rows(loader.step(8)) == [blend.sample(i)[:-1].tolist() for i in range(8, 16)]
    assert threading.active_count() == before


def test_errors_of_the_background_reach_the_step(folder):
    config = configuration(folder)
    blend = open_train(config)
    blend.vocab_size = 1050
    with StepLoader(blend, 8, 1, 0, 1, EOD, True) as loader, pytest.raises(UserError, match="document"):
        for consumed in range(0, 200, 8):
            loader.step(consumed)


def test_portions_must_fit(folder):
    blend = open_train(configuration(folder))
    with pytest.raises(
        UserError, match=r"global_batch=8 is not divisible by .*micro_batch=2 x 3 data-parallel ranks = 6"
    ):
        StepLoader(blend, 8, 2, 0, 3, EOD, True)
    with pytest.raises(UserError, match="not None"):
        StepLoader(blend, 8, 2, 0, 1, None, True)


def documents_of(blend):
    return {t for i in range(blend.num_windows * 2) for t in blend.sample(i).tolist() if t >= 1000}


def test_valid_fraction_is_disjoint_and_the_same_for_every_seed(folder):
    config = configuration(folder, train=(("a", 1), ("b", 1)), valid_fraction=0.07, seq_len=4)
    train, valid = open_train(config), open_valid(config)
    assert [(s.documents.begin, s.documents.end) for s in train.sources] == [(0, 93), (0, 37)]
    held = [source.documents for item in valid for source in item.blend.sources]
    assert [(documents.begin, documents.end) for documents in held] == [(93, 100), (37, 40)]
    assert [(item.name, item.share) for item in valid] == [("a", 0.5), ("b", 0.5)]
    only = configuration(folder, valid_fraction=0.07, seq_len=4)
    assert not documents_of(open_train(only)) & documents_of(open_valid(only)[0].blend)
    config.run.seed = 99
    for again, item in zip(open_valid(config), valid, strict=True):
        assert all((again.blend.sample(i) == item.blend.sample(i)).all() for i in range(20))
    assert any((open_train(config).sample(i) != train.sample(i)).any() for i in range(20))


def test_valid_sources(folder):
    assert open_valid(configuration(folder)) == []
    [valid] = open_valid(configuration(folder, valid=(("b", 3),)))
    assert valid.blend.sources[0].documents.dataset.num_documents == 40
    assert (valid.name, valid.share) == ("b", 1.0)


def test_names_tell_sources_apart():
    def names(*paths):
        return source_names([Source(path=path) for path in paths])

    assert names("data/en", "data/de") == ["en", "de"]
    assert names("en/valid", "de/valid") == ["en/valid", "de/valid"]
    assert names("x", "x") == ["0:x", "1:x"]


def test_valid_fraction_too_large(folder):
    write(folder / "tiny", 1)
    with pytest.raises(UserError, match=r"valid_fraction=0\.5 takes all of the 1 documents"):
        open_train(configuration(folder, train=(("tiny", 1),), valid_fraction=0.5))


def test_bytes_per_token(folder):
    a, b = (IndexedDataset(folder / name).num_tokens for name in "ab")
    assert valid_bytes_per_token(configuration(folder)) is None
    weighted = valid_bytes_per_token(configuration(folder, valid=(("a", 3), ("b", 1))))
    assert weighted == pytest.approx(0.75 * 900 / a + 0.25 * 900 / b)
    assert valid_bytes_per_token(configuration(folder, valid_fraction=0.1)) == pytest.approx(900 / a)
    write(folder / "bare", 10, metadata=False)
    assert valid_bytes_per_token(configuration(folder, valid=(("bare", 1),))) is None


def test_document_end(folder):
    assert document_end(configuration(folder)) == EOD
    write(folder / "bare", 10, metadata=False)
    bare = (("bare", 1),)
    assert document_end(configuration(folder, train=bare, document_mask=False)) is None
    with pytest.raises(UserError, match=r"data\.document_mask=true needs"):
        document_end(configuration(folder, train=bare))
    write(folder / "other", 10, eod_id=3)
    with pytest.raises(UserError, match=r"different token ids: 2 in .*a, 3 in .*other"):
        document_end(configuration(folder, train=(("a", 1), ("other", 1))))


def test_corpus_smaller_than_one_batch(folder):
    num = open_train(configuration(folder)).num_windows
    with pytest.raises(UserError, match=rf"holds {num} samples of train\.seq_len=16, less .*global_batch={num + 1}"):
        open_train(configuration(folder, global_batch=num + 1))
    with pytest.raises(UserError, match=r"one sample of seq_len 9999 takes 10000"):
        open_train(configuration(folder, seq_len=9999))


def test_no_training_data(folder):
    with pytest.raises(UserError, match=r"data\.train is empty"):
        open_train(configuration(folder, train=()))
    with pytest.raises(UserError, match=r"no file .*none\.bin"):
        open_train(configuration(folder, train=(("none", 1),)))


def test_vocabulary_larger_than_the_models(folder):
    write(folder / "wide", 20, vocab_size=6000)
    with pytest.raises(UserError, match=r"vocabulary of 6000 .*model\.vocab_size=5000"):
        open_train(configuration(folder, train=(("wide", 1),)))


def test_different_tokenizers(folder):
    write(folder / "other", 20, sha="cd")
    with pytest.raises(UserError, match=r"different tokenizers .*ab in .*a, cd in .*other"):
        open_train(configuration(folder, train=(("a", 1), ("other", 1))))


def test_metadata_of_another_dataset(folder):
    (folder / "a.json").write_bytes((folder / "b.json").read_bytes())
    with pytest.raises(UserError, match=r"a\.json describes 40 documents .* beside it 100"):
        open_train(configuration(folder))


def test_tokenizer_of_the_configuration(folder):
    path = folder / "t.model"
    sha = train_sentencepiece([f"abc = {n}\n" for n in range(99)], path, 278).sha256
    with pytest.raises(UserError, match=rf"tokenizer t \(sha256 ab\), but data\.tokenizer=.*{sha[:12]}"):
        open_train(configuration(folder, tokenizer=str(path)))
    write(folder / "its", 100, sha=sha)
    assert open_train(configuration(folder, train=(("its", 1),), tokenizer=str(path))).num_windows > 8
    write(folder / "bare", 100, metadata=False)
    assert document_end(configuration(folder, train=(("bare", 1),), tokenizer=str(path))) == 2


def test_without_mapping_the_samples_are_the_same(folder, monkeypatch):
    mapped = open_train(configuration(folder))
    wanted = [mapped.sample(i).tolist() for i in range(5)]

    def refuse(*args, **kwargs):
        raise PermissionError("this file system maps nothing")

    monkeypatch.setattr(np, "memmap", refuse)
    with pytest.raises(UserError, match=r"data\.mmap=false"):
        open_train(configuration(folder))
    plain = open_train(configuration(folder, mmap=False))
    assert [plain.sample(i).tolist() for i in range(5)] == wanted

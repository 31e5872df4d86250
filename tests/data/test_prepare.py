"""Prepared datasets hold the documents in order, whatever the workers; failures leave nothing behind."""

import errno
import os
import random
import signal

import pytest

from megamf.data import prepare as room
from megamf.data.indexed import IndexedDataset, IndexedWriter, read_metadata
from megamf.data.prepare import default_workers, prepare
from megamf.data.sources import Options, find_parts
from megamf.data.tokenizer import load_tokenizer, train_sentencepiece
from megamf.errors import UserError


def documents(count, seed=0):
    rng = random.Random(seed)
    words = ["alpha", "beta", "gamma", "delta", "=", "(", ")", ":", "12", "é\n"]
    return [" ".join(rng.choices(words, k=rng.randrange(1, 60))) for _ in range(count)]


TEXTS = documents(101)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("prepare") / "t.model"
    train_sentencepiece(TEXTS, path, 290)
    return path


@pytest.fixture
def parts(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for n, text in enumerate(TEXTS):
        (folder / f"{n:03d}.txt").write_text(text)
    return find_parts([folder], Options())


def contents(prefix):
    with IndexedDataset(prefix) as dataset:
        return [dataset.document(i).tolist() for i in range(dataset.num_documents)]


def files(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("append_eod", [True, False])
def test_documents_in_order(parts, tokenizer, tmp_path, append_eod):
    loaded = load_tokenizer(tokenizer)
    progress = []
    prepared = prepare(
        parts, tokenizer, tmp_path / "deep" / "out", append_eod=append_eod, workers=1, on_progress=progress.append
    )
    end = [loaded.eod_id] if append_eod else []
    expected = [loaded.encode(text) + end for text in TEXTS]
    assert contents(tmp_path / "deep" / "out") == expected
    metadata = read_metadata(tmp_path / "deep" / "out")
    assert prepared.datasets == {tmp_path / "deep" / "out": metadata}
    assert metadata.documents == 101
    assert metadata.tokens == sum(map(len, expected))
    assert metadata.bytes == sum(len(text.encode()) for text in TEXTS)
    assert (metadata.vocab_size, metadata.eod_id, metadata.appended_eod) == (290, 2, append_eod)
    assert (metadata.tokenizer, metadata.tokenizer_sha256) == ("t", loaded.sha256)
    assert sum(progress) == sum(part.size for part in parts)


def test_output_is_independent_of_workers(parts, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(room, "CHUNK_BYTES", 500)
    for workers in (1, 2, 3):
        prepare(parts, tokenizer, tmp_path / f"w{workers}", workers=workers, valid_fraction=0.1)
    for side in ("train", "valid"):
        for suffix in (".bin", ".idx", ".json"):
            assert len({(tmp_path / f"w{n}-{side}{suffix}").read_bytes() for n in (1, 2, 3)}) == 1


@pytest.mark.parametrize(("fraction", "held"), [(0.1, 10), (0.25, 25), (0.01, 1), (0.99, 99)])
def test_valid_fraction(parts, tokenizer, tmp_path, fraction, held, monkeypatch):
    monkeypatch.setattr(room, "CHUNK_BYTES", 700)
    prepare(parts, tokenizer, tmp_path / "whole", workers=1)
    prepare(parts, tokenizer, tmp_path / "out", workers=1, valid_fraction=fraction)
    whole, train, valid = (contents(tmp_path / name) for name in ("whole", "out-train", "out-valid"))
    assert len(valid) == held
    assert sorted(train + valid) == sorted(whole)
    numbers = [n for n in range(101) if int((n + 1) * fraction + 1e-9) > int(n * fraction + 1e-9)]
    assert valid == [whole[n] for n in numbers]
    sizes = [read_metadata(tmp_path / name).bytes for name in ("whole", "out-train", "out-valid")]
    assert sizes[0] == sizes[1] + sizes[2]
    assert sizes[2] == sum(len(TEXTS[n].encode()) for n in numbers)


def test_bad_documents_are_counted(parts, tokenizer, tmp_path):
    folder = tmp_path / "in"
    (folder / "050a.txt").write_bytes(b"\xff\xfe")
    (folder / "050b.txt").write_bytes(b"  ")
    (folder / "050c.txt").write_bytes(b"")
    parts = find_parts([folder], Options())
    prepared = prepare(parts, tokenizer, tmp_path / "out", workers=1)
    assert prepared.bad.counts == {"not UTF-8": 1, "empty": 2}
    assert "3 bad documents skipped (1 not UTF-8, first: " in str(prepared)
    assert len(contents(tmp_path / "out")) == 101
    with pytest.raises(UserError, match=r"bad document \(not UTF-8\): .*050a\.txt at byte 0"):
        prepare(parts, tokenizer, tmp_path / "strict", workers=2, on_bad="fail")
    assert files(tmp_path) == ["in", "out.bin", "out.idx", "out.json"]


def test_only_bad_documents(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_bytes(b"")
    with pytest.raises(UserError, match=r"no good document: 1 bad document skipped \(1 empty"):
        prepare(find_parts([tmp_path / "a.txt"], Options()), tokenizer, tmp_path / "deep" / "out", workers=1)
    assert files(tmp_path) == ["a.txt"]


def test_too_few_documents_for_a_split(parts, tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"valid fraction of 0\.2 of 3 documents leaves one side empty"):
        prepare(parts[:3], tokenizer, tmp_path / "out", workers=1, valid_fraction=0.2)
    assert files(tmp_path) == ["in"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"valid_fraction": 1.0}, r"1\.0 must be at least 0 and below 1"),
        ({"valid_fraction": -0.1}, r"-0\.1 must be"),
        ({"workers": 0}, r"--workers 0 must be at least 1"),
        ({"eod_token": "<none>"}, r"'<none>' is not in the vocabulary"),
    ],
)
def test_wrong_options(parts, tokenizer, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        prepare(parts, tokenizer, tmp_path / "out", **options)
    assert files(tmp_path) == ["in"]


def test_existing_outputs_are_kept(parts, tokenizer, tmp_path):
    (tmp_path / "out-valid.idx").write_text("mine")
    with pytest.raises(UserError, match=r"out-valid\.idx exist already"):
        prepare(parts, tokenizer, tmp_path / "out", valid_fraction=0.1, workers=1)
    assert files(tmp_path) == ["in", "out-valid.idx"]
    prepare(parts, tokenizer, tmp_path / "out", valid_fraction=0.1, workers=1, overwrite=True)
    assert len(contents(tmp_path / "out-valid")) == 10


def test_full_disk(parts, tokenizer, tmp_path, monkeypatch):
    def full(self, ids, lengths):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(IndexedWriter, "add_documents", full)
    with pytest.raises(UserError, match=r"nothing was written: .*No space left on device"):
        prepare(parts, tokenizer, tmp_path / "out", workers=2)
    assert files(tmp_path) == ["in"]


def _die(texts):
    os.kill(os.getpid(), signal.SIGKILL)


def test_killed_worker(parts, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(room, "_work", _die)
    with pytest.raises(UserError, match=r"ended from outside .* fewer than 2 --workers"):
        prepare(parts, tokenizer, tmp_path / "out", workers=2)
    assert files(tmp_path) == ["in"]


def test_default_workers():
    assert default_workers(0) == 1
    assert 1 <= default_workers(10**15) <= (os.cpu_count() or 1)

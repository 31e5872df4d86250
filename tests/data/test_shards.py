"""Merged shards are byte for byte what one process writes; what does not fit together is refused."""

import errno
import json
import os
import random
import shutil
from itertools import chain, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megamf.data import shards as room
from megamf.data.indexed import IndexedWriter
from megamf.data.prepare import prepare
from megamf.data.shards import merge_shards, parts_of_shard, prepare_shard, shard_path
from megamf.data.sources import Options, Part, find_parts
from megamf.data.tokenizer import train_sentencepiece
from megamf.errors import UserError

WORDS = ["alpha", "beta", "gamma", "delta", "=", "(", ")", ":", "12", "é\n"]
SUFFIXES = (".bin", ".idx", ".json")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """JSON Lines of very different sizes, with bad lines, an empty file and one that holds bad documents alone."""
    folder = tmp_path_factory.mktemp("shards")
    rng = random.Random(0)
    texts = [" ".join(rng.choices(WORDS, k=rng.randrange(1, 60))) for _ in range(120)]
    train_sentencepiece(texts, folder / "t.model", 290)
    cuts = [0, 3, 4, 60, 61, 119, 120]
    (folder / "in").mkdir()
    for n, (begin, end) in enumerate(pairwise(cuts)):
        lines = [json.dumps({"text": text}) for text in texts[begin:end]]
        (folder / "in" / f"{n}.jsonl").write_text("\n".join([*lines, "no json", ""] if n % 2 else [*lines, ""]))
    (folder / "in" / "2a.jsonl").write_text("")
    (folder / "in" / "4a.jsonl").write_text('{"text": " "}\nworse\n')
    return folder


def parts(corpus):
    return find_parts([corpus / "in"], Options())


def make_shards(corpus, output, count, **options):
    for index in reversed(range(count)):
        prepare_shard(parts(corpus), corpus / "t.model", output, index, count, workers=1, **options)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 20])
@pytest.mark.parametrize("fraction", [0.0, 0.1])
def test_the_bytes_of_one_process(corpus, tmp_path, count, fraction, monkeypatch):
    whole = prepare(parts(corpus), corpus / "t.model", tmp_path / "whole", workers=1, valid_fraction=fraction)
    make_shards(corpus, tmp_path / "out", count)
    monkeypatch.setattr(room, "BLOCK_TOKENS", 97)
    merged = merge_shards(tmp_path / "out", count, valid_fraction=fraction)
    for side in ("-train", "-valid") if fraction else ("",):
        for suffix in SUFFIXES:
            assert (tmp_path / f"out{side}{suffix}").read_bytes() == (tmp_path / f"whole{side}{suffix}").read_bytes()
    assert str(merged.bad) == str(whole.bad) and "5 bad documents" in str(merged.bad)
    assert len(list(tmp_path.iterdir())) == (12 if fraction else 6)


@given(st.lists(st.integers(0, 50), max_size=30), st.integers(1, 12))
def test_every_part_is_in_one_shard_in_order(sizes, count):
    given = [Part("text", f"{n}", size) for n, size in enumerate(sizes)]
    found = [parts_of_shard(given, index, count) for index in range(count)]
    assert list(chain.from_iterable(found)) == given
    for chosen in found:
        assert sum(part.size for part in chosen) <= sum(sizes) / count + max(sizes, default=0)


@pytest.mark.parametrize(("index", "count"), [(-1, 2), (2, 2), (0, 0), (0, -1)])
def test_no_such_shard(corpus, tmp_path, index, count):
    with pytest.raises(UserError, match=f"no shard {index} of {count}"):
        prepare_shard(parts(corpus), corpus / "t.model", tmp_path / "out", index, count)
    assert list(tmp_path.iterdir()) == []


def test_a_task_may_be_started_again(corpus, tmp_path):
    make_shards(corpus, tmp_path / "out", 2)
    path = shard_path(tmp_path / "out", 1, 2)
    (path.parent / f".{path.name}.killed.tmp").mkdir()
    before = path.stat().st_mtime_ns
    again = prepare_shard(parts(corpus), corpus / "t.model", tmp_path / "out", 1, 2)
    assert "there already" in again and path.stat().st_mtime_ns == before
    with pytest.raises(UserError, match="made of other inputs or in another way"):
        prepare_shard(parts(corpus), corpus / "t.model", tmp_path / "out", 1, 2, append_eod=False)
    prepare_shard(parts(corpus), corpus / "t.model", tmp_path / "out", 1, 2, append_eod=False, overwrite=True)
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["00000-of-00002", "00001-of-00002"]
    with pytest.raises(UserError, match="differ in their facts"):
        merge_shards(tmp_path / "out", 2)


def test_a_missing_shard(corpus, tmp_path):
    make_shards(corpus, tmp_path / "out", 3)
    shutil.rmtree(shard_path(tmp_path / "out", 1, 3))
    with pytest.raises(UserError, match=r"out\.shards lacks 00001-of-00003"):
        merge_shards(tmp_path / "out", 3)
    with pytest.raises(UserError, match="lacks shards"):
        merge_shards(tmp_path / "out", 0)
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.shards"]


def test_shards_of_other_inputs(corpus, tmp_path):
    make_shards(corpus, tmp_path / "out", 2)
    prepare_shard(parts(corpus)[1:], corpus / "t.model", tmp_path / "out", 0, 2, overwrite=True)
    with pytest.raises(UserError, match=r"00001-of-00002 and .*00000-of-00002 differ in their inputs"):
        merge_shards(tmp_path / "out", 2)


@pytest.mark.parametrize("name", ["tokens", "lengths", "sizes", "shard.json"])
@pytest.mark.parametrize("damage", ["truncated", "gone"])
def test_a_damaged_shard_is_named(corpus, tmp_path, name, damage):
    make_shards(corpus, tmp_path / "out", 2)
    path = shard_path(tmp_path / "out", 1, 2)
    if damage == "gone":
        (path / name).unlink()
    else:
        with (path / name).open("rb+") as file:
            file.truncate(7)
    with pytest.raises(UserError, match=r"00001-of-00002.* prepare it again"):
        merge_shards(tmp_path / "out", 2)
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.shards"]


def test_lengths_that_do_not_add_up(corpus, tmp_path):
    make_shards(corpus, tmp_path / "out", 1)
    path = shard_path(tmp_path / "out", 0, 1) / "lengths"
    lengths = np.fromfile(path, dtype="<i8")
    lengths[0] += 1
    lengths.tofile(path)
    with pytest.raises(UserError, match="adds up to"):
        merge_shards(tmp_path / "out", 1)


def test_existing_outputs_are_kept(corpus, tmp_path):
    make_shards(corpus, tmp_path / "out", 2)
    (tmp_path / "out.idx").write_text("mine")
    with pytest.raises(UserError, match=r"out\.idx exist already"):
        merge_shards(tmp_path / "out", 2)
    assert (tmp_path / "out.idx").read_text() == "mine" and shard_path(tmp_path / "out", 1, 2).is_dir()
    merge_shards(tmp_path / "out", 2, overwrite=True)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out.bin", "out.idx", "out.json"]


def test_a_full_disk_leaves_no_shard_and_no_half_merged_data(corpus, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(room, "_write", full)
        with pytest.raises(UserError, match=r"00000-of-00001 stopped.*No space left"):
            make_shards(corpus, tmp_path / "out", 1)
    assert list(tmp_path.iterdir()) == []
    make_shards(corpus, tmp_path / "out", 1)
    monkeypatch.setattr(IndexedWriter, "add_documents", full)
    with pytest.raises(UserError, match=r"nothing was written: .*No space left"):
        merge_shards(tmp_path / "out", 1)
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.shards"]


def test_no_good_document_at_all(tmp_path, corpus):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text(" ")
    found = find_parts([tmp_path / "in"], Options())
    prepare_shard(found, corpus / "t.model", tmp_path / "out", 0, 1)
    with pytest.raises(UserError, match=r"no good document: 1 bad document skipped \(1 empty"):
        merge_shards(tmp_path / "out", 1)

"""Indexed datasets: Megatron's own package reads ours and we read Megatron's; damage is named with both numbers."""

import errno
import json
import os
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset as MegatronDataset
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megamf.data import indexed
from megamf.data.indexed import IndexedDataset, IndexedWriter, Metadata, read_metadata, token_dtype
from megamf.errors import UserError


def write(prefix, documents, vocab_size=1000, metadata=None, **options):
    with IndexedWriter(prefix, vocab_size, **options) as writer:
        for document in documents:
            writer.add_document(document)
        writer.commit(metadata)


DOCUMENTS = [[1, 2, 3], [4], [5, 999, 0, 7], []]


@pytest.fixture
def prefix(tmp_path):
    write(tmp_path / "d", DOCUMENTS)
    return tmp_path / "d"


@settings(max_examples=40, deadline=None)
@given(
    st.integers(2, 2**31 - 1).flatmap(
        lambda vocab: st.tuples(
            st.just(vocab), st.lists(st.lists(st.integers(0, vocab - 1), max_size=9), min_size=1, max_size=9)
        )
    )
)
@pytest.mark.parametrize("mmap", [True, False])
def test_roundtrip(tmp_path_factory, mmap, drawn):
    vocab_size, documents = drawn
    prefix = tmp_path_factory.mktemp("roundtrip") / "with.dot"
    write(prefix, documents, vocab_size)
    with IndexedDataset(prefix, mmap=mmap) as dataset:
        assert dataset.dtype == (np.uint16 if vocab_size < 65500 else np.int32)
        assert [dataset.document(i).tolist() for i in range(dataset.num_documents)] == documents
        assert [dataset[i].tolist() for i in range(len(dataset))] == documents
        assert dataset[-1].tolist() == documents[-1]
        joined = [token for document in documents for token in document]
        assert dataset.tokens(0, dataset.num_tokens).tolist() == joined


@pytest.mark.parametrize("vocab_size", [1000, 70_000])
def test_megatron_reads_ours(tmp_path, vocab_size):
    write(tmp_path / "d", DOCUMENTS, vocab_size)
    theirs = MegatronDataset(str(tmp_path / "d"))
    assert [theirs[i].tolist() for i in range(len(theirs))] == DOCUMENTS
    assert theirs.document_indices.tolist() == [0, 1, 2, 3, 4]
    assert theirs.sequence_lengths.tolist() == [3, 1, 4, 0]
    assert theirs[0].dtype == token_dtype(vocab_size)


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_we_read_megatrons(tmp_path, dtype, mmap):
    builder = IndexedDatasetBuilder(str(tmp_path / "d.bin"), dtype=dtype)
    builder.add_document(torch.tensor([1, 2, 3, 4, 5]), [2, 3])
    builder.add_item(torch.tensor([6]))
    builder.end_document()
    builder.add_document(torch.tensor([7, 8]), [2])
    builder.finalize(str(tmp_path / "d.idx"))
    ours = IndexedDataset(tmp_path / "d", mmap=mmap)
    assert ours.dtype == dtype
    assert [ours[i].tolist() for i in range(len(ours))] == [[1, 2], [3, 4, 5], [6], [7, 8]]
    assert [ours.document(i).tolist() for i in range(ours.num_documents)] == [[1, 2, 3, 4, 5], [6], [7, 8]]
    ours.close()


def test_bytes_are_those_of_megatron(tmp_path):
    write(tmp_path / "ours", DOCUMENTS)
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.uint16)
    for document in DOCUMENTS:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()


def test_type_by_vocabulary():
    assert [token_dtype(n) for n in (65499, 65500)] == [np.uint16, np.int32]


def test_missing_halves(prefix):
    os.unlink(f"{prefix}.idx")
    with pytest.raises(UserError, match=r"no file .*d\.idx"):
        IndexedDataset(prefix)


def test_truncated_bin(prefix):
    os.truncate(f"{prefix}.bin", 11)
    with pytest.raises(UserError, match=r"d\.bin is truncated.*11 bytes.*8 tokens of 2 bytes = 16 bytes"):
        IndexedDataset(prefix)


@pytest.mark.parametrize("size", [12, 34, 60])
def test_truncated_idx(prefix, size):
    os.truncate(f"{prefix}.idx", size)
    with pytest.raises(UserError, match=rf"d\.idx .*{size} bytes.*"):
        IndexedDataset(prefix)


def test_mismatched_pair(prefix, tmp_path):
    write(tmp_path / "other", [[1] * 20])
    os.replace(tmp_path / "other.bin", f"{prefix}.bin")
    with pytest.raises(UserError, match=r"40 bytes, but .*d\.idx describes 8 tokens of 2 bytes = 16 bytes"):
        IndexedDataset(prefix)


@pytest.mark.parametrize(
    ("offset", "content", "message"),
    [
        (0, b"MMIDIDY", "is not a Megatron index"),
        (9, struct.pack("<Q", 2), "index version 2; version 1"),
        (17, b"\x09", "token type code 9"),
        (18, struct.pack("<Q", 7), "announces 7 sequences"),
        (34, struct.pack("<i", -3), "bytes"),
        (34 + 16 + 8, struct.pack("<q", 4), "byte offsets do not follow"),
        (34 + 16 + 32, struct.pack("<q", 1), "document table does not run from 0"),
        (34 + 16 + 32 + 8, struct.pack("<q", 9), "document table does not run from 0"),
    ],
)
def test_damaged_index(prefix, offset, content, message):
    with open(f"{prefix}.idx", "r+b") as file:
        file.seek(offset)
        file.write(content)
    with pytest.raises(UserError, match=message):
        IndexedDataset(prefix)


@pytest.mark.parametrize("wrong", [-1, 1000])
def test_ids_outside_the_vocabulary_are_refused(tmp_path, wrong):
    with IndexedWriter(tmp_path / "d", 1000) as writer:
        writer.add_document([1])
        with pytest.raises(ValueError, match=rf"token id {wrong} in documents 1 to 1 .* 1000"):
            writer.add_document([5, wrong])
    assert list(tmp_path.iterdir()) == []


def test_nothing_stays_of_an_unfinished_dataset(tmp_path):
    with pytest.raises(RuntimeError), IndexedWriter(tmp_path / "new" / "folder" / "d", 1000) as writer:
        writer.add_document([1, 2])
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_no_document_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no document"), IndexedWriter(tmp_path / "d", 10) as writer:
        writer.commit()
    assert list(tmp_path.iterdir()) == []


def test_existing_files_are_kept_unless_overwritten(prefix):
    before = {path.name: path.read_bytes() for path in prefix.parent.iterdir()}
    with pytest.raises(UserError, match=r"d\.bin.*d\.idx exist already"):
        write(prefix, [[1]])
    with pytest.raises(RuntimeError), IndexedWriter(prefix, 1000, overwrite=True) as writer:
        writer.add_document([1, 2])
        raise RuntimeError
    assert {path.name: path.read_bytes() for path in prefix.parent.iterdir()} == before
    write(prefix, [[1]], overwrite=True)
    assert IndexedDataset(prefix).document(0).tolist() == [1]


def test_full_disk_leaves_the_old_dataset(prefix, monkeypatch):
    before = {path.name: path.read_bytes() for path in prefix.parent.iterdir()}

    def full(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(indexed, "_flush", full)
    with pytest.raises(OSError, match="No space left"):
        write(prefix, [[1]], overwrite=True)
    assert {path.name: path.read_bytes() for path in prefix.parent.iterdir()} == before


def test_metadata(tmp_path):
    metadata = Metadata("t", "ab" * 32, 1000, 2, True, 1, 3, 17)
    write(tmp_path / "d", [[1, 2, 3]], metadata=metadata)
    assert read_metadata(tmp_path / "d") == metadata
    assert json.loads((tmp_path / "d.json").read_text())["bytes"] == 17
    assert read_metadata(tmp_path / "none") is None
    write(tmp_path / "d", [[1]], overwrite=True)
    assert read_metadata(tmp_path / "d") is None
    for content in ("{", "{}", '{"tokens": "x"}', "[]"):
        (tmp_path / "d.json").write_text(content)
        with pytest.raises(UserError, match=r"d\.json is not the metadata"):
            read_metadata(tmp_path / "d")


def test_index_errors(prefix):
    dataset = IndexedDataset(prefix)
    for wrong in (4, -5):
        with pytest.raises(IndexError):
            dataset[wrong]
    with pytest.raises(IndexError):
        dataset.document(4)

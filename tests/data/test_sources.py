"""Documents of every kind of input, in order, with the bad ones told apart."""

import gzip
import json
import sysconfig
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from megamf.data import sources
from megamf.data.sources import BadDocument, Options, find_parts, read_documents
from megamf.data.stdlib import help_documents
from megamf.errors import UserError

TEXTS = ["first\n  text\r\n", "zweiter Text: é漢\t", "x" * 5000]


def read(*inputs, **options):
    chosen = Options(**options)
    parts = find_parts(inputs, chosen)
    found = list(read_documents(parts, chosen))
    # What comes behind the last document of a file (blank lines, a compressed stream's trailer) is not told.
    assert 0 <= sum(part.size for part in parts) - sum(document.read for document in found) < 20
    return found


def texts(found):
    return [document.text for document in found if not isinstance(document, BadDocument)]


def reasons(found):
    return [document.reason for document in found if isinstance(document, BadDocument)]


def json_lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def write_parquet(path, column, name="text"):
    pq.write_table(pa.table({"id": list(range(len(column))), name: column}), path, row_group_size=2)


ROWS = json_lines({"text": text, "id": n} for n, text in enumerate(TEXTS))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", ROWS),
        ("a.jsonl.gz", gzip.compress(ROWS)),
        ("a.jsonl.zst", zstandard.compress(ROWS)),
        ("two-members.jsonl.gz", gzip.compress(ROWS[:40]) + gzip.compress(ROWS[40:]) + b"\0" * 7),
        ("two-frames.jsonl.zst", zstandard.compress(ROWS[:40]) + zstandard.compress(ROWS[40:])),
        ("no-last-line-end.jsonl", ROWS[:-1]),
        ("blank-lines.JSONL", b"\n" + ROWS.replace(b"\n", b"\n \n")),
    ],
)
@pytest.mark.parametrize("block", [1, 50, 2**20])
def test_json_lines(tmp_path, monkeypatch, name, content, block):
    monkeypatch.setattr(sources, "BLOCK", block)
    (tmp_path / name).write_bytes(content)
    found = read(tmp_path / name)
    assert texts(found) == TEXTS
    assert [document.num_bytes for document in found] == [len(text.encode()) for text in TEXTS]


def test_parquet(tmp_path):
    write_parquet(tmp_path / "a.parquet", TEXTS)
    write_parquet(tmp_path / "b.parquet", [*TEXTS, None, ""], "body")
    assert texts(read(tmp_path / "a.parquet")) == TEXTS
    found = read(tmp_path / "b.parquet", text_field="body")
    assert texts(found) == TEXTS
    assert [(bad.reason, bad.origin[-5:]) for bad in found[3:]] == [("empty", "row 4"), ("empty", "row 5")]


def test_parquet_that_is_not_utf8(tmp_path):
    column = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0\4\0\0\0"), pa.py_buffer(b"ab\xff\xfe")]
    )
    write_parquet(tmp_path / "a.parquet", column)
    assert [getattr(d, "text", None) or d.reason for d in read(tmp_path / "a.parquet")] == ["ab", "not UTF-8"]


def test_parquet_mistakes(tmp_path):
    write_parquet(tmp_path / "a.parquet", [1, 2])
    with pytest.raises(UserError, match=r"no column 'body'; columns: id, text"):
        read(tmp_path / "a.parquet", text_field="body")
    with pytest.raises(UserError, match=r"holds int64, expected strings"):
        read(tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 and nothing more")
    with pytest.raises(UserError, match=r"b\.parquet is not a readable Parquet file"):
        read(tmp_path / "b.parquet")


def test_text_is_one_document_unchanged(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\n one\r\n\r\ntwo\n\n")
    assert texts(read(tmp_path / "a.txt")) == ["\n one\r\n\r\ntwo\n\n"]


def test_text_split_at_blank_lines(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\n\none\nstill one\n \t\n\n  two\r\n\r\nthree")
    (tmp_path / "b.py").write_text("a\n\nb")
    found = read(tmp_path / "a.txt", tmp_path / "b.py", blank_lines=True)
    assert texts(found) == ["one\nstill one", "  two", "three", "a\n\nb"]
    (tmp_path / "c.txt").write_text(" \n\n ")
    assert reasons(read(tmp_path / "c.txt", blank_lines=True)) == ["empty"]


def test_bad_documents_are_told_apart(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"")
    (tmp_path / "b.txt").write_bytes(b" \n\t")
    (tmp_path / "c.txt").write_bytes(b"abc\xff")
    lines = [b'{"text": "\xe9"}', b'{"text": ', b"[1]", b'{"t": "x"}', b'{"text": 5}', b'{"text": ""}']
    lines += [b'{"text": "\\ud800"}', b'{"text": "good"}', b"[" * 100_000]
    (tmp_path / "d.jsonl").write_bytes(b"\n".join(lines))
    found = read(tmp_path)
    assert texts(found) == ["good"]
    assert reasons(found) == [
        "empty", "empty", "not UTF-8",
        "not UTF-8", "malformed", "malformed", "malformed", "malformed", "empty", "not UTF-8", "malformed",
    ]  # fmt: skip
    origins = [bad.origin for bad in found if isinstance(bad, BadDocument)]
    assert origins[2].endswith("c.txt at byte 3")
    assert origins[3].endswith("d.jsonl line 1")
    assert "no text in field 'text'" in origins[5]


@pytest.mark.parametrize(("name", "compress"), [("a.jsonl.gz", gzip.compress), ("a.jsonl.zst", zstandard.compress)])
def test_damaged_compression(tmp_path, name, compress):
    content = compress(ROWS)
    (tmp_path / name).write_bytes(content[:-6])
    with pytest.raises(UserError, match=f"{name} is truncated"):
        read(tmp_path / name)
    (tmp_path / name).write_bytes(b"plain text" + content)
    with pytest.raises(UserError, match=f"{name} is damaged"):
        read(tmp_path / name)


def test_folder_order_and_rules(tmp_path):
    names = [
        "b.py", "a/z.py", "a/b/c.md", "a.txt", "shard.jsonl", "image.png", ".hidden.py", ".git/x.py",
        "__pycache__/x.py", "lib/site-packages/x.py", "node_modules/x.js",
    ]  # fmt: skip
    for name in names:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"text": name}) if name.endswith("jsonl") else name)
    (tmp_path / "loop").symlink_to(tmp_path)
    assert texts(read(tmp_path)) == ["a/b/c.md", "a/z.py", "a.txt", "b.py", "shard.jsonl"]
    assert texts(read(tmp_path, extensions=("py", ".PNG"))) == ["a/z.py", "b.py", "image.png"]
    assert texts(read(tmp_path / "b.py", tmp_path / "a")) == ["b.py", "a/b/c.md", "a/z.py"]
    with pytest.raises(UserError, match=r"holds no file with an extension of rs"):
        read(tmp_path, extensions=("rs",))


def test_unknown_inputs(tmp_path):
    with pytest.raises(UserError, match=r"no input at .*none\.txt"):
        read(tmp_path / "none.txt")
    (tmp_path / "a.xyz").write_text("a")
    with pytest.raises(UserError, match=r"a\.xyz is of an unknown kind"):
        read(tmp_path / "a.xyz")
    assert texts(read(tmp_path / "a.xyz", extensions=("xyz",))) == ["a"]


def test_standard_library():
    parts = find_parts(["stdlib"], Options())
    assert [part.kind for part in parts[:2]] == ["help", "text"]
    assert Path(sysconfig.get_path("stdlib"), "os.py") in {part.path for part in parts}
    assert sum(part.size for part in parts) > 5_000_000
    assert parts == find_parts(["stdlib"], Options())
    assert len(find_parts(["stdlib-with-tests"], Options())) >= len(parts)
    assert texts(read_documents(parts[:1], Options())) == [text for _, text in help_documents()]

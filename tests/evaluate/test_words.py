"""Word perplexity against its definition."""

import json
import math

import pytest
import torch

from megamf.errors import UserError
from megamf.evaluate.words import read_documents, word_perplexity


class Bytes:
    """Every byte is a token; 299 ends documents."""

    name, sha256, vocab_size, eod_id, bos_id = "bytes", "0", 300, 299, None

    def encode(self, text):
        return list(text.encode())

    def decode(self, ids):
        return bytes(ids).decode("utf-8", "replace")


def test_definition(model):
    texts = ["two words", "", "é and  more\nlines"]
    found = word_perplexity(model, Bytes(), texts, name="x", seq_len=6, batch=2)
    nats = 0.0
    with torch.no_grad():
        for text in texts:
            row = [299, *text.encode()]
            for at in range(1, len(row)):
                # The window of six that predicts this token begins there; the last window is as long as the others.
                end = min(((at - 1) // 6 + 1) * 6, len(row) - 1)
                begin = max(0, end - 6)
                logits = model.logits(model(torch.tensor([row[begin:at]])).hidden_BTD)[0, -1]
                nats -= logits.log_softmax(-1)[row[at]].item()
    size = sum(len(text.encode()) for text in texts)
    assert (found.words, found.bytes, found.tokens, found.documents) == (2 + 4, size, size, 2)
    assert found.nats == pytest.approx(nats, rel=1e-12)
    assert found.word_perplexity == pytest.approx(math.exp(nats / 6), rel=1e-9)
    assert found.byte_perplexity == pytest.approx(math.exp(nats / size), rel=1e-9)
    assert found.bits_per_byte == pytest.approx(nats / size / math.log(2), rel=1e-9)


def test_documents_of_files(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "x\ny"}) + "\n\n" + json.dumps({"text": "z", "id": 3}) + "\n")
    assert list(read_documents(tmp_path / "a.txt")) == ["one\ntwo\n"]
    assert list(read_documents(tmp_path / "b.jsonl")) == ["x\ny", "z"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "cannot be read"),
        ("latin.txt", b"caf\xe9", r"not UTF-8 text \(byte 3\)"),
        ("a.jsonl", b'{"text": "x"}\n{"tex', "line 2: not valid JSON"),
        ("a.jsonl", b'{"body": "x"}', 'string "text"'),
    ],
)
def test_unreadable(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(read_documents(tmp_path / name))


def test_nothing_to_measure(model):
    with pytest.raises(UserError, match="holds no text"):
        word_perplexity(model, Bytes(), [""], name="empty.txt", seq_len=6, batch=2)

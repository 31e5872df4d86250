"""Tokenizers give back every text, end documents with a known id, and say clearly what is wrong with a file."""

import json
import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from megamf.data import tokenizer as room
from megamf.data.tokenizer import load_tokenizer, sample_parts, train_sentencepiece
from megamf.errors import UserError

WORDS = ["def", "return", "self", "value", "for", "in", "range", "import", "lambda", "12", "345", "naïve", "漢字"]


def corpus(seed: int, count: int = 60) -> list[str]:
    rng = random.Random(seed)
    lines = [
        " " * 4 * rng.randrange(4) + " ".join(rng.choices(WORDS, k=rng.randrange(1, 9))) for _ in range(count * 10)
    ]
    return ["\n".join(lines[at : at + 10]) + "\n\n" for at in range(0, len(lines), 10)]


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def trained(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "t.model"
    return train_sentencepiece(corpus(0), path, 310, kind=request.param)


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory):
    path = tmp_path_factory.mktemp("hf") / "tokenizer.json"
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=310,
        special_tokens=["<|pad|>", "<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(corpus(0), trainer)
    model.save(str(path))
    return path


TEXT = st.text(st.characters(exclude_categories=("Cs",))) | st.text(" \n\t▁ab<>/s\u2581\r\0", max_size=40)


@settings(max_examples=150, deadline=None)
@given(TEXT)
def test_sentencepiece_gives_back_every_text(trained, text):
    ids = trained.encode(text)
    assert trained.decode(ids) == text
    assert all(0 <= i < trained.vocab_size for i in ids)
    assert not {trained.eod_id, trained.bos_id} & set(ids)


@settings(max_examples=150, deadline=None)
@given(TEXT)
def test_hugging_face_gives_back_every_text(hugging_face, text):
    tokenizer = load_tokenizer(hugging_face)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_sentencepiece_special_ids_and_whitespace_pieces(trained):
    assert (trained.vocab_size, trained.bos_id, trained.eod_id) == (310, 1, 2)
    assert len(trained.encode("        ")) <= 2
    assert trained.decode([trained.eod_id]) == ""


def test_special_tokens_in_a_text_are_plain_text(trained, hugging_face):
    tokenizer = load_tokenizer(hugging_face)
    assert tokenizer.eod_id == 1
    assert tokenizer.bos_id == 1
    assert tokenizer.eod_id not in tokenizer.encode("a<|endoftext|>b")
    assert trained.eod_id not in trained.encode("a</s>b")


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_same_text_same_model(tmp_path, kind):
    first = train_sentencepiece(corpus(3), tmp_path / "a.model", 310, kind=kind)
    second = train_sentencepiece(corpus(3), tmp_path / "b.model", 310, kind=kind)
    assert first.sha256 == second.sha256


def test_named_document_end(hugging_face, trained, tmp_path):
    assert load_tokenizer(hugging_face, "<|pad|>").eod_id == 0
    (tmp_path / "tokenizer.json").write_bytes(hugging_face.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|pad|>"}}))
    assert load_tokenizer(tmp_path).eod_id == 0
    with pytest.raises(UserError, match=r"'<nope>' is not in the vocabulary"):
        load_tokenizer(hugging_face, "<nope>")


def test_unusual_vocabulary_needs_a_named_end(tmp_path):
    path = tmp_path / "tokenizer.json"
    Tokenizer(models.WordLevel({"a": 0, "b": 7}, unk_token="a")).save(str(path))
    with pytest.raises(UserError, match=r"--eod-token"):
        load_tokenizer(path)
    assert load_tokenizer(path, "b").vocab_size == 8


@pytest.mark.parametrize("name", ["x.model", "tokenizer.json"])
def test_damaged_files_are_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"this is no tokenizer")
    with pytest.raises(UserError, match=f"{name}.* is not a"):
        load_tokenizer(tmp_path)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(UserError, match="no tokenizer at"):
        load_tokenizer(tmp_path / "none.model")
    with pytest.raises(UserError, match=r"no tokenizer.json and 0 sentencepiece"):
        load_tokenizer(tmp_path)


def test_ids_outside_the_vocabulary(trained, hugging_face):
    for tokenizer in (trained, load_tokenizer(hugging_face)):
        for wrong in (tokenizer.vocab_size, -1):
            with pytest.raises(ValueError, match=f"{wrong} is outside .* {tokenizer.vocab_size}"):
                tokenizer.decode([wrong])


def test_impossible_vocabulary_writes_nothing(tmp_path):
    for size in (100, 100_000):
        with pytest.raises(UserError, match=f"vocab_size={size}"):
            train_sentencepiece(corpus(0), tmp_path / "t.model", size)
    assert list(tmp_path.iterdir()) == []


def test_existing_model_is_kept(tmp_path):
    path = tmp_path / "t.model"
    path.write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        train_sentencepiece(corpus(0), path, 310)
    assert path.read_text() == "mine"
    train_sentencepiece(corpus(0), path, 310, overwrite=True)
    assert load_tokenizer(path).vocab_size == 310


@pytest.mark.parametrize(("module", "name"), [("sentencepiece", "t.model"), ("tokenizers", "tokenizer.json")])
def test_missing_library_names_the_extra(tmp_path, monkeypatch, module, name):
    (tmp_path / name).write_bytes(b"")

    def without(wanted):
        raise ModuleNotFoundError(f"No module named {wanted!r}", name=wanted)

    monkeypatch.setattr(room.importlib, "import_module", without)
    with pytest.raises(UserError, match=rf"{module} is missing.*megamf\[data\]"):
        load_tokenizer(tmp_path / name)


def test_sample_parts_is_everything_when_it_fits():
    texts = corpus(1)
    assert "".join(sample_parts(texts, 10**9)) == "".join(texts)
    assert all(len(part) <= 2000 for part in sample_parts(["x" * 9000], 10**9))


def test_sample_parts_is_spread_evenly():
    texts = [f"{n:05d}\n" for n in range(10_000)]
    parts = sample_parts(texts, 6_000)
    numbers = [int(part) for part in parts]
    steps = {b - a for a, b in pairwise(numbers)}
    assert len(steps) == 1
    assert 3_000 <= sum(map(len, parts)) <= 6_000

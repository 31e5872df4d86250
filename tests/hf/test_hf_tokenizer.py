"""Sentencepiece models as fast tokenizers: same ids and the same text back, on fuzzed text and source code."""

import inspect
import json
import textwrap

import pytest
from transformers import AutoTokenizer

from megamf.data.tokenizer import load_tokenizer, train_sentencepiece
from megamf.errors import UserError
from megamf.hf.tokenizer import export_tokenizer, fuzzed_texts


def corpus():
    return [inspect.getsource(module) for module in (textwrap, inspect, json)] + ["Grüße, 世界! été 😀 " * 20]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    for kind in ("bpe", "unigram"):
        train_sentencepiece(corpus(), folder / f"{kind}.model", 700, kind=kind)
    return folder


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_same_ids(models, tmp_path, kind):
    ours = load_tokenizer(models / f"{kind}.model")
    report = export_tokenizer(models / f"{kind}.model", tmp_path, 700)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    texts = [*fuzzed_texts(ours, 400, seed=9), *corpus(), "", " ", "</s><s><unk><0x41>", "\u2581a\u2581"]
    differing = [text for text in texts if theirs(text)["input_ids"] != ours.encode(text)]
    # Equal scores of a unigram model leave the choice to the library; the export counts and reports such texts.
    assert len(differing) <= (0 if kind == "bpe" else 0.02 * len(texts))
    assert report.compared == 2000 and report.differing <= (0 if kind == "bpe" else 40)
    assert ("differ on" in report.sentence()) == bool(report.differing)
    for text in texts:
        assert theirs.decode(ours.encode(text), skip_special_tokens=True) == text
    assert (theirs.eos_token_id, theirs.bos_token_id) == (ours.eod_id, ours.bos_id)
    assert (tmp_path / "tokenizer.model").read_bytes() == (models / f"{kind}.model").read_bytes()


def test_a_model_with_the_customary_normalisation(tmp_path):
    """Sentencepiece's defaults: NFKC, a space before every text, runs of spaces collapsed."""
    import io

    import sentencepiece

    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(" ".join(corpus()).split("\n")), model_writer=trained, vocab_size=600, model_type="bpe",
        byte_fallback=True, minloglevel=2, num_threads=1,
    )  # fmt: skip
    (tmp_path / "m.model").write_bytes(trained.getvalue())
    (tmp_path / "out").mkdir()
    export_tokenizer(tmp_path / "m.model", tmp_path / "out", 600)
    ours, theirs = load_tokenizer(tmp_path / "m.model"), AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in ("def f(x):", "a  b   c", "ﬁne Ⅷ", "Grüße, 世界!", " leading", "中文 日本語"):
        assert theirs(text)["input_ids"] == ours.encode(text), text
        assert theirs.decode(ours.encode(text)) == ours.decode(ours.encode(text))


def test_hugging_face_files_pass_through(tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    source = tmp_path / "source"
    source.mkdir()
    tokenizer.save(str(source / "tokenizer.json"))
    out = tmp_path / "out"
    out.mkdir()
    report = export_tokenizer(source, out, 400)
    assert report.differing == 0 and (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    ours, theirs = load_tokenizer(source), AutoTokenizer.from_pretrained(out)
    for text in fuzzed_texts(ours, 100, seed=3):
        assert theirs(text)["input_ids"] == ours.encode(text)
    assert theirs.eos_token_id == ours.eod_id == 0


def test_a_tokenizer_too_large_for_the_model(models, tmp_path):
    with pytest.raises(UserError, match="700 ids, the model's vocabulary 699"):
        export_tokenizer(models / "bpe.model", tmp_path, 699)
    assert not list(tmp_path.iterdir())

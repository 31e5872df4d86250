"""Tokenizer files for an export: a `tokenizer.json` is passed through, a sentencepiece model is rebuilt as one.

The rebuilt tokenizer has the same ids. Spaces stand in it as themselves and not as U+2581, so that a U+2581 of the text
falls back to its bytes, as in `megamf.data.tokenizer`. Sameness is tried out on fuzzed text and reported, because
the two libraries break ties of equal scores in ways of their own.
"""

import json
import random
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megamf.data.tokenizer import SPACE_MARK, Tokenizer, load_tokenizer, require
from megamf.errors import UserError
from megamf.evaluate.load import check_recorded, check_vocabulary

# Score of entries that plain text must never become: below any path through the real pieces.
NEVER = -1e4
PASSED_THROUGH = ("tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt", "added_tokens.json")


@dataclass(frozen=True)
class TokenizerReport:
    """What was written. `differing` of `compared` fuzzed texts got other ids; `example` is the first of them."""

    kind: str
    vocab_size: int
    bos_id: int | None
    eod_id: int
    compared: int
    differing: int
    example: str | None

    def sentence(self) -> str:
        """For the model card and the log."""
        if not self.differing:
            return f"ids equal on {self.compared} fuzzed texts"
        return f"ids differ on {self.differing} of {self.compared} fuzzed texts, first on {self.example!r}"


def export_tokenizer(
    source: Path, out: Path, model_vocab: int, recorded: dict[str, Any] | None = None, where: Path = Path("the model")
) -> TokenizerReport:
    """Write the tokenizer at `source` (as `load_tokenizer` takes it) into the folder `out` for AutoTokenizer.

    `recorded`: name and sha256 (a list) of the tokenizer that the model at `where` is known to have. Raises UserError
    where the tokenizer is another, or has more ids than the model's vocabulary.
    """
    tokenizer = load_tokenizer(source)
    check_vocabulary(tokenizer, model_vocab)
    check_recorded(tokenizer, recorded, where)
    file = _file_of(source)
    target = out / "tokenizer.json"
    if file.suffix == ".json":
        shutil.copyfile(file, target)
        for name in PASSED_THROUGH:
            if (file.parent / name).is_file():
                shutil.copyfile(file.parent / name, out / name)
    else:
        convert_sentencepiece(file).save(str(target))
        shutil.copyfile(file, out / "tokenizer.model")
    if not (out / "tokenizer_config.json").is_file():
        tree = _config(target, tokenizer)
        (out / "tokenizer_config.json").write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
    compared, differing, example = compare(tokenizer, load_tokenizer(target, _piece(target, tokenizer.eod_id)))
    return TokenizerReport(
        "Hugging Face" if file.suffix == ".json" else "sentencepiece",
        tokenizer.vocab_size,
        tokenizer.bos_id,
        tokenizer.eod_id,
        compared,
        differing,
        example,
    )


def convert_sentencepiece(path: Path) -> Any:
    """A sentencepiece BPE or unigram model as a `tokenizers.Tokenizer` with the same ids.

    Raises UserError for other kinds of model, and for normalisations that cannot be carried over.
    """
    library = require("tokenizers")
    proto = _proto(path)
    kinds = {1: "unigram", 2: "bpe"}
    kind = kinds.get(proto.trainer_spec.model_type)
    if kind is None:
        raise UserError(f"{path} is neither a BPE nor a unigram sentencepiece model: it cannot be exported")
    normal, unknown, control, unused, own, byte = 1, 2, 3, 5, 4, 6
    pieces = [(piece.piece.replace(SPACE_MARK, " "), piece.score, piece.type or normal) for piece in proto.pieces]
    texts = [text if of in (normal, own) else raw.piece for (text, _, of), raw in zip(pieces, proto.pieces)]
    unk = next(i for i, piece in enumerate(pieces) if piece[2] == unknown)
    has_bytes = any(piece[2] == byte for piece in pieces)
    if kind == "bpe":
        vocabulary = {text: i for i, text in enumerate(texts)}
        mergeable = {text: score for text, (_, score, of) in zip(texts, pieces) if of in (normal, own, unused)}
        model = library.models.BPE(
            vocab=vocabulary,
            merges=_merges(mergeable, vocabulary),
            unk_token=texts[unk],
            fuse_unk=not has_bytes,
            byte_fallback=has_bytes,
        )
    else:
        scored = [(text, score if of in (normal, own) else NEVER) for text, (_, score, of) in zip(texts, pieces)]
        model = library.models.Unigram(scored, unk_id=unk, byte_fallback=has_bytes)
    tokenizer = library.Tokenizer(model)
    normalizer = _normalizer(library.normalizers, proto.normalizer_spec)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    decoders = library.decoders
    steps = [decoders.ByteFallback(), decoders.Fuse()]
    if proto.normalizer_spec.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    special = [texts[i] for i, piece in enumerate(pieces) if piece[2] in (control, unknown)]
    tokenizer.add_special_tokens([library.AddedToken(text, special=True, normalized=False) for text in special])
    user = [texts[i] for i, piece in enumerate(pieces) if piece[2] == own]
    if user:
        tokenizer.add_tokens([library.AddedToken(text, normalized=False) for text in user])
    return tokenizer


def _merges(scores: dict[str, float], vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Every split of every piece into two pieces, best score first; of equal pieces the shorter left part first."""
    merges = []
    for piece, score in scores.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in scores and right in scores:
                merges.append((-score, vocabulary[piece], cut, left, right))
    return [(left, right) for *_, left, right in sorted(merges)]


def _normalizer(normalizers: Any, spec: Any) -> Any:
    """The text as the sentencepiece model sees it, with plain spaces; None where it is taken as it is."""
    steps = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        from tokenizers import Regex

        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps += [normalizers.Replace(SPACE_MARK, " "), normalizers.Prepend(" ")]
    return normalizers.Sequence(steps) if steps else None


def _proto(path: Path) -> Any:
    """The parsed model file."""
    pb2 = require("sentencepiece.sentencepiece_model_pb2")
    proto = pb2.ModelProto()
    proto.ParseFromString(path.read_bytes())
    return proto


def _file_of(source: Path) -> Path:
    """The file that `load_tokenizer` reads at `source`."""
    source = Path(source)
    if not source.is_dir():
        return source
    return source / "tokenizer.json" if (source / "tokenizer.json").is_file() else next(source.glob("*.model"))


def _piece(file: Path, index: int) -> str:
    return require("tokenizers").Tokenizer.from_file(str(file)).id_to_token(index)


def _config(file: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    """What AutoTokenizer needs. Special tokens spelled in a text are text, as when the training data was prepared."""
    tree: dict[str, Any] = {
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "eos_token": _piece(file, tokenizer.eod_id),
        "model_max_length": int(1e30),
        "pad_token": _piece(file, tokenizer.eod_id),
        "split_special_tokens": True,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    if tokenizer.bos_id is not None:
        tree["bos_token"] = _piece(file, tokenizer.bos_id)
    return tree


def compare(first: Tokenizer, second: Tokenizer, count: int = 2000, seed: int = 0) -> tuple[int, int, str | None]:
    """Texts compared, texts with other ids, and the first of these."""
    differing, example = 0, None
    for text in fuzzed_texts(first, count, seed):
        if first.encode(text) != second.encode(text):
            differing += 1
            example = text if example is None else example
    return count, differing, example


def fuzzed_texts(tokenizer: Tokenizer, count: int, seed: int) -> Iterator[str]:
    """Texts that strain a tokenizer: characters of many scripts, runs of blanks, digits, code, its own pieces."""
    rng = random.Random(seed)
    blanks: Sequence[str] = (" ", "  ", "    ", "\t", "\n", "\n\n", "\r\n", "\u00a0", "\u3000", SPACE_MARK)
    words: Sequence[str] = (
        "def f(x):", "return", "self.", "import", "1234567890", "0x1F", "aaaaaaaa", "_______", "=====", "</s>", "<s>",
        "<unk>", "<0x0A>", "<|endoftext|>", "é", "e\u0301", "ß", "中文", "日本語", "한국어", "русский", "عربي", "😀",
        "👩‍👩‍👧", "\u0000", "\ufeff", "\ufffd", "ﬁ", "Ⅷ", "½",
    )  # fmt: skip
    for _ in range(count):
        parts = []
        for _ in range(rng.randrange(24)):
            kind = rng.random()
            if kind < 0.25:
                parts.append(rng.choice(blanks))
            elif kind < 0.45:
                parts.append(rng.choice(words))
            elif kind < 0.65:
                parts.append(tokenizer.decode([rng.randrange(tokenizer.vocab_size)]))
            elif kind < 0.85:
                parts.append("".join(chr(rng.randrange(32, 127)) for _ in range(rng.randrange(1, 9))))
            elif kind < 0.95:
                parts.append(rng.choice("abcdefghijklmnopqrstuvwxyz ") * rng.randrange(1, 7))
            else:
                parts.append(chr(rng.choice((rng.randrange(0x80, 0xD800), rng.randrange(0xE000, 0x110000)))))
        yield "".join(parts)

"""Text to token ids and back: sentencepiece models and Hugging Face `tokenizer.json`, behind one small interface."""

import hashlib
import importlib
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, Protocol

from megamf.data.files import write_atomically
from megamf.errors import UserError

EOD_CANDIDATES = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>")
BOS_CANDIDATES = ("<s>", "<|begin_of_text|>", "<bos>", "<|startoftext|>", "<|endoftext|>")
# A constant, because the number is written into the model and decides in which order unigram sums are made.
TRAINING_THREADS = 16
SPACE_MARK = "\u2581"


class Tokenizer(Protocol):
    """What the rest of megamf needs of a tokenizer. `eod_id` ends every document; `bos_id` may be missing."""

    name: str
    sha256: str
    vocab_size: int
    eod_id: int
    bos_id: int | None

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text; no special token is added, and none is recognised in the text."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; document ends and other control tokens give no text in sentencepiece models."""
        ...


def load_tokenizer(path: str | Path, eod_token: str | None = None) -> Tokenizer:
    """A sentencepiece `.model`, a Hugging Face `tokenizer.json`, or a folder that holds one of them.

    `eod_token` names the piece that ends documents; without it the model's own end-of-text token is taken.
    Raises UserError when nothing usable is at `path`, when the needed library is missing, or when the
    vocabulary has no document end.
    """
    file = _tokenizer_file(Path(path))
    if file.suffix == ".json":
        return HuggingFaceTokenizer(file, eod_token)
    return SentencePieceTokenizer(file, eod_token)


def _tokenizer_file(path: Path) -> Path:
    if not path.is_dir():
        if not path.is_file():
            raise UserError(f"no tokenizer at {path}: expected a sentencepiece .model or a Hugging Face tokenizer.json")
        return path
    if (path / "tokenizer.json").is_file():
        return path / "tokenizer.json"
    models = sorted(path.glob("*.model"))
    if len(models) != 1:
        raise UserError(
            f"folder {path} holds no tokenizer.json and {len(models)} sentencepiece .model files; "
            "expected one tokenizer: name the file"
        )
    return models[0]


class SentencePieceTokenizer:
    """A sentencepiece model. Models trained by `train_sentencepiece` give back every text unchanged."""

    def __init__(self, path: Path, eod_token: str | None = None) -> None:
        content = path.read_bytes()
        try:
            self._model = require("sentencepiece").SentencePieceProcessor(model_proto=content)
        except (RuntimeError, TypeError):
            raise UserError(f"{path} ({len(content)} bytes) is not a sentencepiece model") from None
        self.name = path.stem
        self.sha256 = hashlib.sha256(content).hexdigest()
        self.vocab_size: int = self._model.get_piece_size()
        vocabulary = {self._model.id_to_piece(i): i for i in range(self.vocab_size)}
        special = {
            piece: i
            for piece, i in vocabulary.items()
            if self._model.is_control(i) or (piece == eod_token) or (piece == EOD_CANDIDATES[0])
        }
        eos = self._model.eos_id()
        candidates = (EOD_CANDIDATES[0], self._model.id_to_piece(eos) if eos >= 0 else "", *EOD_CANDIDATES)
        self.eod_id = _choose_eod(special, eod_token, candidates, path)
        bos = self._model.bos_id()
        self.bos_id: int | None = bos if bos >= 0 else None
        # The library writes a space as U+2581, so a U+2581 of the text would come back as a space. Where the
        # vocabulary has single bytes, it is spelled in bytes. Models that put a space before every text cannot
        # be fed in parts, and they do not give back every text anyway.
        names = [f"<0x{byte:02X}>" for byte in SPACE_MARK.encode()]
        begins_with_space = self._model.encode("a", out_type=str)[0].startswith(SPACE_MARK)
        has_bytes = all(name in vocabulary for name in names) and not begins_with_space
        self._space_mark = [vocabulary[name] for name in names] if has_bytes else None

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`."""
        if self._space_mark is None or SPACE_MARK not in text:
            return self._model.encode(text)
        parts = self._model.encode(text.split(SPACE_MARK))
        ids = parts[0]
        for part in parts[1:]:
            ids += self._space_mark
            ids += part
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; raises ValueError for an id outside the vocabulary."""
        return self._model.decode(_checked(ids, self.vocab_size))


class HuggingFaceTokenizer:
    """A `tokenizer.json` of the `tokenizers` library. Special tokens inside a text are treated as plain text."""

    def __init__(self, path: Path, eod_token: str | None = None) -> None:
        content = path.read_bytes()
        library = require("tokenizers")
        try:
            self._model = library.Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{path} is not a Hugging Face tokenizer.json: {error}") from None
        self._model.no_padding()
        self._model.no_truncation()
        self._model.encode_special_tokens = True
        self.name = path.parent.name if path.name == "tokenizer.json" else path.stem
        self.sha256 = hashlib.sha256(content).hexdigest()
        vocabulary: dict[str, int] = self._model.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        named = _named_special_tokens(path.parent / "tokenizer_config.json")
        eos = [named["eos_token"]] if "eos_token" in named else []
        bos = [named["bos_token"]] if "bos_token" in named else []
        self.eod_id = _choose_eod(vocabulary, eod_token, (*eos, *EOD_CANDIDATES), path)
        self.bos_id: int | None = next((vocabulary[t] for t in (*bos, *BOS_CANDIDATES) if t in vocabulary), None)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`."""
        return self._model.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`, special tokens included; raises ValueError for an id outside the vocabulary."""
        return self._model.decode(_checked(ids, self.vocab_size), skip_special_tokens=False)


def train_sentencepiece(
    texts: Iterable[str],
    output: str | Path,
    vocab_size: int,
    *,
    kind: Literal["bpe", "unigram"] = "bpe",
    split_digits: bool = True,
    max_bytes: int = 256 * 2**20,
    overwrite: bool = False,
) -> Tokenizer:
    """Train a lossless sentencepiece model with byte fallback on `texts` and write it to `output` (.model).

    The vocabulary holds `<unk>` 0, `<s>` 1, `</s>` 2 (the document end), the 256 bytes, then the pieces; runs of
    spaces and line ends become pieces of their own, as source code needs. When the texts are longer than
    `max_bytes`, evenly spread parts of them are used. The result depends on the texts and the arguments alone.
    Raises UserError when the texts cannot give `vocab_size` pieces, or when `output` exists without `overwrite`.
    """
    library = require("sentencepiece")
    output = Path(output)
    if output.suffix != ".model":
        raise UserError(f"the tokenizer file {output} must end in .model")
    if output.exists() and not overwrite:
        raise UserError(f"{output} exists already; name another file or give --overwrite")
    parts = sample_parts(texts, max_bytes)
    if not parts:
        raise UserError("there is no text to train a tokenizer on: every document is empty")
    trained = io.BytesIO()
    try:
        library.SentencePieceTrainer.train(
            sentence_iterator=iter(parts),
            model_writer=trained,
            vocab_size=vocab_size,
            model_type=kind,
            byte_fallback=True,
            character_coverage=0.9999,
            required_chars="\n\t",
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=split_digits,
            shuffle_input_sentence=False,
            max_sentence_length=2**30,
            num_threads=TRAINING_THREADS,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"sentencepiece cannot make vocab_size={vocab_size} of {len(parts)} text parts: {_reason(error)}"
        ) from None
    write_atomically(output, trained.getvalue())
    return load_tokenizer(output)


def sample_parts(texts: Iterable[str], max_bytes: int) -> list[str]:
    """Parts of about 2000 characters that end at line ends, evenly thinned out to at most `max_bytes` of UTF-8.

    One pass, bounded memory: whenever the kept parts grow past the limit, every second one is dropped and
    from then on half as many are kept.
    """
    kept: list[str] = []
    size, stride, position = 0, 1, 0
    for text in texts:
        for part in _parts(text, 2000):
            if position % stride == 0:
                kept.append(part)
                size += len(part.encode())
            position += 1
            while size > max_bytes and len(kept) > 1:
                kept = kept[::2]
                stride *= 2
                size = sum(len(part.encode()) for part in kept)
    return kept


def _parts(text: str, length: int) -> Iterator[str]:
    lines: list[str] = []
    total = 0
    for line in text.splitlines(keepends=True):
        for start in range(0, len(line), length):
            piece = line[start : start + length]
            if lines and total + len(piece) > length:
                yield "".join(lines)
                lines, total = [], 0
            lines.append(piece)
            total += len(piece)
    if lines:
        yield "".join(lines)


def require(module: str) -> ModuleType:
    """Import an optional library of the data room; UserError names the extra that installs it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        raise UserError(f"the library {module} is missing; install it with: pip install 'megamf[data]'") from None


def _choose_eod(vocabulary: dict[str, int], asked: str | None, candidates: tuple[str, ...], path: Path) -> int:
    if asked is not None:
        if asked not in vocabulary:
            raise UserError(f"the document end {asked!r} is not in the vocabulary of {path}")
        return vocabulary[asked]
    for token in candidates:
        if token in vocabulary:
            return vocabulary[token]
    raise UserError(
        f"{path} has none of the usual document ends ({', '.join(EOD_CANDIDATES)}); name one of its tokens "
        "with --eod-token"
    )


def _named_special_tokens(config: Path) -> dict[str, str]:
    """`eos_token` and `bos_token` of a tokenizer_config.json, where each is a string or {"content": string}."""
    if not config.is_file():
        return {}
    try:
        tree: Any = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{config} is not valid JSON: {error}") from None
    named = {}
    for key in ("eos_token", "bos_token"):
        value = tree.get(key)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            named[key] = value
    return named


def _checked(ids: Iterable[int], vocab_size: int) -> list[int]:
    ids = [int(i) for i in ids]
    for i in ids:
        if not 0 <= i < vocab_size:
            raise ValueError(f"token id {i} is outside the tokenizer's vocabulary of {vocab_size}")
    return ids


def _reason(error: Exception) -> str:
    """The sentence of a sentencepiece error without its source position and advice on options this job lacks."""
    return str(error).split("] ")[-1].split(" or decrease")[0].strip() or "no reason given"

"""Perplexity per word and per byte of whole text documents, comparable between tokenizers.

Words are what stands between white space, and every token of a document counts, its first one too (predicted from the
token that ends documents), as in the word perplexity that the evaluation harness reports for Wikitext.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megamf.data.tokenizer import Tokenizer
from megamf.errors import UserError
from megamf.evaluate.scoring import score, windows
from megamf.model import ModuleFormer


@dataclass(frozen=True)
class WordPerplexity:
    """Over all documents together. `nats`: total negative log-likelihood."""

    name: str
    word_perplexity: float
    byte_perplexity: float
    bits_per_byte: float
    nats: float
    words: int
    bytes: int
    tokens: int
    documents: int


def read_documents(path: Path) -> Iterator[str]:
    """A `.jsonl` file: the field `text` of every line. Any other file: its whole content. Raises UserError."""
    try:
        content = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start})") from None
    if path.suffix != ".jsonl":
        yield content
        return
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            tree = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number}: not valid JSON: {error}") from None
        if not isinstance(tree, dict) or not isinstance(tree.get("text"), str):
            raise UserError(f'{path}, line {number}: expected an object with a string "text"')
        yield tree["text"]


def word_perplexity(
    model: ModuleFormer,
    tokenizer: Tokenizer,
    documents: Iterable[str],
    *,
    name: str,
    seq_len: int,
    batch: int,
    on_batch: Callable[[int, int], None] | None = None,
) -> WordPerplexity:
    """Score every document that is not empty. Raises UserError where there is no word at all."""
    pairs, words, size, count = [], 0, 0, 0
    for text in documents:
        ids = tokenizer.encode(text)
        if not ids:
            continue
        pairs += windows(ids, tokenizer.eod_id, seq_len)
        words += len(re.split(r"\s+", text))
        size += len(text.encode("utf-8"))
        count += 1
    if not pairs:
        raise UserError(f"{name} holds no text: nothing to measure")
    scored = score(model, pairs, seq_len=seq_len, batch=batch, on_batch=on_batch)
    nats = -sum(item.logprob for item in scored)
    tokens = sum(len(continuation) for _, continuation in pairs)
    return WordPerplexity(
        name, _exp(nats / words), _exp(nats / size), nats / size / math.log(2), nats, words, size, tokens, count
    )


def _exp(value: float) -> float:
    return math.exp(min(value, 700.0))

"""Loss per token, perplexity and bits per byte over tokenised documents.

Shapes: B windows of a batch, T tokens of a window.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from megamf.data.indexed import IndexedDataset, read_metadata
from megamf.data.tokenizer import Tokenizer
from megamf.errors import UserError
from megamf.model import ModuleFormer
from megamf.model.losses import IGNORED, cross_entropy_sum

LOGIT_ROWS = 4096
DOCUMENTS_MEASURED = 256


@dataclass(frozen=True)
class Perplexity:
    """Result for one dataset, or for several together.

    loss: nats per predicted token. bits_per_byte: of the raw UTF-8 text; None where its size is unknown. tokens:
    how many were predicted. bytes: the raw text these stand for. seconds: of wall time.
    """

    name: str
    loss: float
    perplexity: float
    bits_per_byte: float | None
    tokens: int
    bytes: float | None
    seconds: float
    tokens_per_second: float


class Windows:
    """An indexed dataset as consecutive windows of T + 1 tokens that overlap by one, so that every token counts once.

    No token sees another document, and the first token of a document is not predicted, as in training.
    """

    def __init__(self, dataset: IndexedDataset, seq_len: int) -> None:
        self.dataset, self.seq_len = dataset, seq_len
        # Positions of the first token of each document; empty documents begin nowhere.
        self._starts = np.unique(dataset.document_ends[:-1])

    def __len__(self) -> int:
        return max(0, math.ceil((self.dataset.num_tokens - 1) / self.seq_len))

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """input_T, label_T (int64, -100 where nothing is to be predicted) and start_T (int32) of one window."""
        begin = index * self.seq_len
        end = min(begin + self.seq_len + 1, self.dataset.num_tokens)
        tokens = self.dataset.tokens(begin, end).astype(np.int64)
        count = len(tokens) - 1
        position = np.arange(begin, end)
        start = self._starts[np.searchsorted(self._starts, position, side="right") - 1]
        input_T = np.zeros(self.seq_len, dtype=np.int64)
        label_T = np.full(self.seq_len, IGNORED, dtype=np.int64)
        start_T = np.arange(self.seq_len, dtype=np.int32)
        input_T[:count] = tokens[:-1]
        label_T[:count] = np.where(start[1:] == position[1:], IGNORED, tokens[1:])
        start_T[:count] = np.maximum(start[:-1] - begin, 0)
        return input_T, label_T, start_T

    def batches(self, size: int, limit: int | None) -> list[list[int]]:
        """Window numbers batch by batch; with a limit, whole batches spread evenly over the dataset."""
        every = [list(range(at, min(at + size, len(self)))) for at in range(0, len(self), size)]
        if limit is None or limit >= len(every):
            return every
        return [every[round(place)] for place in np.linspace(0, len(every) - 1, limit)]


@torch.no_grad()
def measure(
    model: ModuleFormer,
    prefix: str | Path,
    *,
    seq_len: int,
    batch: int,
    max_batches: int | None = None,
    tokenizer: Tokenizer | None = None,
    on_batch: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Evaluate `model` (in evaluation mode) on the indexed dataset PREFIX.

    `on_batch(done, total)` counts batches. The raw size comes from PREFIX.json, or is measured by decoding with
    `tokenizer`. Raises UserError for a token id outside the vocabulary, metadata of a larger vocabulary or of
    another tokenizer, and data without two tokens in one document.
    """
    vocab = model.config.vocab_size
    with IndexedDataset(prefix) as dataset:
        bytes_per_token = _bytes_per_token(dataset, tokenizer, vocab)
        windows = Windows(dataset, seq_len)
        plan = windows.batches(batch, max_batches)
        device = model.lm_head.weight.device
        nats, predicted, read = 0.0, 0, 0
        began = time.perf_counter()
        for done, numbers in enumerate(plan, start=1):
            input_BT, label_BT, start_BT = _stack(windows, numbers, vocab)
            output = model(input_BT.to(device), start_BT=start_BT.to(device))
            hidden_ND = output.hidden_BTD.flatten(0, 1)
            label_N = label_BT.flatten().to(device)
            nats += cross_entropy_sum(hidden_ND, model.lm_head.weight, label_N, LOGIT_ROWS).item()
            predicted += int((label_BT != IGNORED).sum())
            read += input_BT.numel()
            if on_batch is not None:
                on_batch(done, len(plan))
        seconds = time.perf_counter() - began
    if not predicted:
        raise UserError(f"{prefix} has no document of two tokens or more in the part that was read: nothing to predict")
    size = None if bytes_per_token is None else predicted * bytes_per_token
    return _result(str(prefix), nats, predicted, size, seconds, read)


def together(results: list[Perplexity]) -> Perplexity:
    """Several datasets as one: every predicted token counts the same."""
    nats = sum(result.loss * result.tokens for result in results)
    tokens = sum(result.tokens for result in results)
    sizes = [result.bytes for result in results]
    size = None if None in sizes else sum(sizes)
    read = sum(result.tokens_per_second * result.seconds for result in results)
    return _result("all", nats, tokens, size, sum(result.seconds for result in results), read)


def _result(name: str, nats: float, tokens: int, size: float | None, seconds: float, read: float) -> Perplexity:
    loss = nats / tokens
    bits = None if not size else nats / math.log(2) / size
    return Perplexity(name, loss, math.exp(min(loss, 700.0)), bits, tokens, size, seconds, read / seconds)


def _stack(windows: Windows, numbers: list[int], vocab: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows = [windows[number] for number in numbers]
    input_BT, label_BT, start_BT = (torch.from_numpy(np.stack(part)) for part in zip(*rows))
    highest = max(int(input_BT.max()), int(label_BT.max()))
    if highest >= vocab or int(input_BT.min()) < 0:
        wrong = highest if highest >= vocab else int(input_BT.min())
        raise UserError(
            f"{windows.dataset.prefix} holds token id {wrong}, outside the model's vocabulary of {vocab}: it was "
            "prepared with another tokenizer"
        )
    return input_BT, label_BT, start_BT


def _bytes_per_token(dataset: IndexedDataset, tokenizer: Tokenizer | None, vocab: int) -> float | None:
    metadata = read_metadata(dataset.prefix)
    if metadata is None:
        return None if tokenizer is None else _measured(dataset, tokenizer)
    if metadata.vocab_size > vocab:
        raise UserError(
            f"{dataset.prefix} was prepared with a vocabulary of {metadata.vocab_size} (tokenizer "
            f"{metadata.tokenizer}), the model has {vocab}: this is not the tokenizer that the model was trained with"
        )
    if tokenizer is not None and tokenizer.sha256 != metadata.tokenizer_sha256:
        raise UserError(
            f"{dataset.prefix} was prepared with tokenizer {metadata.tokenizer} (sha256 "
            f"{metadata.tokenizer_sha256[:12]}), the one given has sha256 {tokenizer.sha256[:12]}"
        )
    return metadata.bytes / metadata.tokens if metadata.tokens and metadata.bytes else None


def _measured(dataset: IndexedDataset, tokenizer: Tokenizer) -> float | None:
    """Bytes per token of documents spread over the dataset, by decoding them."""
    size = tokens = 0
    for document in _spread(dataset):
        if len(document) and int(document.max()) >= tokenizer.vocab_size:
            raise UserError(
                f"{dataset.prefix} holds token id {int(document.max())}, outside the tokenizer's vocabulary of "
                f"{tokenizer.vocab_size}"
            )
        text = document[:-1] if len(document) and document[-1] == tokenizer.eod_id else document
        size += len(tokenizer.decode(text.tolist()).encode("utf-8", "replace"))
        tokens += len(document)
    return size / tokens if tokens and size else None


def _spread(dataset: IndexedDataset) -> Iterator[np.ndarray]:
    count = min(DOCUMENTS_MEASURED, dataset.num_documents)
    for place in np.linspace(0, dataset.num_documents - 1, count):
        yield dataset.document(round(place))

"""Sets of documents for statistics, calibration and measurement: read, tokenised, in batches, and the loss on them.

Shapes: B batch, T time, V vocabulary, W windows.
"""

import logging
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from megamf.data.sources import BadDocument, Options, find_parts, read_documents
from megamf.errors import UserError

IGNORED = -100
log = logging.getLogger(__name__)


def load_documents(
    path: str | Path | Sequence[str | Path],
    field: str = "text",
    limit: int | None = None,
    *,
    minimum: int = 2,
    blank_lines: bool = False,
) -> list[str]:
    """The texts of a document set: the first `limit` good documents of one or more files or folders, in order.

    Files are what `megamf.data.sources` reads: .jsonl (also .gz, .zst) and .parquet with the text in `field`; text and
    source files, which are one document each (.txt files are split at blank lines with `blank_lines`); folders of all
    of these. Empty, malformed and non-UTF-8 documents are left out, and their number is logged. Raises UserError where
    there is nothing at a path, where a file is damaged, and where fewer than `minimum` documents are left.
    """
    paths = [path] if isinstance(path, str | Path) else list(path)
    if limit is not None and limit < minimum:
        raise UserError(f"a limit of {limit} documents is below the {minimum} that are needed")
    options = Options(text_field=field, blank_lines=blank_lines)
    bad: list[BadDocument] = []

    def good() -> Iterator[str]:
        for document in read_documents(find_parts(paths, options), options):
            if isinstance(document, BadDocument):
                bad.append(document)
            else:
                yield document.text

    texts = list(islice(good(), limit))
    where = ", ".join(map(str, paths))
    if len(texts) < minimum:
        first = f"; {len(bad)} more cannot be used, first {bad[0].origin} ({bad[0].reason})" if bad else ""
        raise UserError(
            f"{where} holds {len(texts)} usable document{'' if len(texts) == 1 else 's'}, at least {minimum} are "
            f"needed{first}. A text file is one document: give a folder of them, or .jsonl with one document a line"
        )
    if bad:
        log.warning("%s: left out %d bad documents, first %s (%s)", where, len(bad), bad[0].origin, bad[0].reason)
    return texts


def token_documents(documents: Sequence[str], tokenizer: Any, length: int) -> list[torch.Tensor]:
    """The first `length` token ids of every document, one int64 tensor a document, in order.

    `tokenizer`: a Hugging Face one (with the special tokens that it adds by itself) or a megamf `Tokenizer` (plain
    text). Raises UserError for a length below 2 and for a document that gives no token.
    """
    if length < 2:
        raise UserError(f"documents of length={length} tokens have nothing to predict: at least 2 are needed")
    if callable(tokenizer):
        ids = tokenizer(list(documents), truncation=True, max_length=length, verbose=False)["input_ids"]
    else:
        ids = [tokenizer.encode(document)[:length] for document in documents]
    for number, (document, row) in enumerate(zip(documents, ids, strict=True)):
        if not row:
            raise UserError(f"document {number} ({document[:40]!r}) gives no token")
    return [torch.tensor(row, dtype=torch.int64) for row in ids]


def token_windows(tokens: Sequence[torch.Tensor], length: int, end: int | None = None) -> torch.Tensor:
    """ids_WT: the documents one after another, cut into windows of `length` tokens; what is left over is dropped.

    `end`: the id that is put after every document. Raises UserError where the documents do not fill one window.
    """
    parts = list(tokens)
    if end is not None:
        closing = torch.tensor([end])
        parts = [part for document in tokens for part in (document, closing)]
    line = torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)
    windows = len(line) // length
    if not windows:
        raise UserError(f"the documents have {len(line)} tokens together, one window needs {length}")
    return line[: windows * length].view(windows, length)


def padded_batches(tokens: Sequence[torch.Tensor], batch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(ids_BT, mask_BT bool) of `batch` documents after another; padded on the right with id 0, mask False there."""
    for start in range(0, len(tokens), batch):
        rows = list(tokens[start : start + batch])
        ids_BT = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        length_B = torch.tensor([len(row) for row in rows])
        yield ids_BT, torch.arange(ids_BT.shape[1]) < length_B[:, None]


@torch.no_grad()
def mean_loss(model: nn.Module, tokens: Sequence[torch.Tensor], *, batch: int = 4) -> float:
    """Mean loss of a causal language model in nats a predicted token, over all documents together.

    `model(input_ids=...)` gives `.logits`; every token but a document's first is predicted. The model is measured
    in evaluation mode, and left in the mode that it was in. Raises UserError where no token is predicted and where a
    token id is outside the model's vocabulary.
    """
    predicted = sum(len(row) - 1 for row in tokens)
    if predicted < 1:
        raise UserError(f"{len(tokens)} documents of one token or none: there is nothing to predict")
    check_ids(model, tokens)
    parameter = next(model.parameters())
    total, training = 0.0, model.training
    model.eval()
    try:
        for ids_BT, mask_BT in padded_batches(tokens, batch):
            label_BT = ids_BT.masked_fill(~mask_BT, IGNORED)[:, 1:].to(parameter.device)
            # Of a causal model no token sees the padding behind it: no mask is needed.
            logits_BTV = model(input_ids=ids_BT.to(parameter.device)).logits[:, :-1]
            for logits_TV, label_T in zip(logits_BTV, label_BT):
                wide = logits_TV if logits_TV.dtype == torch.float64 else logits_TV.float()
                total += F.cross_entropy(wide, label_T, ignore_index=IGNORED, reduction="sum").item()
    finally:
        model.train(training)
    return total / predicted


def check_ids(model: nn.Module, tokens: Sequence[torch.Tensor]) -> None:
    """Raise UserError, with both numbers, where a token id is outside the model's vocabulary."""
    known = model.config.get_text_config().vocab_size
    highest = max(int(row.max()) for row in tokens)
    if highest >= known:
        raise UserError(
            f"the documents hold token id {highest}, the model knows {known} ids: this is not its tokenizer"
        )

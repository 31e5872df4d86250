"""Log-likelihood of given continuations: what multiple-choice tasks and whole-document perplexities are made of.

Shapes: B rows of a batch, T tokens of a row, D width, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from megamf.errors import UserError
from megamf.evaluate.generation import check_prompts
from megamf.model import ModuleFormer


@dataclass(frozen=True)
class Scored:
    """`logprob` in nats of a whole continuation; `greedy`: whether each of its tokens was the most likely one."""

    logprob: float
    greedy: bool


@torch.no_grad()
def score(
    model: ModuleFormer,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    seq_len: int,
    batch: int,
    on_batch: Callable[[int, int], None] | None = None,
) -> list[Scored]:
    """log p(continuation | context) of (context ids, continuation ids) pairs, in their order.

    A context loses its oldest tokens where a pair is longer than `seq_len` + 1. Rows of similar length are computed
    together; the result does not depend on it. Raises UserError for an empty context, an empty continuation, one that
    is longer than `seq_len`, or an id outside the vocabulary.
    """
    for number, (context, continuation) in enumerate(pairs):
        if not context or not continuation:
            raise UserError(f"pair {number} has an empty {'continuation' if context else 'context'}: nothing to score")
        if len(continuation) > seq_len:
            raise UserError(
                f"the continuation of pair {number} has {len(continuation)} tokens, more than the {seq_len} of a window"
            )
    if pairs:
        check_prompts([[*context, *continuation] for context, continuation in pairs], model.config.vocab_size)
    rows = [[*context, *continuation][-(seq_len + 1) :] for context, continuation in pairs]
    order = sorted(range(len(rows)), key=lambda number: -len(rows[number]))
    found: dict[int, Scored] = {}
    for at in range(0, len(order), batch):
        numbers = order[at : at + batch]
        counts = [len(pairs[number][1]) for number in numbers]
        found |= zip(numbers, _score_batch(model, [rows[number] for number in numbers], counts))
        if on_batch is not None:
            on_batch(min(at + batch, len(order)), len(order))
    return [found[number] for number in range(len(rows))]


def _score_batch(model: ModuleFormer, rows: list[list[int]], counts: list[int]) -> list[Scored]:
    """The last counts[i] tokens of rows[i]. Padding stands on the right, where no token before it sees it."""
    device = model.lm_head.weight.device
    input_BT = torch.zeros(len(rows), max(map(len, rows)) - 1, dtype=torch.int64)
    for i, row in enumerate(rows):
        input_BT[i, : len(row) - 1] = torch.tensor(row[:-1])
    hidden_BTD = model(input_BT.to(device)).hidden_BTD
    scored = []
    for i, (row, count) in enumerate(zip(rows, counts)):
        logits_TV = model.logits(hidden_BTD[i, len(row) - 1 - count : len(row) - 1])
        logits_TV = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
        target_T = torch.tensor(row[-count:], device=device)
        logprob_T = logits_TV.log_softmax(-1).gather(1, target_T[:, None])
        greedy = bool((logits_TV.argmax(-1) == target_T).all())
        scored.append(Scored(logprob_T.sum(dtype=torch.float64).item(), greedy))
    return scored


def windows(ids: Sequence[int], first: int, seq_len: int) -> Iterator[tuple[list[int], list[int]]]:
    """A document as (context, continuation) pairs that predict each of its tokens once.

    `first` stands before the document. A window of `seq_len` tokens begins after its predecessor's last token; the last
    one reaches back to be as long as the others. So does the evaluation harness's rolling log-likelihood.
    """
    whole = [first, *ids]
    for at in range(0, len(ids), seq_len):
        end = min(at + seq_len, len(ids))
        yield whole[max(0, end - seq_len) : at + 1], whole[at + 1 : end + 1]

"""Scores of an adapted model on validation examples.

Shapes: N examples or target tokens, V classes.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from megamf.adapt.tasks import Example, Task, batches
from megamf.errors import UserError


@torch.no_grad()
def evaluate(
    model: torch.nn.Module,
    task: Task,
    examples: Sequence[Example],
    batch_size: int,
    before_batch: Callable[[int], None] = lambda number: None,
) -> dict[str, float]:
    """Scores over all examples; `before_batch(number)` chooses the copies for a batch.

    classification: loss, accuracy, macro_f1 (of the classes that occur). regression: loss (mean squared error),
    pearson, spearman (nan where one side is constant). generation: loss per target token (nats), accuracy of the next
    token. The model is left in evaluation mode.
    """
    model.eval()
    device = next(model.parameters()).device
    outputs, labels, losses = [], [], []
    for number, part in enumerate(batches(examples, batch_size)):
        before_batch(number)
        output, label_N = task.outputs(model, task.batch(part, device))
        losses.append(float(task.loss(output, label_N)) * len(label_N))
        outputs.append((output if task.kind == "regression" else output.argmax(-1)).cpu())
        labels.append(label_N.cpu())
    found, wanted = (torch.cat(parts).double().numpy() for parts in (outputs, labels))
    scores = {"loss": sum(losses) / len(wanted)}
    if task.kind == "regression":
        return scores | {
            "pearson": _correlation(found, wanted),
            "spearman": _correlation(_ranks(found), _ranks(wanted)),
        }
    scores["accuracy"] = float((found == wanted).mean())
    if task.kind == "classification":
        scores["macro_f1"] = macro_f1(found, wanted)
    return scores


def macro_f1(found_N: np.ndarray, wanted_N: np.ndarray) -> float:
    """Mean over the classes that occur on either side of 2 tp / (2 tp + fp + fn)."""
    values = []
    for name in np.union1d(found_N, wanted_N):
        hits = ((found_N == name) & (wanted_N == name)).sum()
        values.append(2 * hits / ((found_N == name).sum() + (wanted_N == name).sum()))
    return float(np.mean(values))


def _correlation(a_N: np.ndarray, b_N: np.ndarray) -> float:
    if len(a_N) < 2 or a_N.std() == 0 or b_N.std() == 0:
        return float("nan")
    return float(np.corrcoef(a_N, b_N)[0, 1])


def _ranks(values_N: np.ndarray) -> np.ndarray:
    """Ranks from 0; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values_N, return_inverse=True, return_counts=True)
    first = np.cumsum(counts) - counts
    return (first + (counts - 1) / 2)[inverse]


@torch.no_grad()
def generate(
    model: torch.nn.Module, task: Task, examples: Sequence[Example], batch_size: int, max_new_tokens: int
) -> list[str]:
    """Greedy continuations of the prompts of generation examples, until the end of text."""
    model.eval()
    device = next(model.parameters()).device
    texts = []
    for part in batches(examples, batch_size):
        prompts = [example.ids[: int(example.label)] for example in part]
        longest = max(map(len, prompts))
        ids_BT = torch.tensor([[task.pad_id] * (longest - len(ids)) + ids for ids in prompts], device=device)
        mask_BT = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts], device=device)
        whole_BT = model.generate(
            input_ids=ids_BT, attention_mask=mask_BT, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1,
            eos_token_id=task.end_id, pad_token_id=task.pad_id,
        )  # fmt: skip
        texts += task.tokenizer.batch_decode(whole_BT[:, longest:], skip_special_tokens=True)
    return [text.strip() for text in texts]


def text_scores(texts: Sequence[str], references: Sequence[str]) -> dict[str, Any]:
    """chrF and BLEU (sacrebleu's, 0..100) and the share of exact matches.

    Raises UserError where sacrebleu is missing.
    """
    try:
        import sacrebleu
    except ModuleNotFoundError:
        raise UserError("scores of generated text need sacrebleu: pip install 'megamf[adapt]'") from None
    return {
        "chrf": sacrebleu.corpus_chrf(list(texts), [list(references)]).score,
        "bleu": sacrebleu.corpus_bleu(list(texts), [list(references)]).score,
        "exact": float(np.mean([text == reference.strip() for text, reference in zip(texts, references)])),
    }

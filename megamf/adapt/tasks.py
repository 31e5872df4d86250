"""What an adapted model learns: classification, regression, or generation of a target after a prompt.

Shapes: B batch, T time, N target tokens, V classes or vocabulary.
Data are JSON Lines, one example a line. A task turns them into tokens, batches, a loss, the consistency of two passes,
and scores.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerBase

from megamf.adapt.consistency import squared_difference, symmetric_kl
from megamf.errors import UserError

TASKS = ("classification", "regression", "generation")
IGNORED = -100


@dataclass(frozen=True)
class Columns:
    """Names of the fields of an example. text, pair (optional) and label: classification and regression; prompt and
    target: generation."""

    text: str = "text"
    pair: str | None = None
    label: str = "label"
    prompt: str = "prompt"
    target: str = "target"

    def of(self, task: str) -> list[str]:
        """The fields that a task reads."""
        if task == "generation":
            return [self.prompt, self.target]
        return [self.text, *([self.pair] if self.pair else []), self.label]


@dataclass(frozen=True)
class Example:
    """Tokens of one example; label: class index, number, or for generation how many first tokens are the prompt."""

    ids: list[int]
    label: float
    reference: str = ""


@dataclass
class Task:
    """One kind of task with its tokenizer. labels: the names of the classes, in the order of their indices."""

    kind: str
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    columns: Columns = field(default_factory=Columns)
    labels: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.kind not in TASKS:
            raise UserError(f"task {self.kind!r} is not one of {', '.join(TASKS)}")
        if self.max_length < 4:
            raise UserError(f"max_length={self.max_length}: an example needs room for at least 4 tokens")

    def encode(self, rows: Sequence[dict[str, Any]], path: Path | str) -> list[Example]:
        """Examples of rows that `read_rows` returned. Raises UserError for a label that is none of this task's."""
        if self.kind == "generation":
            return [self._generation(row) for row in rows]
        names = {name: index for index, name in enumerate(self.labels)}
        examples = []
        for number, row in enumerate(rows, 1):
            label = row[self.columns.label]
            if self.kind == "classification":
                if str(label) not in names:
                    raise UserError(f"{path}, line {number}: label {label!r} is none of {', '.join(names)}")
                label = names[str(label)]
            texts = [row[self.columns.text], *([row[self.columns.pair]] if self.columns.pair else [])]
            ids = self.tokenizer(*texts, truncation=True, max_length=self.max_length)["input_ids"]
            examples.append(Example(ids or [self.end_id], float(label)))
        return examples

    def _generation(self, row: dict[str, Any]) -> Example:
        """Prompt, target and end of text; the prompt's first tokens go where both are too long."""
        encode = lambda text: self.tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
        target = [*encode(row[self.columns.target]), self.end_id][: self.max_length - 1]
        prompt = (encode(row[self.columns.prompt]) or [self.end_id])[-(self.max_length - len(target)) :]
        return Example(prompt + target, len(prompt), row[self.columns.target])

    @property
    def pad_id(self) -> int:
        """What short rows are filled with; a classifying decoder looks for it (`config.pad_token_id`)."""
        return self.end_id if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id

    @property
    def end_id(self) -> int:
        """The token after a target: end of sequence, else separator, else padding."""
        for name in ("eos_token_id", "sep_token_id", "pad_token_id"):
            if getattr(self.tokenizer, name) is not None:
                return getattr(self.tokenizer, name)
        raise UserError("the tokenizer has no token for the end of a text (eos, sep or pad): give it one")

    def batch(self, examples: Sequence[Example], device: torch.device) -> dict[str, torch.Tensor]:
        """input_ids_BT and attention_mask_BT, padded at the right, and labels: class_B, number_B or label_BT."""
        longest = max(len(example.ids) for example in examples)
        ids_BT = torch.full((len(examples), longest), self.pad_id)
        mask_BT = torch.zeros_like(ids_BT)
        for row, example in enumerate(examples):
            ids_BT[row, : len(example.ids)] = torch.tensor(example.ids)
            mask_BT[row, : len(example.ids)] = 1
        if self.kind == "generation":
            label = ids_BT.masked_fill(mask_BT == 0, IGNORED)
            for row, example in enumerate(examples):
                label[row, : int(example.label)] = IGNORED
        else:
            label = torch.tensor([e.label for e in examples])
            label = label.long() if self.kind == "classification" else label
        batch = {"input_ids": ids_BT, "attention_mask": mask_BT, "labels": label}
        return {name: tensor.to(device) for name, tensor in batch.items()}

    def outputs(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """One forward pass -> logits_NV (prediction_N for regression) and what they should be, label_N."""
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        logits = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
        label = batch["labels"]
        if self.kind == "regression":
            return logits.squeeze(-1), label.to(logits.dtype)
        if self.kind == "generation":
            wanted_BT = label[:, 1:] != IGNORED
            return logits[:, :-1][wanted_BT], label[:, 1:][wanted_BT]
        return logits, label

    def loss(self, output: torch.Tensor, label_N: torch.Tensor) -> torch.Tensor:
        """Mean cross entropy (per example or target token), or mean squared error."""
        return F.mse_loss(output, label_N) if self.kind == "regression" else F.cross_entropy(output, label_N)

    def consistency(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """How far two passes are from each other, mean per example or target token."""
        return (squared_difference if self.kind == "regression" else symmetric_kl)(first, second)


def read_rows(path: Path | str, kind: str, columns: Columns) -> list[dict[str, Any]]:
    """The rows of a JSON Lines file, with the columns that the task reads.

    Raises UserError for a missing or empty file, a line that is no JSON object, a column that is missing, and values
    of the wrong kind; the message names the line.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} is not a file: examples are read from JSON Lines files")
    rows = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number} is a {type(row).__name__}, expected an object with named columns")
        for column in columns.of(kind):
            _check_value(path, number, row, column, column == columns.label and kind != "generation", kind)
        rows.append(row)
    if not rows:
        raise UserError(f"{path} holds no example: nothing can be learned or measured from it")
    return rows


def _check_value(path: Path, number: int, row: dict, column: str, is_label: bool, kind: str) -> None:
    where = f"{path}, line {number}"
    if column not in row:
        raise UserError(f"{where} has no column {column!r}; it has {', '.join(map(repr, row)) or 'none'}")
    value = row[column]
    if not is_label and not isinstance(value, str):
        raise UserError(f"{where}: {column!r} is {value!r}, expected a text")
    if is_label and kind == "regression" and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise UserError(f"{where}: {column!r} is {value!r}, expected a number")
    if is_label and kind == "regression" and not abs(value) < float("inf"):
        raise UserError(f"{where}: {column!r} is {value!r}, expected a finite number")
    if is_label and kind == "classification" and not isinstance(value, str | int):
        raise UserError(f"{where}: {column!r} is {value!r}, expected a class: a text or a whole number")


def label_names(rows: Sequence[dict[str, Any]], column: str, path: Path | str) -> list[str]:
    """The classes of a training file, sorted. Raises UserError for fewer than two."""
    values = {row[column] for row in rows}
    numbers = all(isinstance(value, int) for value in values)
    names = [str(value) for value in sorted(values, key=None if numbers else str)]
    if len(names) < 2:
        raise UserError(f"{path}: all examples are of class {names[0]!r}; a classification needs at least two")
    return names


def batches(examples: Sequence[Example], size: int) -> Iterator[Sequence[Example]]:
    """Slices of `size`, the last one shorter."""
    for first in range(0, len(examples), size):
        yield examples[first : first + size]


def shuffled(examples: Sequence[Example], seed: int, epoch: int) -> list[Example]:
    """A permutation that depends on seed and epoch alone."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return [examples[i] for i in torch.randperm(len(examples), generator=generator).tolist()]

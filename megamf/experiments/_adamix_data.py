"""The two tasks of `megamf.experiments.adamix`, made of the corpora: which part of the kernel's documentation a
paragraph is from, and what a short Python function does, in the words of its author.
"""

import ast
import json
import random
import warnings
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megamf.errors import UserError

SECTIONS = ("admin-guide", "core-api", "driver-api", "filesystems", "gpu", "mm", "networking", "sound")
# The rows of one document: enough that many documents are seen, few enough that none dominates.
PER_DOCUMENT = 5
VALID_DOCUMENTS = 4


def write_sections(corpus: Path, out: Path, train: int, valid: int) -> dict[str, int]:
    """OUT/sections-{train,valid}.jsonl with `text` (a paragraph) and `label` (the section): so many rows of each.

    corpus: english-train.jsonl. Every 4th document of a section is for validation, so no document is in both files.
    Raises UserError where a section has too few paragraphs.
    """
    documents: dict[str, list[list[str]]] = defaultdict(list)
    for document in _read(corpus):
        _, _, below = document.get("path", "").partition("_sources/")
        section = below.split("/")[0]
        if document["source"].startswith("linux-doc") and section in SECTIONS:
            paragraphs = [p for p in document["text"].split("\n\n") if 80 <= len(p) <= 400]
            documents[section].append(paragraphs)
    rows: dict[str, list[dict[str, str]]] = {"train": [], "valid": []}
    for section in SECTIONS:
        for split, number in (("train", train), ("valid", valid)):
            chosen = [d for i, d in enumerate(documents[section]) if (i % VALID_DOCUMENTS == 0) == (split == "valid")]
            texts = [text for d in chosen for text in _some(d, PER_DOCUMENT)]
            if len(texts) < number:
                raise UserError(f"{corpus}: {len(texts)} paragraphs of {section} for {split}, {number} are needed")
            rows[split] += [{"text": text, "label": section} for text in _some(texts, number)]
    return _write(out, "sections", rows)


def write_summaries(corpus: Path, out: Path, train: int, valid: int) -> dict[str, int]:
    """OUT/summaries-{train,valid}.jsonl with `prompt` (a function without its docstring) and `target` (its first line).

    corpus: python-train.jsonl. Every 4th file is for validation. Raises UserError where there are too few functions.
    """
    rows: dict[str, list[dict[str, str]]] = {"train": [], "valid": []}
    seen: set[str] = set()
    for index, document in enumerate(_read(corpus)):
        found = []
        for row in functions(document["text"]):
            if row["target"] not in seen:
                seen.add(row["target"])
                found.append(row)
        rows["valid" if index % VALID_DOCUMENTS == 0 else "train"] += _some(found, PER_DOCUMENT)
    for split, number in (("train", train), ("valid", valid)):
        if len(rows[split]) < number:
            raise UserError(f"{corpus}: {len(rows[split])} short functions for {split}, {number} are needed")
        rows[split] = _some(rows[split], number)
    return _write(out, "summaries", rows)


def functions(source: str) -> Iterator[dict[str, str]]:
    """Short functions of a Python file that have a docstring: `prompt` and `target`. None for a file of another
    version of the language."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except SyntaxError:
        return
    for node in ast.walk(tree):
        text = ast.get_docstring(node) if isinstance(node, ast.FunctionDef) else None
        if not text or len(node.body) < 2:
            continue
        summary = text.strip().splitlines()[0].strip()
        node.body = node.body[1:]
        code = ast.unparse(node)
        if 15 <= len(summary) <= 80 and len(code) <= 240:
            yield {"prompt": f"{code}\n\n# What it does:", "target": f" {summary}"}


def _some(items: list[Any], number: int) -> list[Any]:
    """At most `number` of them, drawn alike at every call, in their order."""
    chosen = sorted(random.Random(len(items)).sample(range(len(items)), min(number, len(items))))
    return [items[i] for i in chosen]


def _read(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def _write(out: Path, name: str, rows: dict[str, list[dict[str, str]]]) -> dict[str, int]:
    for split, part in rows.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part)
        (out / f"{name}-{split}.jsonl").write_text(text, encoding="utf-8")
    return {split: len(part) for split, part in rows.items()}

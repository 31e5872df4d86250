"""The page of `megamf.experiments.adamix`: tables and a picture out of what the runs left."""

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megamf.experiments.pages import reading, table
from megamf.experiments.stages import Study
from megamf.modularity.pictures import require_matplotlib


def write(
    study: Study,
    path: Path,
    sections: Any,
    summaries: Any,
    runs: dict[str, str],
    seeds: int,
    rates: dict[tuple[str, str], str],
    searched: dict[str, float],
) -> None:
    """Write the page and, in a folder of its name beside it, the picture.

    rates: (task, family) -> learning rate. searched: losses of the runs that it was chosen by.
    """
    pictures = path.with_suffix("")
    pictures.mkdir(parents=True, exist_ok=True)
    found = {name: json.loads(study.path(f"{name}/adamix.json").read_text()) for name in runs}
    series = {
        "sections": (sections.methods, "accuracy", lambda scores: 100 * scores["accuracy"]),
        "summaries": (summaries.methods, "loss a token", lambda scores: scores["loss"]),
    }
    _picture(found, series, seeds, pictures / "scores.png")
    parts = [
        "# Mixtures of adaptations, merged into one",
        "Written by `python -m megamf.experiments.adamix --work DIR`, which runs every command below. Mean and "
        f"standard deviation over {seeds} seeds (draws of copies, initial values, order of the examples).",
        reading(path),
        "## Classification: which part of the kernel's documentation?",
        _setting(found["sections-lora-0"], "MiniLM (6 layers of 384), frozen but for the modules and the classifier"),
        _table(found, sections, seeds, rates, _classification_columns()),
        "## Generation: what does a function do?",
        _setting(found["summaries-lora-0"], "SmolLM2-135M (30 layers of 576), frozen but for the modules"),
        _table(found, summaries, seeds, rates, _generation_columns()),
        f"![scores of every seed]({pictures.name}/scores.png)",
        "## Learning rates",
        "Validation loss of single modules, one run each with a seed that is not among those above. The best rate is "
        "taken for the whole family, mixtures included.",
        _rates((sections, summaries), rates, searched),
        "## Samples",
        _samples(found, summaries.methods),
        "## Commands",
        "```\n" + "\n".join(command for name, command in runs.items() if name.endswith("-0")) + "\n```",
        "and the same with the other seeds.",
    ]
    path.write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")


def _rates(tasks: Sequence[Any], rates: dict[tuple[str, str], str], searched: dict[str, float]) -> str:
    rows = []
    for task in tasks:
        for family, tried in task.rates.items():
            losses = [f"{lr}: {searched[f'{task.name}-search-{family}-{lr}']:.3f}" for lr in tried]
            best = rates[task.name, family]
            rows.append(
                [task.name, family, *(f"**{cell}**" if lr == best else cell for lr, cell in zip(tried, losses))]
            )
    return table(["task", "family", "low", "middle", "high"], rows)


def _setting(record: dict[str, Any], model: str) -> str:
    recipe, numbers = record["recipe"], record["examples"]
    classes = f" of {len(record['labels'])} classes" if record["labels"] else ""
    return (
        f"{model}. {numbers['train']} training and {numbers['valid']} validation examples{classes}, "
        f"{recipe['epochs']} epochs in batches of {recipe['batch_size']}. AdaMix has 4 copies; `merged` uses their "
        "average, `random` draws copies for every batch."
    )


Columns = dict[str, Callable[[dict[str, Any]], float | None]]


def _classification_columns() -> Columns:
    def score(mode: str, name: str, factor: float) -> Callable[[dict[str, Any]], float | None]:
        return lambda record: factor * record["scores"][mode][name] if mode in record["scores"] else None

    return {
        "accuracy %": score("merged", "accuracy", 100),
        "macro F1 %": score("merged", "macro_f1", 100),
        "loss": score("merged", "loss", 1),
        "random: accuracy %": score("random", "accuracy", 100),
        "random: loss": score("random", "loss", 1),
    }


def _generation_columns() -> Columns:
    def score(mode: str, name: str) -> Callable[[dict[str, Any]], float | None]:
        return lambda record: record["scores"][mode][name] if mode in record["scores"] else None

    return {
        "loss a token": score("merged", "loss"),
        "chrF": score("generated", "chrf"),
        "BLEU": score("generated", "bleu"),
        "random: loss a token": score("random", "loss"),
    }


def _table(
    found: dict[str, Any],
    task: Any,
    seeds: int,
    rates: dict[tuple[str, str], str],
    columns: Columns,
) -> str:
    rows = []
    for method in task.methods:
        records = [found[f"{task.name}-{method.name}-{seed}"] for seed in range(seeds)]
        numbers = records[0]["parameters"]
        merged = numbers["merged"] + numbers["head"]
        cells = [mean_and_spread([column(record) for record in records]) for column in columns.values()]
        counts = [f"{numbers['trained']:,}", f"{merged:,}" if merged else "all"]
        rows.append([method.title, *counts, *cells, rates[task.name, method.family]])
    return table(["method", "trained", "once merged", *columns, "lr"], rows)


def mean_and_spread(values: Sequence[float | None]) -> str:
    """`mean ± standard deviation` with as many digits as the spread justifies; a dash where there is nothing."""
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    mean = statistics.mean(known)
    digits = 1 if abs(mean) >= 10 else 3
    if len(known) == 1:
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ± {statistics.stdev(known):.{digits}f}"


def _samples(found: dict[str, Any], methods: Sequence[Any]) -> str:
    """The first generated lines of the first seed."""
    rows = []
    for index, sample in enumerate(found[f"summaries-{methods[0].name}-0"]["samples"][:4]):
        texts = [found[f"summaries-{method.name}-0"]["samples"][index]["text"] for method in methods]
        rows.append([_cell(sample["reference"]), *map(_cell, texts)])
    return table(["docstring", *(method.title for method in methods)], rows)


def _cell(text: str) -> str:
    words = " ".join(text.split()).replace("|", "\\|").replace("`", "'")
    return words if len(words) <= 90 else words[:90] + "…"


def _picture(found: dict[str, Any], series: dict[str, Any], seeds: int, path: Path) -> None:
    """A dot a seed for every method: filled for merged, hollow for random."""
    pyplot = require_matplotlib()
    figure, axes = pyplot.subplots(1, len(series), figsize=(11, 3.6), layout="constrained")
    for axis, (task, (methods, label, score)) in zip(axes, series.items()):
        for row, method in enumerate(methods):
            for seed in range(seeds):
                scores = found[f"{task}-{method.name}-{seed}"]["scores"]
                axis.plot(score(scores["merged"]), row, "o", color="C0")
                if "random" in scores:
                    axis.plot(score(scores["random"]), row, "o", color="C1", markerfacecolor="none")
        axis.set_yticks(range(len(methods)), [method.title for method in methods])
        axis.invert_yaxis()
        axis.set_xlabel(f"{label}{' (%)' if label == 'accuracy' else ''}")
        axis.set_title(task)
        axis.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)

"""The page of `megamf.experiments.cus_prune`: tables and pictures out of what the stages left."""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from megamf.experiments.pages import reading, table
from megamf.experiments.stages import Study
from megamf.modularity.pictures import require_matplotlib

GENERAL = ("english", "german", "python", "chinese")
LABELS = {
    "intersection": "Cus-Prun, intersection",
    "language": "language only",
    "domain": "domain only",
    "task": "task only",
    "magnitude-global": "magnitude, one threshold",
    "magnitude-layer": "magnitude, every layer alike",
    "gradient-global": "gradient, one threshold",
    "gradient-layer": "gradient, every layer alike (LLM-Pruner)",
    "layers": "whole layers (ShortGPT)",
    "slicing": "PCA slicing (SliceGPT)",
}
INTRODUCTION = """Written by `python -m megamf.experiments.cus_prune --work DIR`: SmolLM2-135M in float32 on texts of
Debian packages and Python's standard library, documents of at most 128 tokens, loss in nats a token. Ratios are shares
of the matrices of attention and feed-forward layers. {calibration} documents for each dimension, {expert} that the
expert is measured on, {general} of each general corpus; no dimension holds documents of the expert's own kind. General
loss is the mean over {corpora}. Nothing is trained."""


def write(
    study: Study,
    path: Path,
    experts: Sequence[str],
    ratios: Sequence[float],
    seeds: Sequence[int],
    variants: Sequence[str],
    size: dict[str, int],
) -> None:
    """Write the page and, in a folder of its name beside it, the pictures."""
    pictures = path.with_suffix("")
    pictures.mkdir(parents=True, exist_ok=True)
    done = {file.stem: json.loads(file.read_text()) for file in sorted((study.folder / "stages").glob("*.json"))}
    parts = [
        "# A general model cut down to an expert",
        INTRODUCTION.format(**size, corpora=", ".join(GENERAL)),
        reading(path),
    ]
    for expert in experts:
        whole = done[f"dense-{expert}"]["result"]["loss"]
        parts.append(f"## {expert.replace('-', ', ')}")
        parts.append(f"The whole model: expert {whole['expert']:.3f}, general {_general(whole):.3f}.")
        for ratio in ratios:
            rows = _rows(done, f"{expert}-{ratio:g}", seeds)
            header = ("method", "gone", "expert", "general", *GENERAL)
            parts += [f"### {ratio:.0%} gone", table(header, rows)]
        _picture(done, expert, ratios, seeds, pictures / f"{expert}.png")
        _picture_of_layers(done, expert, ratios, pictures / f"{expert}-layers.png")
        parts.append(f"![loss of the expert and in general]({pictures.name}/{expert}.png)")
        parts.append(f"![what is left of every layer]({pictures.name}/{expert}-layers.png)")
    rows = [
        (
            name,
            f"{done[f'variant-{i}']['result']['loss']['expert']:.3f}",
            f"{done[f'variant-{i}']['result']['reached']:.1%}",
        )
        for i, name in enumerate(variants)
    ]
    parts += [f"## Free parameters ({experts[0]}, {ratios[0]:.0%})", table(("choice", "expert", "gone"), rows)]
    seconds = sum(record.get("seconds", 0) for record in done.values())
    parts.append(f"All stages took {seconds / 60:.0f} minutes.")
    path.write_text("\n\n".join(part for part in parts if part) + "\n")


def _general(loss: dict[str, float]) -> float:
    return mean(loss[name] for name in GENERAL)


def _rows(done: dict[str, Any], at: str, seeds: Sequence[int]) -> list[Sequence[str]]:
    rows = []
    for name, label in LABELS.items():
        result = done[f"{at}-{name}"]["result"]
        loss = result["loss"]
        columns = [loss["expert"], _general(loss), *(loss[corpus] for corpus in GENERAL)]
        rows.append((label, f"{result['reached']:.1%}", *(f"{value:.3f}" for value in columns)))
    losses = [done[f"{at}-random-{seed}"]["result"]["loss"] for seed in seeds]
    columns = [[one["expert"] for one in losses], [_general(one) for one in losses]]
    columns += [[one[corpus] for one in losses] for corpus in GENERAL]
    reached = done[f"{at}-random-{seeds[0]}"]["result"]["reached"]
    spread = [f"{mean(values):.3f} ± {stdev(values):.3f}" for values in columns]
    rows.append((f"random, {len(seeds)} seeds", f"{reached:.1%}", *spread))
    return rows


def _picture(done: dict[str, Any], expert: str, ratios: Sequence[float], seeds: Sequence[int], path: Path) -> None:
    """Expert loss against general loss, a panel a ratio; lower left is better."""
    plt = require_matplotlib()
    figure, panels = plt.subplots(1, len(ratios), figsize=(5.5 * len(ratios), 4.5), squeeze=False)
    whole = done[f"dense-{expert}"]["result"]["loss"]
    for panel, ratio in zip(panels[0], ratios):
        points = {name: done[f"{expert}-{ratio:g}-{name}"]["result"]["loss"] for name in LABELS}
        points |= {"random": done[f"{expert}-{ratio:g}-random-{seeds[0]}"]["result"]["loss"]}
        for number, (name, loss) in enumerate(points.items()):
            marker = "*" if name == "intersection" else "os^vD<>PXdh"[number % 11]
            size = 160 if marker == "*" else 40
            panel.scatter(loss["expert"], _general(loss), marker=marker, s=size, color=f"C{number % 10}", label=name)
        panel.scatter(whole["expert"], _general(whole), marker="s", color="black", label="the whole model")
        panel.set(title=f"{ratio:.0%} gone", xlabel="expert, nats a token", ylabel="general, nats a token")
        panel.set(xscale="log", yscale="log")
        ticks = [3, 4, 5, 6, 8, 10, 13, 17]
        panel.set_xticks(ticks, map(str, ticks))
        panel.set_yticks(ticks, map(str, ticks))
        panel.minorticks_off()
    panels[0][-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.02, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _picture_of_layers(done: dict[str, Any], expert: str, ratios: Sequence[float], path: Path) -> None:
    """Share of the neurons of every layer and kind that the intersection leaves."""
    plt = require_matplotlib()
    figure, panels = plt.subplots(1, len(ratios), figsize=(5.5 * len(ratios), 3.2), squeeze=False)
    for panel, ratio in zip(panels[0], ratios):
        layers = done[f"{expert}-{ratio:g}-intersection"]["result"]["layers"]
        for kind in ("ffn", "qk", "vo"):
            panel.plot([row[kind]["kept"] / row[kind]["count"] for row in layers], label=kind, marker=".")
        panel.set(title=f"{ratio:.0%} gone", xlabel="layer", ylabel="share left", ylim=(0, 1.05))
        panel.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)

"""The page of `megamf.experiments.modules`: tables and pictures out of what the stages left."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

from megamf.checkpoint import Checkpoint
from megamf.experiments.pages import reading, table
from megamf.experiments.stages import Study
from megamf.modularity.edit import model_of
from megamf.modularity.pictures import require_matplotlib
from megamf.modularity.statistics import Statistics, summary
from megamf.plan.flops import count_parameters

LIMITS = ("0.003", "0.03", "0.3")
METHODS = {
    "use": "by use",
    "rescaled": "by use, outputs rescaled",
    "norm": "by weight norm",
    "random": "at random, mean of 3 seeds",
}
DOMAINS = ("python", "english", "french")
EXACTNESS = (
    "What leaves a model as it is does so in float32, and is tested. "
    "`tests/parity/test_surgery_layouts.py`, on the checkpoint of a run with expert parallelism on two "
    "processes: a prune of nothing, and export and import, equal bit for bit; an insertion without "
    "effect, to 1e-5; pruned and grown checkpoints read on two processes and on one, the same numbers, "
    "and losses of training on within 2e-5. `tests/modularity`: modules that were never chosen removed; "
    "each edit's tensors."
)


def write(study: Study, path: Path) -> None:
    """Write the page and, in a folder of its name beside it, the pictures."""
    pictures = path.with_suffix("")
    pictures.mkdir(parents=True, exist_ok=True)
    stages = {file.stem: json.loads(file.read_text()) for file in sorted((study.folder / "stages").glob("*.json"))}
    tuned = [name for name in stages if name.startswith("ft-")]
    parts = [
        "# Modules of a model trained on Python and English",
        "Written by `python -m megamf.experiments.modules --work DIR`, which runs every command below.",
        reading(path),
        "## The models",
        _models(study),
        f"![use of the modules]({pictures.name}/use-base.png)",
        "## Specialisation",
        _specialisation(study, tuned),
        "## Pruning",
        _pruning(study, tuned, pictures),
        "## A new language",
        _insertion(study, stages, pictures),
        "## Exactness",
        EXACTNESS,
        "## Commands",
        _commands(stages),
    ]
    shutil.copy(study.path("use-base.png"), pictures / "use-base.png")
    path.write_text("\n\n".join(part for part in parts if part) + "\n")


def _metrics(study: Study, run: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in study.path(f"{run}/metrics.jsonl").read_text().splitlines()]


def _models(study: Study) -> str:
    rows = []
    for name in ("base", "dense"):
        steps = [line for line in _metrics(study, name) if "tokens_per_second" in line]
        step_tokens = steps[0]["tokens"]
        minutes = sum(step_tokens / line["tokens_per_second"] for line in steps) / 60
        losses = _losses(study, name)
        size = _sizes(study, name)
        rows.append(
            [name, f"{size[1]:,}", f"{steps[-1]['tokens']:,}", f"{minutes:.1f}", *(f"{losses[d]:.3f}" for d in DOMAINS)]
        )
    corpora = study.compute("corpora", lambda names: None, names=list(DOMAINS))
    sizes = ", ".join(f"{name} {corpora[name]['train_bytes'] / 1e6:.1f} MB" for name in DOMAINS)
    note = (
        f"Corpora: {sizes}; a tokenizer of 4096 pieces made on Python and English. Minutes of training steps, on 2 "
        "processes. Losses are nats a token on held-out documents, at most 20 batches of 8 windows a domain; French "
        "was never seen."
    )
    return table(["model", "parameters", "tokens", "minutes", *DOMAINS], rows) + f"\n\n{note}"


def _sizes(study: Study, run: str) -> tuple[int, int]:
    """(trained, all) parameters; a tuned run says at its start how many it trains."""
    with Checkpoint(study.path(run)) as checkpoint:
        total = count_parameters(model_of(checkpoint)).total
    log = study.path(f"logs/{run}.log").read_text(errors="replace")
    found = re.search(r"([\d,]+) of [\d,]+ parameters are trained", log)
    return (int(found.group(1).replace(",", "")) if found else total), total


def _losses(study: Study, name: str) -> dict[str, float]:
    results = study.json(f"evaluate-{name}.json")["data"]
    return {domain: result["loss"] for domain, result in zip(DOMAINS, results)}


def _specialisation(study: Study, tuned: list[str]) -> str:
    header = [
        "fine-tuned on Python",
        "kind",
        *(f"< {float(limit):.1%}" for limit in LIMITS),
        "H(m)",
        "H(m given x)",
        "loss",
    ]
    rows = []
    for name in ("base", *tuned):
        statistics = Statistics.model_validate(study.json(f"show-{name}.json")["statistics"][0])
        loss = "" if name == "base" else f"{_curve(study, name, 'use')[0]['loss']:.4f}"
        for kind in ("attention", "mlp"):
            lines = [line for line in summary(statistics) if line["kind"] == kind]
            modules = sum(line["modules"] for line in lines)
            below = (sum(line[f"below_{limit}"] * line["modules"] for line in lines) / modules for limit in LIMITS)
            mean = (sum(line[key] for line in lines) / len(lines) for key in ("entropy", "conditional_entropy"))
            rows.append([_label(name), kind, *(f"{x:.1%}" for x in below), *(f"{x:.3f}" for x in mean), loss])
    note = (
        "Share of modules whose use is below that part of their layer's most used one (attention and MLP apart), on "
        "Python; entropies in nats, means over layers; loss on held-out Python."
    )
    return table(header, rows) + f"\n\n{note}"


def _label(name: str) -> str:
    return {
        "base": "(before)",
        "ft-none": "no balance loss",
        "ft-mi": "mutual information 0.001, as in pretraining",
    }.get(name, name.replace("ft-con-", "concentration "))


def _curve(study: Study, name: str, way: str) -> list[dict[str, Any]]:
    return study.json(f"prune-{name}-{way}.json")["points"]


def _mean_curve(study: Study, name: str, method: str) -> list[dict[str, float]]:
    if method != "random":
        return _curve(study, name, method)
    files = sorted(study.folder.glob(f"prune-{name}-random*.json"))
    curves = [json.loads(file.read_text())["points"] for file in files]
    return [
        {"pruned_share": points[0]["pruned_share"], "loss": sum(p["loss"] for p in points) / len(points)}
        for points in zip(*curves)
    ]


def _free_share(points: list[dict[str, float]]) -> float:
    """The largest share for which, and for every smaller one, the loss is within 1% of that with nothing gone."""
    bound = 1.01 * points[0]["loss"]
    free = 0.0
    for point in points:
        if point["loss"] > bound:
            break
        free = point["pruned_share"]
    return free


def _pruning(study: Study, tuned: list[str], pictures: Path) -> str:
    plt = require_matplotlib()
    figure, axes = plt.subplots(1, len(METHODS), figsize=(15, 4), sharey=True, layout="constrained")
    rows = []
    for name in tuned:
        curves = {method: _mean_curve(study, name, method) for method in METHODS}
        for axis, method in zip(axes, METHODS):
            points = curves[method]
            axis.plot(
                [100 * p["pruned_share"] for p in points], [p["loss"] for p in points], "o-", ms=3, label=_label(name)
            )
        at = {method: {round(p["pruned_share"], 2): p["loss"] for p in curves[method]} for method in METHODS}
        near = {method: min(at[method], key=lambda share: abs(share - 0.3)) for method in METHODS}
        rows.append(
            [_label(name), f"{curves['use'][0]['loss']:.3f}"]
            + [f"{_free_share(curves[method]):.0%}" for method in METHODS]
            + [f"{at[method][near[method]]:.3f}" for method in METHODS]
        )
    for axis, method in zip(axes, METHODS):
        axis.set_title(METHODS[method])
        axis.set_xlabel("parameters pruned, %")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("loss on held-out Python, nats a token")
    axes[-1].legend(fontsize=8)
    figure.savefig(pictures / "pruning.png", dpi=120)
    plt.close(figure)
    header = ["fine-tuned with", "loss"]
    header += [f"free: {method}" for method in METHODS] + [f"30% pruned: {method}" for method in METHODS]
    return (
        table(header, rows)
        + "\n\nFree: the largest measured share of all parameters that can go with less than 1% change of the loss. "
        + "; ".join(f"{key}: {text}" for key, text in METHODS.items())
        + ".\n\n"
        + f"![loss against share pruned]({pictures.name}/pruning.png)\n\n"
        + _tuned_on(study)
    )


def _tuned_on(study: Study) -> str:
    rows = []
    for run in sorted(study.folder.glob("pruned-*-tuned")):
        source = run.name.removeprefix("pruned-").removesuffix("-tuned")
        points = _curve(study, source, "use")
        pruned = min(points, key=lambda point: abs(point["pruned_share"] - 0.3))
        evaluated = study.json(f"evaluate-{run.name}.json")["data"][0]["loss"]
        rows.append([_label(source), f"{points[0]['loss']:.3f}", f"{pruned['loss']:.3f}", f"{evaluated:.3f}"])
    header = ["fine-tuned with", "loss before", "30% pruned by use", "and tuned for 100 steps"]
    return table(header, rows)


def _insertion(study: Study, stages: dict[str, Any], pictures: Path) -> str:
    runs = [name for name in stages if name.startswith(("life-", "joint-"))]
    header = ["run", "trained parameters", "python", "english", "french", "old: change", "new: change"]
    blocks = []
    points = []
    for start in ("life", "joint"):
        rows = []
        for dense in (False, True):
            origin = "dense" if dense else "base"
            before = _losses(study, origin)
            rows.append(
                [f"**{'dense' if dense else 'MoLM'}, before**", "", *(f"{before[d]:.3f}" for d in DOMAINS), "", ""]
            )
            for name in runs:
                if not name.startswith(start) or ("dense" in name) != dense:
                    continue
                after = _losses(study, name)
                old = sum(after[d] - before[d] for d in ("python", "english")) / 2
                new = after["french"] - before["french"]
                trained, _ = _sizes(study, name)
                rows.append(
                    [
                        _run_label(name),
                        f"{trained:,}",
                        *(f"{after[d]:.3f}" for d in DOMAINS),
                        f"{old:+.3f}",
                        f"{new:+.3f}",
                    ]
                )
                if start == "life":
                    points.append((name, dense, old, after["french"]))
        title = (
            "Lifelong: French only, 160 steps of 2048 tokens."
            if start == "life"
            else "Joint: Python, English and French in equal parts, embeddings trained too, 160 steps of 2048 tokens."
        )
        blocks.append(f"{title}\n\n{table(header, rows)}")
    _scatter(points, pictures / "insertion.png")
    note = (
        "Old: mean change of the losses on Python and English; new: on French. Inserted: 2 attention and 4 MLP modules "
        "a layer, random. Strategy 1 trains them and the routers (A, B, A'), strategy 2 them and their rows A' alone; "
        "lambda weighs the squared norm of A'. Learning rate 1e-3 for all."
    )
    return "\n\n".join([blocks[0], f"![old against new]({pictures.name}/insertion.png)", blocks[1], note])


def _run_label(name: str) -> str:
    kind = name.split("-", 1)[1].removeprefix("dense-")
    if kind == "full":
        return "all parameters"
    if kind.startswith("lora-"):
        return f"LoRA, rank {kind.removeprefix('lora-')}"
    if kind == "inserted":
        return "inserted modules, strategy 1"
    strategy, penalty = kind.rsplit("-", 1)
    return f"inserted modules, strategy {1 if strategy == 'inserted' else 2}, lambda {penalty}"


def _scatter(points: list[tuple[str, bool, float, float]], path: Path) -> None:
    plt = require_matplotlib()
    figure, axis = plt.subplots(figsize=(7.5, 5), layout="constrained")
    for name, dense, old, new in points:
        axis.plot(old, new, "s" if dense else "o", color="tab:grey" if dense else "tab:blue", ms=5)
        axis.annotate(
            f"{'dense: ' if dense else ''}{_run_label(name)}",
            (old, new),
            fontsize=6,
            xytext=(4, 2),
            textcoords="offset points",
        )
    axis.set_xlabel("old domains: growth of the loss (forgetting)")
    axis.set_ylabel("loss on French")
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=140)
    plt.close(figure)


def _commands(stages: dict[str, Any]) -> str:
    lines = "\n".join(record["command"] for record in stages.values() if "command" in record)
    return f"<details><summary>all commands, in the folder DIR</summary>\n\n```\n{lines}\n```\n\n</details>"

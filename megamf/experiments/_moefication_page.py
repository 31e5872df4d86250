"""The page of the MoEfication experiment, written from its stages."""

import json
from pathlib import Path
from typing import Any

from megamf.experiments.pages import reading, table
from megamf.experiments.stages import Study

TITLES = {
    "nano": "A dense baseline with ReLU (4 layers of 768 neurons, trained by megamf)",
    "relu": "SmolLM2-135M after a short training with ReLU",
    "smollm2-135m": "SmolLM2-135M as it is, by magnitude (an extension: SiLU is never zero)",
}
SPLITS = ("random", "clustering", "coactivation")


def write(study: Study, page: Path, names: list[str], scale: float) -> None:
    """Write the page, and one picture a model beside it."""
    page.parent.mkdir(parents=True, exist_ok=True)
    parts = [_head(scale), reading(page), _times(study)]
    for name in names:
        results = {
            split: _result(study, f"{name}-{split}") | {"fitted": _result(study, f"{name}-{split}-fitted")}
            for split in SPLITS
        }
        picture = page.with_name(f"{page.stem}_{name.replace('-', '_')}.png")
        draw(results, TITLES[name], picture)
        parts.append(_model(study, name, results, picture.name))
    seconds = sum(json.loads(file.read_text())["seconds"] for file in (study.folder / "stages").glob("*.json"))
    parts.append(f"All stages took {seconds / 60:.0f} minutes.")
    page.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _result(study: Study, stage: str) -> Any:
    return json.loads((study.folder / "stages" / f"{stage}.json").read_text())["result"]


def _head(scale: float) -> str:
    return f"""# MoEfication: dense models as experts of neurons

    python -m megamf.experiments.moefication --work DIR --page docs/experiments/moefication.md --scale {scale:g}

Every feed-forward layer's neurons are split into experts of 32; a router names the experts that a token needs, and only
those are computed. Losses are nats a token on held-out English documents, everything on the CPU. The ground truth looks
at all activations before it chooses, so it saves nothing: it is the bound for the other two routers. MLP routers are
trained for the best fifth of the experts and used for all shares."""


def _times(study: Study) -> str:
    found = _result(study, "times")
    rows = [
        [layer, row["tokens"], f"{row['dense']:.3f}", f"{row['sparse']:.3f}", f"{row['dense'] / row['sparse']:.2f}",
         f"{row['all']:.3f}", f"{row['grouped']:.3f}"]
        for layer, measured in found.items() for row in measured
    ]  # fmt: skip
    text = "## Time\n\nOne layer at a quarter of its experts, router included (ms, median):\n\n"
    text += table(["layer", "tokens", "dense", "sparse", "times faster", "all experts", "permute and grouped"], rows)
    text += (
        "\n\nThe last two columns are without the router: every expert by the kernel of the sparse layer, which tells "
        "what part of its gain is the kernel's (the dense layer's products are torch's); and the chosen quarter by "
        "permutation and grouped products, the path of training."
    )
    if (study.folder / "stages" / "model-times.json").exists():
        rows = [
            [row["tokens"], f"{row['dense']:.1f}", f"{row['sparse']:.1f}", f"{row['dense'] / row['sparse']:.2f}"]
            for row in _result(study, "model-times")
        ]
        text += "\n\nThe whole of SmolLM2-135M, one forward pass (ms):\n\n"
        text += table(["tokens", "dense", "sparse", "times faster"], rows)
    return text


def _model(study: Study, name: str, results: dict[str, Any], picture: str) -> str:
    some, without = results["random"], _result(study, f"{name}-without")
    shares = list(some["loss"]["truth"])
    rows = []

    def row(label: str, recovered: str, losses: dict[str, float]) -> None:
        kept = 100 * (without - losses["0.25"]) / (without - some["dense"])
        cells = [f"{losses[share]:.3f}" if share in losses else "" for share in shares]
        rows.append([label, recovered, *cells, f"{kept:.1f}%"])

    for split, result in results.items():
        for router, losses in result["loss"].items():
            row(f"{split}, {router}", f"{100 * result['recovered'][router]:.0f}%", losses)
        row(f"{split}, mlp, W2 fitted", "", result["fitted"])
    header = ["split, router", "activation in 20%", *(f"{100 * float(share):.0f}%" for share in shares), "kept at 25%"]
    text = f"## {TITLES[name]}\n\n![loss against share]({picture})\n\nDense: {some['dense']:.3f}, without any "
    text += f"feed-forward layer {without:.3f}; `kept` is the part of this difference that stays. "
    text += f"Neurons that are not zero: {100 * some['active']:.1f}%."
    if name == "relu":
        trained = _result(study, "relu")
        text += f" {trained['steps']} steps with ReLU: from {trained['before']:.3f} (SiLU) to {trained['after']:.3f}."
    text += f" Loss by share of the experts:\n\n{table(header, rows)}"
    if (study.folder / "stages" / f"{name}-tuned.json").exists():
        tuned = _result(study, f"{name}-tuned")
        text += (
            f"\n\nCo-activation, MLP routers, a quarter of the experts, W2 trained on text for {tuned['steps']} steps "
            f"with the routers fixed: {tuned['before']:.3f} before, {tuned['after']:.3f} after."
        )
    return text


def draw(results: dict[str, Any], title: str, path: Path) -> None:
    """Loss against share: a panel a split, a line a router, the dense loss dotted."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.4), layout="constrained")
    panels = figure.subplots(1, len(results), sharey=True)
    for panel, (split, result) in zip(panels, results.items()):
        for router, losses in result["loss"].items():
            panel.plot([100 * float(s) for s in losses], list(losses.values()), "o-", label=router)
        fitted = result["fitted"]
        panel.plot([100 * float(s) for s in fitted], list(fitted.values()), "s", label="mlp, W2 fitted")
        panel.axhline(result["dense"], color="black", linestyle=":", label="dense")
        panel.set(title=split, xlabel="experts computed (%)")
    panels[0].set_ylabel("loss (nats a token)")
    panels[0].legend()
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110)

"""Pictures of modules: layers x modules heat maps of use, and curves of pruning. Needs matplotlib (extra `report`)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megamf.errors import UserError
from megamf.modularity.places import KINDS, Place
from megamf.modularity.statistics import Statistics


def require_matplotlib() -> Any:
    """matplotlib.pyplot without a display. Raises UserError where it is missing."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise UserError("pictures need matplotlib; install it with: pip install 'megamf[report]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def heat_maps(statistics: Sequence[Statistics], path: Path) -> None:
    """One row of maps a dataset (f_m); with two datasets a third, the difference of their f_m, second minus first."""
    plt = require_matplotlib()
    rows = [(item.data, item.frequencies()) for item in statistics]
    if len(rows) == 2:
        rows.append((f"{_short(rows[1][0])} minus {_short(rows[0][0])}", _difference(rows[0][1], rows[1][1])))
    figure, axes = plt.subplots(len(rows), 2, figsize=(11, 0.9 + 2.4 * len(rows)), squeeze=False, layout="constrained")
    for line, (name, frequencies) in zip(axes, rows):
        signed = any(value < 0 for values in frequencies.values() for value in values)
        for axis, kind in zip(line, KINDS):
            _map(axis, figure, frequencies, kind, signed)
            axis.set_title(f"{kind}: {name if signed else _short(name)}", fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _difference(first: dict[Place, list[float]], second: dict[Place, list[float]]) -> dict[Place, list[float]]:
    return {place: [b - a for a, b in zip(first[place], second[place])] for place in first}


def _map(axis: Any, figure: Any, frequencies: Mapping[Place, Sequence[float]], kind: str, signed: bool) -> None:
    chosen = [values for place, values in sorted(frequencies.items()) if place.kind == kind]
    width = max(map(len, chosen))
    grid = [[*values, *[float("nan")] * (width - len(values))] for values in chosen]
    largest = max(abs(value) for values in chosen for value in values) or 1.0
    colours = {"cmap": "RdBu_r", "vmin": -largest, "vmax": largest} if signed else {"cmap": "viridis", "vmin": 0}
    image = axis.imshow(grid, aspect="auto", interpolation="nearest", **colours)
    axis.set_xlabel("module")
    axis.set_ylabel("layer")
    axis.locator_params(integer=True)
    figure.colorbar(image, ax=axis, label="difference of f" if signed else "f, share of tokens")


def _short(name: str) -> str:
    return Path(name).name


def pruning_curves(curves: Mapping[str, Sequence[Any]], path: Path) -> None:
    """Loss against the share of parameters pruned, a line a method; `curves`: name -> points with a measured loss."""
    plt = require_matplotlib()
    figure, axis = plt.subplots(figsize=(6.4, 4), layout="constrained")
    for name, points in curves.items():
        axis.plot([100 * p.pruned_share for p in points], [p.loss for p in points], "o-", label=name, markersize=3)
    axis.set_xlabel("parameters pruned, %")
    axis.set_ylabel("loss, nats a token")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)

"""The `plan` suite: what `megamf plan` predicts against real training steps of 2 and 4 processes of the CPU.

A rank's peak memory and the order of layouts by step time. The rate of matrix products and of the links is measured in
the same run, by all processes at once, and given to the prediction; so is nothing else.
"""

from collections.abc import Callable
from itertools import combinations
from typing import Any

from megamf.bench.layouts import measure
from megamf.bench.suite import Figure, Result, machine, rounded
from megamf.config import RunConfig, load_config
from megamf.plan.cluster import Cluster
from megamf.plan.devices import GIB
from megamf.plan.predict import Prediction, predict

# Layouts whose predicted times differ by less are not ordered by the figure.
CLEARLY = 1.15
SIZES = ["train.seq_len=128", "train.micro_batch=2", "model.ffd_hidden=768", "losses.scope=micro_batch"]


def run(progress: Callable[[str], Callable[[], None]], *, repeats: int = 15) -> Result:
    """Measure everything. `progress(what)` returns a function that is called when a part of `what` is done."""
    where = machine()
    figures, rows = [], []
    for world in (2, 4):
        found, details = compare(world, layouts(world), max(3, repeats // 3))
        figures += found
        rows += details
        progress(f"{world} processes")()
    return Result("plan", figures, where, rows=rows)


def layouts(world: int) -> dict[str, RunConfig]:
    """EP x ZeRO x recomputation, two micro batches a step."""
    found = {}
    for ep in (1, 2, 4):
        for stage in (0, 1, 2):
            for mode in ("none", "full"):
                if world % ep:
                    continue
                overrides = [*SIZES, f"train.global_batch={4 * world}", f"parallel.ep={ep}", f"deepspeed=zero{stage}"]
                if ep > 1:
                    overrides.append("parallel.attention_experts=move_tokens")
                config = load_config(preset="nano", overrides=[*overrides, f"train.activation_checkpointing={mode}"])
                found[f"w{world}_ep{ep}_zero{stage}_{mode}"] = config
    return found


def compare(world: int, cases: dict[str, RunConfig], repeats: int) -> tuple[list[Figure], list[dict[str, Any]]]:
    """Figures of the layouts on `world` processes, and a row for each of them."""
    measured = measure(cases, world, repeats=repeats)
    rate, link = measured["gemm_flops"], measured["bytes_per_second"]
    cluster = Cluster.of(
        "cpu", 1, world, memory=8 * GIB, peak_flops=rate, intra_node=link, inter_node=link,
        efficiency=1.0, network_efficiency=1.0, imbalance=1.0,
    )  # fmt: skip
    predicted = {name: predict(config, cluster) for name, config in cases.items()}
    seconds = {name: found["seconds"] for name, found in measured["cases"].items()}
    figures = [
        Figure(f"w{world}_gemm_gflops", rate / 1e9, "matrix products of one process while all compute"),
        Figure(f"w{world}_link_mbs", link / 1e6, "MB/s that a process sends in an all-to-all"),
        Figure(
            f"w{world}_order_kept", order_kept(predicted, seconds),
            f"share of pairs of layouts, predicted to differ by {CLEARLY:g} times, in the measured order", at_least=0.9,
        ),
        Figure(f"w{world}_rank_correlation", rank_correlation(predicted, seconds), "Spearman's, of all step times"),
    ]  # fmt: skip
    ratios = {name: predicted[name].memory.peak / found["peak"] for name, found in measured["cases"].items()}
    worst = max(ratios.values(), key=lambda ratio: abs(ratio - 1))
    figures.append(Figure(f"w{world}_memory_worst", worst, "predicted over counted peak, of all layouts", 1.1, 0.9))
    rows = [
        {
            "layout": name,
            "measured_ms": rounded(1e3 * seconds[name]),
            "predicted_ms": rounded(1e3 * predicted[name].time.total),
            "counted_mb": rounded(found["peak"] / 1e6),
            "predicted_mb": rounded(predicted[name].memory.peak / 1e6),
        }
        for name, found in measured["cases"].items()
    ]
    return figures, rows


def order_kept(predicted: dict[str, Prediction], seconds: dict[str, float]) -> float:
    """Of the pairs that are predicted to differ clearly, the share that is measured in that order; 1 without such."""
    kept = []
    for a, b in combinations(predicted, 2):
        first, second = predicted[a].time.total, predicted[b].time.total
        if max(first, second) > CLEARLY * min(first, second):
            kept.append((first < second) == (seconds[a] < seconds[b]))
    return sum(kept) / len(kept) if kept else 1.0


def rank_correlation(predicted: dict[str, Prediction], seconds: dict[str, float]) -> float:
    """Spearman's rank correlation; equal values share no ranks (times are never quite equal)."""
    names = list(predicted)
    left = sorted(names, key=lambda name: predicted[name].time.total)
    right = sorted(names, key=seconds.__getitem__)
    gaps = sum((left.index(name) - right.index(name)) ** 2 for name in names)
    count = len(names)
    return 1 - 6 * gaps / (count * (count**2 - 1))

"""Predictions for people: tables on a terminal, and Markdown. Every one says that it is predicted."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from megamf.plan.cluster import Cluster
from megamf.plan.layout import warnings
from megamf.plan.predict import Prediction

GIB = 2**30
GB = 10**9

MEANINGS = {
    "weights": "in the training precision",
    "optimizer": "moments and fp32 masters",
    "gradients": "accumulated",
    "activations": "saved for the backward pass",
    "loss": "logits of one chunk",
    "layer": "backward pass of one layer",
    "bucket": "gradients on their way",
    "update": "copies at the optimizer step",
    "peak": "the most that meets",
    "host": "in the host's memory",
}


def show(console: Console, common: dict, found: Prediction) -> None:
    """Everything about one layout."""
    cluster = found.cluster
    parameters = common["parameters"]
    console.print(f"parameters       {parameters['total']:,} ({parameters['active']:,} active per token)")
    if found.job.tuned:
        trained, strategy = found.job.tuned, found.job.config.tune.strategy
        console.print(
            f"trained          {trained.total:,} (tune.strategy={strategy}), {trained.added:,} of them adapters"
        )
    console.print(
        f"training FLOPs   {common['train_flops_per_token']:.4g} per token, {common['train_flops']:.4g} in all"
    )
    console.print(f"tokens           {common['tokens']:,}")
    console.print(f"cluster          {where(cluster)}")
    console.print(f"layout           {found.overrides}, {found.job.accumulation} micro batches a step")
    console.print(_memory(found))
    console.print(_traffic(found))
    if found.attention_bytes:
        counts = ", ".join(f"{name} {size / GB:.3f} GB" for name, size in found.attention_bytes.items())
        console.print(f"attention experts, a step: {counts}; this run: {found.job.attention_experts}")
    console.print(_time(found))
    for name, value in results(found):
        console.print(f"{name:<17}{value}")
    for said in warnings(found):
        console.print(f"[bold]warning[/bold]          {said}")
    console.print(_assumptions(cluster))


def show_search(console: Console, cluster: Cluster, ranked: Sequence[Prediction], most: int) -> None:
    """The fastest of the layouts that fit."""
    table = Table(
        title=f"predicted, fastest first: {len(ranked)} layouts fit on {where(cluster)}", title_justify="left"
    )
    for name in SEARCH_HEAD:
        table.add_column(name, justify="right")
    for found in ranked[:most]:
        table.add_row(*search_row(found))
    console.print(table)
    if ranked:
        console.print(f"fastest          {ranked[0].overrides}")
    console.print(_assumptions(cluster))


SEARCH_HEAD = (
    "EP", "DeepSpeed", "context", "recompute", "micro batch", "GiB peak", "step s", "exposed", "MFU", "tokens/s",
    "days",
)  # fmt: skip


def search_row(found: Prediction) -> list[str]:
    """One line of the ranking."""
    job, config = found.job, found.job.config
    return [
        str(job.ep), config.deepspeed, str(job.context), config.train.activation_checkpointing,
        str(config.train.micro_batch), f"{found.memory.peak / GIB:.1f}", f"{found.time.total:.3f}",
        f"{found.time.communication / found.time.total:.0%}", f"{found.mfu:.1%}", f"{found.tokens_per_second:,.0f}",
        f"{found.days:.1f}",
    ]  # fmt: skip


def results(found: Prediction) -> list[tuple[str, str]]:
    """What people ask for, in words."""
    saved, memory = found.checkpoint, found.cluster.memory
    return [
        (
            "fits",
            f"{'yes' if found.fits else 'NO'}, {found.memory.peak / GIB:.1f} of {memory / GIB:.0f} GiB",
        ),
        ("step", f"{found.time.total:.3f} s, of which {found.time.communication:.3f} s exposed communication"),
        ("MFU", f"{found.mfu:.1%}"),
        ("tokens", f"{found.tokens_per_second:,.0f} a second, {found.tokens_per_day / 1e9:,.2f} billion a day"),
        ("300B tokens", f"{found.days:.1f} days"),
        ("checkpoint", f"{saved.training / GB:.1f} GB in {saved.seconds:.0f} s; exported {saved.exported / GB:.1f} GB"),
    ]


def where(cluster: Cluster) -> str:
    """The machines in words."""
    return f"{cluster.nodes} nodes of {cluster.gpus_per_node} {cluster.gpu}"


def markdown(command: str, common: dict, found: Prediction, ranked: Sequence[Prediction] = (), most: int = 5) -> str:
    """A block for a page: what was asked, the figures, the fastest layouts, the assumptions."""
    total, active = common["parameters"]["total"], common["parameters"]["active"]
    lines = [
        f"Predicted by `{command}`, not measured: {total:,} parameters ({active:,} active per token) on "
        f"{where(found.cluster)}, `{found.overrides}`.",
        "",
        "| | predicted |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in results(found)),
        f"| memory of a rank, GiB | {_sizes(found)} |",
        f"| a step, seconds | {_seconds(found)} |",
    ]
    if ranked:
        lines += ["", "The fastest layouts that fit:", "", f"| {' | '.join(SEARCH_HEAD)} |"]
        lines.append(f"|{'---:|' * len(SEARCH_HEAD)}")
        lines += [f"| {' | '.join(search_row(item))} |" for item in ranked[:most]]
    figures = "; ".join(f"`{option} {value:g}`" for option, value, _, _ in found.cluster.assumptions())
    return "\n".join([*lines, "", f"Assumed: {figures}."])


def _sizes(found: Prediction) -> str:
    sizes = [(name, size / GIB) for name, size in found.memory.rows() if name not in ("peak", "host")]
    return ", ".join(f"{name} {size:.1f}" for name, size in sizes if size >= 0.05)


def _seconds(found: Prediction) -> str:
    time = found.time
    spent = [(name, getattr(time, name)) for name in time.__dataclass_fields__]
    return ", ".join(f"{TIMES[name]} {value:.3f}" for name, value in spent if value >= 5e-4)


TIMES = {
    "products": "matrix products",
    "elementwise": "other operations",
    "optimizer": "optimizer",
    "experts": "expert parallelism",
    "context": "context parallelism",
    "zero": "gradients and weights",
    "hidden": "(hidden traffic)",
    "small": "small sums",
}


def _memory(found: Prediction) -> Table:
    table = Table(title="memory of a rank (predicted)", title_justify="left")
    for name in ("part", "GiB", "what"):
        table.add_column(name, justify="right" if name == "GiB" else "left")
    for name, size in found.memory.rows():
        table.add_row(name, f"{size / GIB:.2f}", MEANINGS[name])
    return table


def _traffic(found: Prediction) -> Table:
    table = Table(title="collectives of one step, each rank (predicted)", title_justify="left")
    for name in ("what", "kind", "ranks", "over nodes", "calls", "MB a call", "GB a step", "s"):
        table.add_column(name, justify="left" if name in ("what", "kind") else "right")
    for item in found.collectives:
        table.add_row(
            item.name, item.kind, str(item.group.size), "yes" if item.group.crosses(found.cluster) else "no",
            str(item.calls), f"{item.sent / 1e6:.3f}", f"{item.bytes / GB:.3f}", f"{item.seconds(found.cluster):.4f}",
        )  # fmt: skip
    return table


def _time(found: Prediction) -> Table:
    table = Table(title="seconds of one step (predicted)", title_justify="left")
    table.add_column("what")
    table.add_column("s", justify="right")
    for name, meaning in TIMES.items():
        table.add_row(meaning, f"{getattr(found.time, name):.4f}")
    table.add_row("step", f"{found.time.total:.4f}")
    return table


def _assumptions(cluster: Cluster) -> Table:
    table = Table(title="assumed (each can be given)", title_justify="left")
    for name in ("option", "value", "unit", "what"):
        table.add_column(name, justify="right" if name == "value" else "left")
    for option, value, unit, meaning in cluster.assumptions():
        table.add_row(option, f"{value:g}", unit, meaning)
    return table

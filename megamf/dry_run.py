"""`megamf train --dry-run`: the resolved configuration, parameter counts and the memory of a rank; then stop."""

from rich.console import Console
from rich.table import Table

from megamf.build import check
from megamf.config import RunConfig, dump
from megamf.plan.cluster import Cluster
from megamf.plan.flops import count_parameters, train_flops_per_token
from megamf.plan.job import Job
from megamf.plan.memory import rank_memory

GIB = 2**30
IMBALANCE = Cluster.imbalance


def dry_run(config: RunConfig, num_ranks: int) -> int:
    """Print what a run with this configuration on `num_ranks` ranks would be. Returns the exit code."""
    check(config, num_ranks)
    console = Console(highlight=False)
    console.print(dump(config), markup=False, end="")
    counts = count_parameters(config.model)
    job = Job.of(config, num_ranks)
    memory = rank_memory(job, IMBALANCE)

    title = f"{num_ranks} ranks, ep {job.ep}, context {job.context}, ZeRO {job.engine.stage}"
    table = Table(title=title, title_justify="left")
    table.add_column("what")
    table.add_column("size", justify="right")
    table.add_row("parameters", f"{counts.total:,}")
    table.add_row("active per token", f"{counts.active:,}")
    table.add_row("training FLOPs per token", f"{train_flops_per_token(config.model, config.train.seq_len):.3g}")
    tokens = config.train.steps * config.train.global_batch * config.train.seq_len
    table.add_row("tokens in all", f"{tokens:,}")
    table.add_row("accumulation steps", str(job.accumulation))
    for name, size in memory.rows():
        table.add_row(f"memory of a rank (predicted): {name}", f"{size / GIB:.2f} GiB")
    console.print(table)
    return 0

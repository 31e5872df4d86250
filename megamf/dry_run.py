"""`megamf train --dry-run`: the resolved configuration, parameter counts and the memory of a rank; then stop."""

from rich.console import Console
from rich.table import Table

from megamf.build import check
from megamf.callbacks.checkpointing import inserted_modules
from megamf.config import RunConfig, dump
from megamf.plan.cluster import Cluster
from megamf.plan.fake import fake_step
from megamf.plan.flops import count_parameters, train_flops_per_token
from megamf.plan.job import Job
from megamf.plan.memory import rank_memory

GIB = 2**30
IMBALANCE = Cluster.imbalance
COUNTED = (
    "counted: forward and backward of the real model on fake tensors, as rank 0 of a fake process group, with the "
    "CPU's operations; rows between ranks as even as assumed; shards, buckets and copies of the engine by the rules of "
    "its stage, not by DeepSpeed; activations with the logits of the last chunk"
)


def dry_run(config: RunConfig, num_ranks: int, fake_world: int | None = None) -> int:
    """Print what a run with this configuration on `num_ranks` ranks would be. Returns the exit code.

    fake_world: instead as many ranks as this, and the memory also counted in a step on fake tensors.
    """
    num_ranks = fake_world or num_ranks
    check(config, num_ranks)
    console = Console(highlight=False)
    console.print(dump(config), markup=False, end="")
    counts = count_parameters(config.model)
    inserted = inserted_modules(config)
    job = Job.of(config, num_ranks, inserted=inserted)
    memory = rank_memory(job, IMBALANCE)

    title = f"{num_ranks} ranks, ep {job.ep}, context {job.context}, ZeRO {job.engine.stage}"
    table = Table(title=title, title_justify="left")
    table.add_column("what")
    table.add_column("size", justify="right")
    counted = fake_step(config, num_ranks, IMBALANCE, inserted) if fake_world else None
    if counted:
        table.add_column("counted", justify="right")
    table.add_row("parameters", f"{counts.total:,}")
    table.add_row("active per token", f"{counts.active:,}")
    if job.tuned:
        table.add_row(f"trained (tune.strategy={config.tune.strategy})", f"{job.tuned.total:,}")
    if job.tuned and job.tuned.added:
        table.add_row("adapters among them", f"{job.tuned.added:,}")
    table.add_row("training FLOPs per token", f"{train_flops_per_token(config.model, config.train.seq_len):.3g}")
    tokens = config.train.steps * config.train.global_batch * config.train.seq_len
    table.add_row("tokens in all", f"{tokens:,}")
    table.add_row("accumulation steps", str(job.accumulation))
    for name, size in memory.rows():
        cells = [f"{getattr(counted, name) / GIB:.2f} GiB"] if hasattr(counted, name) else []
        table.add_row(f"memory of a rank (predicted): {name}", f"{size / GIB:.2f} GiB", *cells)
    console.print(table)
    if counted:
        console.print(COUNTED)
    return 0

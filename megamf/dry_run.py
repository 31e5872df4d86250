"""`megamf train --dry-run`: the resolved configuration, parameter counts and the memory of a rank; then stop."""

from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from megamf.build import check
from megamf.config import RunConfig, dump
from megamf.parallel.zero import deepspeed_config
from megamf.plan.flops import count_parameters, train_flops_per_token
from megamf.plan.memory import rank_memory

GIB = 2**30


def dry_run(config: RunConfig, num_ranks: int) -> int:
    """Print what a run with this configuration on `num_ranks` ranks would be. Returns the exit code."""
    check(config, num_ranks)
    console = Console(highlight=False)
    console.print(dump(config), markup=False, end="")
    counts = count_parameters(config.model)
    stage = deepspeed_config(config, num_ranks)["zero_optimization"]["stage"]
    memory = rank_memory(config, num_ranks, ep=config.parallel.ep, zero_stage=stage)

    layout = f"ep {config.parallel.ep}, context {config.parallel.context}, ZeRO {stage}"
    table = Table(title=f"{num_ranks} ranks, {layout}", title_justify="left")
    table.add_column("what")
    table.add_column("size", justify="right")
    table.add_row("parameters", f"{counts.total:,}")
    table.add_row("active per token", f"{counts.active:,}")
    table.add_row("training FLOPs per token", f"{train_flops_per_token(config.model, config.train.seq_len):.3g}")
    tokens = config.train.steps * config.train.global_batch * config.train.seq_len
    table.add_row("tokens in all", f"{tokens:,}")
    table.add_row("accumulation steps", str(config.accumulation_steps(num_ranks)))
    for name, size in (*asdict(memory).items(), ("memory in all", memory.total)):
        table.add_row(f"{name}, each rank (predicted)", f"{size / GIB:.2f} GiB")
    console.print(table)
    return 0

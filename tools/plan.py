"""Shows what a run will need: parameters, FLOPs, memory per rank by layout, and which layout to take."""

import argparse
import json
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from megamf.cli import run
from megamf.config import ConfigError, RunConfig, load_config
from megamf.plan import DEVICES, Layout, count_parameters, layouts, recommend, train_flops_per_token

GIB = 2**30


def main(argv: list[str] | None = None) -> int:
    """Print the plan; exit code 1 when no layout fits the device."""
    args = _parser().parse_intermixed_args(argv)
    if args.ranks < 1:
        raise ConfigError(f"--ranks {args.ranks}: at least one rank")
    if args.imbalance < 1:
        raise ConfigError(f"--imbalance {args.imbalance}: at least 1, the even share")
    if args.device == "cpu" and args.memory_gib is None:
        raise ConfigError("--device cpu needs --memory-gib, the memory of one rank")
    files = [word for word in args.words if "=" not in word]
    if len(files) > 1:
        raise ConfigError(f"one configuration file, not {len(files)}: {' '.join(files)}")
    overrides = [word for word in args.words if "=" in word]
    config = load_config(files[0] if files else None, preset=args.preset, overrides=overrides)
    memory = int(args.memory_gib * GIB) if args.memory_gib is not None else DEVICES[args.device].memory
    candidates = layouts(config, args.ranks, memory, eps=args.ep, imbalance=args.imbalance)
    best = recommend(candidates)
    plan = _plan(config, args, memory, candidates, best)
    if args.json:
        print(json.dumps(plan, indent=2))
    else:
        _show(plan, best)
    return 0 if best else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="megamf plan", description=__doc__)
    parser.add_argument(
        "words", nargs="*", metavar="CONFIG.yaml | section.key=value", help="configuration and overrides"
    )
    parser.add_argument("--preset", help="start from a packaged preset")
    parser.add_argument("--ranks", type=int, required=True, help="processes, one a device")
    parser.add_argument("--ep", type=int, nargs="+", help="only these expert-parallel degrees (default: all possible)")
    parser.add_argument("--device", choices=[*DEVICES, "cpu"], default="h100", help="default: h100")
    parser.add_argument("--memory-gib", type=float, help="memory of one device instead of the table's, in GiB")
    parser.add_argument(
        "--imbalance",
        type=float,
        default=1.5,
        help="busiest rank's share of routed rows over the even share (1.5)",
    )
    parser.add_argument("--mfu", type=float, default=0.35, help="utilisation assumed for the time estimate (0.35)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    return parser


def _plan(
    config: RunConfig, args: argparse.Namespace, memory: int, candidates: list[Layout], best: Layout | None
) -> dict:
    counts = count_parameters(config.model)
    flops = train_flops_per_token(config.model, config.train.seq_len)
    tokens = config.train.steps * config.train.global_batch * config.train.seq_len
    plan = {
        "ranks": args.ranks,
        "device": args.device,
        "device_memory": memory,
        "parameters": {"total": counts.total, "active": counts.active, **asdict(counts)},
        "train_flops_per_token": flops,
        "tokens": tokens,
        "train_flops": flops * tokens,
        "layouts": [_row(layout) for layout in candidates],
        "recommended": _row(best) if best else None,
    }
    if args.device in DEVICES:
        speed = DEVICES[args.device].peak_bf16 * args.ranks * args.mfu
        plan["estimate"] = {
            "assumed_mfu": args.mfu,
            "tokens_per_second": speed / flops,
            "days": flops * tokens / speed / 86400,
        }
    return plan


def _row(layout: Layout) -> dict:
    memory = dict(layout.memory.rows())
    return {"ep": layout.ep, "zero_stage": layout.zero_stage, "fits": layout.fits, "bytes_per_rank": memory}


def _show(plan: dict, best: Layout | None) -> None:
    console = Console(soft_wrap=True)
    parameters = plan["parameters"]
    console.print(f"parameters       {parameters['total']:,} ({parameters['active']:,} active per token)")
    console.print(f"training FLOPs   {plan['train_flops_per_token']:.4g} per token, {plan['train_flops']:.4g} in all")
    console.print(f"tokens           {plan['tokens']:,}")
    table = Table(
        title=f"GiB per rank, {plan['ranks']} ranks, {plan['device']} ({plan['device_memory'] / GIB:.0f} GiB)"
    )
    for name in ("EP", "ZeRO", "weights", "gradients", "optimizer", "activations", "logits", "total", "fits"):
        table.add_column(name, justify="right")
    for row in plan["layouts"]:
        sizes = [f"{size / GIB:.2f}" for size in row["bytes_per_rank"].values()]
        table.add_row(str(row["ep"]), str(row["zero_stage"]), *sizes, "yes" if row["fits"] else "no")
    console.print(table)
    if best is None:
        console.print("no layout fits: more ranks, a smaller train.micro_batch, or train.activation_checkpointing=full")
    else:
        console.print(f"recommended      parallel.ep={best.ep} deepspeed=zero{best.zero_stage}")
    if "estimate" in plan:
        guess = plan["estimate"]
        console.print(
            f"estimate         {guess['tokens_per_second']:,.0f} tokens/s, {guess['days']:.1f} days "
            f"(assuming {guess['assumed_mfu']:.0%} of the vendor's bf16 peak; not measured)"
        )


if __name__ == "__main__":
    raise SystemExit(run(main))

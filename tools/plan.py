"""Shows what a run will need on a cluster: memory, traffic, step time, days; and which layout to take."""

import argparse
import json
import sys

from rich.console import Console

from megamf.cli import run
from megamf.config import ConfigError, load_config
from megamf.plan.cluster import OPTIONS, Cluster
from megamf.plan.devices import DEVICES
from megamf.plan.layout import search, warnings
from megamf.plan.predict import predict, summary
from megamf.plan.report import markdown, show, show_search

WIDTH = 150


def main(argv: list[str] | None = None) -> int:
    """Print the plan; exit code 1 when the layout (with --search: every layout) does not fit the device."""
    given = sys.argv[1:] if argv is None else argv
    args = _parser().parse_intermixed_args(given)
    files = [word for word in args.words if "=" not in word]
    if len(files) > 1:
        raise ConfigError(f"one configuration file, not {len(files)}: {' '.join(files)}")
    if args.top < 1:
        raise ConfigError(f"--top {args.top}: at least 1")
    overrides = [word for word in args.words if "=" in word]
    config = load_config(files[0] if files else None, preset=args.preset, overrides=overrides)
    figures = {
        name: None if getattr(args, name) is None else getattr(args, name) * unit
        for name, (_, (_, unit), _) in OPTIONS.items()
    }
    cluster = Cluster.of(args.gpu, args.nodes, args.gpus_per_node, **figures)
    common = summary(config)
    ranked = search(config, cluster) if args.search else []
    # Without a terminal nobody cuts the tables.
    console = Console(soft_wrap=True, highlight=False, width=None if sys.stdout.isatty() else WIDTH)
    if args.search and not args.markdown:
        if args.json:
            tree = {"cluster": _cluster(cluster)} | common | {"layouts": [found.tree() for found in ranked]}
            print(json.dumps(tree, indent=2))
        else:
            show_search(console, cluster, ranked, args.top)
            if not ranked:
                console.print("no layout fits: more nodes, devices with more memory, or a shorter train.seq_len")
        return 0 if ranked else 1
    found = predict(config, cluster)
    if args.json:
        tree = {"cluster": _cluster(cluster)} | common | found.tree() | {"warnings": warnings(found)}
        print(json.dumps(tree, indent=2))
    elif args.markdown:
        print(markdown(f"megamf plan {' '.join(given)}", common, found, ranked, args.top))
    else:
        show(console, common, found)
    return 0 if found.fits else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megamf plan",
        description=__doc__ + " Everything is predicted by formula, from the figures below; nothing is measured.",
    )
    parser.add_argument(
        "words", nargs="*", metavar="CONFIG.yaml | section.key=value", help="configuration and overrides"
    )
    parser.add_argument("--preset", help="start from a packaged preset")
    parser.add_argument("--nodes", type=int, default=1, help="machines (1)")
    parser.add_argument("--gpus-per-node", type=int, default=8, help="devices, and processes, of each (8)")
    parser.add_argument("--gpu", choices=DEVICES, default="h100", help="what they are (h100)")
    parser.add_argument("--search", action="store_true", help="rank the layouts that fit by predicted step time")
    parser.add_argument("--top", type=int, default=12, help="how many of them to show (12)")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON: bytes and seconds")
    form.add_argument("--markdown", action="store_true", help="print a table for a page; with --search both")
    figures = parser.add_argument_group("assumptions", "instead of the device's entry or the default")
    for name, (option, (unit, _), meaning) in OPTIONS.items():
        figures.add_argument(option, dest=name, type=float, metavar=unit or "SHARE", help=meaning.replace("%", "%%"))
    return parser


def _cluster(cluster: Cluster) -> dict:
    return {
        "gpu": cluster.gpu,
        "nodes": cluster.nodes,
        "gpus_per_node": cluster.gpus_per_node,
        "assumptions": {option: {"value": value, "unit": unit} for option, value, unit, _ in cluster.assumptions()},
    }


if __name__ == "__main__":
    raise SystemExit(run(main))

"""A checkpoint as a set of modules: show what they do, prune them.

`show` measures which modules a model uses on given data; `prune` writes a checkpoint without some of them. The
checkpoint that is read stays as it is; what is written appears whole or not at all.
"""

import argparse
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megamf.checkpoint import Checkpoint, list_steps
from megamf.cli import run
from megamf.data.tokenizer import load_tokenizer
from megamf.errors import UserError
from megamf.evaluate.load import DTYPES, check_vocabulary, load_model
from megamf.evaluate.perplexity import measure
from megamf.evaluate.weights import trained_length
from megamf.modularity import pictures, prune
from megamf.modularity.edit import Kept, find_modules, model_of, module_counts, rearrange
from megamf.modularity.similarity import closest_pairs, similarity
from megamf.modularity.statistics import Statistics, collect, read_statistics, summary
from megamf.tools._models import add_model_options, device_of, positive, progress, refuse_unwritable, write_json

ACTIONS: dict[str, Callable[[argparse.Namespace], int]] = {}


def main(argv: list[str] | None = None) -> int:
    """Do what was asked for."""
    args = _parser().parse_args(argv)
    return ACTIONS[args.action](args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="megamf modules", description=__doc__.splitlines()[0])
    actions = parser.add_subparsers(dest="action", required=True)
    _show_options(actions.add_parser("show", help="use of every module on data: table, JSON, heat maps, duplicates"))
    _prune_options(actions.add_parser("prune", help="a checkpoint without the modules that are used least"))
    return parser


def _data_options(parser: argparse.ArgumentParser, *, required: bool, nargs: str | None) -> None:
    parser.add_argument(
        "--data", nargs=nargs, required=required, metavar="PREFIX", help="made by `megamf prepare`, without .bin"
    )
    parser.add_argument("--tokenizer", metavar="PATH", help="checked against the model")
    parser.add_argument("--seq-len", type=positive, metavar="N", help="tokens of a window (as in training)")
    parser.add_argument("--batch", type=positive, default=8, metavar="N", help="windows computed at one time (8)")
    parser.add_argument(
        "--max-batches", type=positive, metavar="N", help="at most so many batches, spread evenly over each dataset"
    )


def _load(args: argparse.Namespace):
    device = device_of(args)
    tokenizer = None if args.tokenizer is None else load_tokenizer(args.tokenizer)
    model, config = load_model(args.checkpoint, DTYPES[args.dtype], device)
    if tokenizer is not None:
        check_vocabulary(tokenizer, config.vocab_size)
    return model, args.seq_len or trained_length(args.checkpoint)


def _collect(args: argparse.Namespace, model, seq_len: int, prefix: str) -> Statistics:
    with progress(f"watching modules on {Path(prefix).name}") as advance:
        return collect(model, prefix, seq_len=seq_len, batch=args.batch, max_batches=args.max_batches, on_batch=advance)


def _show_options(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser)
    _data_options(parser, required=True, nargs="+")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all results; `prune --statistics` reads it")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="heat maps (PNG, PDF or SVG): layers x modules")
    parser.add_argument("--duplicates", type=float, metavar="COSINE", help="list pairs of modules that are more alike")


def _show(args: argparse.Namespace) -> int:
    for path in (args.json, args.picture):
        refuse_unwritable(path)
    if args.picture is not None:
        pictures.require_matplotlib()
    model, seq_len = _load(args)
    statistics = [_collect(args, model, seq_len, prefix) for prefix in args.data]
    tree = {"checkpoint": str(args.checkpoint), "statistics": [item.model_dump() for item in statistics]}
    console = Console(soft_wrap=True)
    for item in statistics:
        console.print(_use_table(item))
    if args.duplicates is not None:
        with progress("comparing modules") as advance:
            found = similarity(model, args.data[0], seq_len=seq_len, on_place=advance)
        pairs = [
            {"layer": place.layer, "kind": place.kind, "first": i, "second": j, "cosine": cosine}
            for place, matrix in found.items()
            for i, j, cosine in closest_pairs(matrix, args.duplicates)
        ]
        tree["duplicates"] = pairs
        console.print(_pairs_table(pairs, args.duplicates))
    write_json(args.json, tree)
    if args.picture is not None:
        pictures.heat_maps(statistics, args.picture)
    return 0


def _use_table(statistics: Statistics) -> Table:
    title = f"{statistics.data}: {statistics.tokens:,} tokens"
    table = Table(title=title, title_justify="left")
    columns = (
        "layer", "kind", "modules", "largest f", "smallest f", "< 0.3 % of largest", "< 3 %", "< 30 %",
        "H(m)", "H(m|x)", "mutual information",
    )  # fmt: skip
    for column in columns:
        table.add_column(column, justify="left" if column == "kind" else "right")
    for row in summary(statistics):
        shares = (f"{row[f'below_{limit}']:.1%}" for limit in ("0.003", "0.03", "0.3"))
        nats = (f"{row[key]:.3f}" for key in ("entropy", "conditional_entropy", "mutual_information"))
        use = (f"{row['largest']:.4f}", f"{row['smallest']:.4f}")
        table.add_row(str(row["layer"]), row["kind"], str(row["modules"]), *use, *shares, *nats)
    return table


def _pairs_table(pairs: list[dict], above: float) -> Table:
    table = Table(title=f"modules with a cosine above {above:g}", title_justify="left")
    for column in ("layer", "kind", "modules", "cosine"):
        table.add_column(column, justify="left" if column == "kind" else "right")
    for pair in pairs:
        table.add_row(str(pair["layer"]), pair["kind"], f"{pair['first']}, {pair['second']}", f"{pair['cosine']:.4f}")
    return table


def _prune_options(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser)
    parser.add_argument("out", type=Path, nargs="?", metavar="OUT", help="a new folder of checkpoints")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--tau", type=float, nargs="+", metavar="TAU", help="modules below TAU of their layer's largest score go"
    )
    which.add_argument("--share", type=float, nargs="+", metavar="S", help="this share of all parameters goes")
    which.add_argument("--modules", nargs="+", metavar="ID", help="these modules go, by id (`megamf checkpoint show`)")
    parser.add_argument(
        "--by", choices=("use", "norm", "random"), default="use", help="score of a module: how often it is chosen (use)"
    )
    parser.add_argument("--statistics", type=Path, metavar="JSON", help="of `modules show`, instead of --data")
    parser.add_argument("--seed", type=int, default=0, help="of --by random (0)")
    _data_options(parser, required=False, nargs=None)
    parser.add_argument(
        "--dry-run", action="store_true", help="write nothing; show what every TAU or S leaves, with --data its loss"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the curve there")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="with --dry-run and --data: loss by share pruned")


def _prune(args: argparse.Namespace) -> int:
    _check_prune(args)
    with Checkpoint(args.checkpoint) as source:
        model = model_of(source)
        choose, settings = _selection(args, source, model)
        if args.dry_run:
            return _prune_curve(args, model, choose, settings)
        keep = choose(settings[0])
        left = prune.point(model, keep, settings[0], None, 4, trained_length(args.checkpoint))
        what = {"job": "prune", "by": args.by, "setting": settings[0], "pruned_share": left.pruned_share}
        what["rule"] = "tau" if args.tau else "share" if args.share else "modules"
        with progress("writing") as advance:
            path = rearrange(
                source,
                args.out,
                {place: [Kept(i) for i in indices] for place, indices in keep.items()},
                what=what,
                on_tensor=advance,
            )
    count = sum(module_counts(model).values())
    print(
        f"{path}: {left.attention + left.mlp} of {count} modules, {left.parameters:,} parameters "
        f"({left.pruned_share:.1%} pruned)"
    )
    return 0


def _check_prune(args: argparse.Namespace) -> None:
    settings = args.tau or args.share or [0.0]
    for path in (args.json, args.picture):
        refuse_unwritable(path)
    if args.dry_run:
        if args.picture is not None:
            pictures.require_matplotlib()
            if args.data is None:
                raise UserError("--picture shows the loss: give --data")
        return
    if args.out is None:
        raise UserError("give OUT, a new folder for the pruned checkpoint, or --dry-run")
    if len(settings) > 1:
        raise UserError(f"{len(settings)} values make a curve, which needs --dry-run; give one to write a checkpoint")
    if args.json or args.picture:
        raise UserError("--json and --picture belong to --dry-run")
    if list_steps(args.out):
        raise UserError(f"{args.out} already holds checkpoints: name another folder")


def _selection(args: argparse.Namespace, source: Checkpoint, model):
    """(setting -> modules that stay, settings)."""
    if args.modules:
        gone = find_modules(source, args.modules)
        return (lambda _: prune.keep_without(model, gone)), [0.0]
    if args.by == "norm":
        scores = prune.norm_scores(source, model)
    elif args.by == "random":
        scores = prune.random_scores(model, args.seed)
    else:
        statistics = _statistics_of_use(args)
        statistics.check(module_counts(model))
        scores = statistics.relative_load()
    if args.tau:
        return (lambda tau: prune.keep_above(model, scores, tau)), args.tau
    return (lambda share: prune.keep_share(model, scores, share)), args.share


def _statistics_of_use(args: argparse.Namespace) -> Statistics:
    if args.statistics is not None:
        found = read_statistics(args.statistics)
        if len(found) != 1:
            raise UserError(f"{args.statistics} holds {len(found)} datasets: prune by one of them (--data)")
        return found[0]
    if args.data is None:
        raise UserError("pruning by use needs --data, or --statistics written by `megamf modules show --json`")
    model, seq_len = _load(args)
    return _collect(args, model, seq_len, args.data)


def _prune_curve(args: argparse.Namespace, config, choose, settings: list[float]) -> int:
    loss, seq_len = None, args.seq_len or trained_length(args.checkpoint)
    if args.data is not None:
        model, seq_len = _load(args)

        def loss(keep) -> float:
            small = prune.pruned_model(model, keep)
            with progress(f"loss on {Path(args.data).name}") as advance:
                result = measure(
                    small, args.data, seq_len=seq_len, batch=args.batch, max_batches=args.max_batches, on_batch=advance
                )
            return result.loss

    itemsize = DTYPES[args.dtype].itemsize
    points = prune.curve(config, settings, choose, loss, itemsize=itemsize, seq_len=seq_len)
    Console(soft_wrap=True).print(_curve_table(points, "tau" if args.tau else "share" if args.share else "modules"))
    write_json(args.json, {"by": args.by, "data": args.data, "points": [asdict(item) for item in points]})
    if args.picture is not None:
        pictures.pruning_curves({args.by: points}, args.picture)
    return 0


def _curve_table(points: list[prune.Point], setting: str) -> Table:
    table = Table()
    for column in (setting, "attention", "mlp", "parameters", "pruned", "memory", "FLOPs/token", "loss"):
        table.add_column(column, justify="right")
    for item in points:
        table.add_row(
            f"{item.setting:g}",
            str(item.attention),
            str(item.mlp),
            f"{item.parameters:,}",
            f"{item.pruned_share:.1%}",
            f"{item.bytes / 2**20:,.1f} MiB",
            f"{item.flops_per_token:,}",
            "" if item.loss is None else f"{item.loss:.4f}",
        )
    return table


ACTIONS |= {"show": _show, "prune": _prune}

if __name__ == "__main__":
    raise SystemExit(run(main))

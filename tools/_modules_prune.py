"""`megamf modules prune`: a checkpoint without the modules that are used least."""

import argparse
from dataclasses import asdict
from pathlib import Path

from rich.table import Table

from megamf.checkpoint import Checkpoint, list_steps
from megamf.errors import UserError
from megamf.evaluate.load import DTYPES, load_model
from megamf.evaluate.perplexity import measure
from megamf.evaluate.weights import trained_length
from megamf.modularity import pictures, prune
from megamf.modularity.edit import Kept, find_modules, model_of, module_counts, rearrange
from megamf.modularity.places import Place
from megamf.modularity.statistics import Statistics
from megamf.tools._models import add_model_options, device_of, progress, refuse_unwritable, write_json
from megamf.tools._modules_common import (
    BATCH,
    check_tokenizer,
    data_options,
    one_dataset,
    opened,
    refuse_without_data,
    watch,
    wide_console,
)


def options(parser: argparse.ArgumentParser) -> None:
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
    parser.add_argument(
        "--rescale",
        action="store_true",
        help="scale the outputs of the modules that stay by their share of the routers' probabilities, so that they do "
        "not grow as their gates do (needs --by use, whose statistics have the shares)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of --by random (0)")
    data_options(parser, required=False, nargs=None)
    parser.add_argument(
        "--dry-run", action="store_true", help="write nothing; show what every TAU or S leaves, with --data its loss"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the curve there")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="with --dry-run and --data: loss by share pruned")


def prune_job(args: argparse.Namespace) -> int:
    _check_prune(args)
    with Checkpoint(args.checkpoint) as source:
        model = model_of(source)
        if args.rescale and model.gate_type == "tanh":
            raise UserError(
                f"--rescale is for gates that are shares of a probability; {args.checkpoint} has gate_type=tanh, "
                "with gates of 1, which do not grow when modules go: leave it away"
            )
        choose, settings, statistics = _selection(args, source, model)

        def scales(keep: prune.Keep) -> dict[Place, float]:
            return prune.remaining_shares(statistics, keep) if args.rescale else {}

        if args.dry_run:
            return _prune_curve(args, model, choose, settings, scales)
        keep = choose(settings[0])
        scale = scales(keep)
        left = prune.point(model, keep, settings[0], None, 4, trained_length(args.checkpoint))
        what = {"job": "prune", "by": args.by, "setting": settings[0], "pruned_share": left.pruned_share}
        what["rule"] = "tau" if args.tau else "share" if args.share else "modules"
        what["rescaled"] = args.rescale
        with progress("writing") as advance:
            path = rearrange(
                source,
                args.out,
                {place: [Kept(i, scale.get(place, 1.0)) for i in indices] for place, indices in keep.items()},
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
    refuse_without_data(args)
    settings = args.tau or args.share or [0.0]
    if args.statistics is not None and (args.by != "use" or args.modules):
        raise UserError("--statistics say how often modules are used: they belong to --by use with --tau or --share")
    if args.rescale and (args.by != "use" or args.modules):
        raise UserError(
            "--rescale needs the routers' probabilities, which are measured for --by use with --tau or --share"
        )
    for path in (args.json, args.picture):
        refuse_unwritable(path)
    if args.dry_run:
        if args.picture is not None:
            pictures.require_matplotlib()
            if args.data is None:
                raise UserError("--picture shows the loss: give --data")
        if args.out is not None:
            raise UserError(f"--dry-run writes nothing: leave {args.out} away")
        return
    if args.data is not None and (args.by != "use" or args.modules or args.statistics):
        raise UserError("--data has no effect here: what goes is known without, and its loss is shown by --dry-run")
    if args.out is None:
        raise UserError("give OUT, a new folder for the pruned checkpoint, or --dry-run")
    if len(settings) > 1:
        raise UserError(f"{len(settings)} values make a curve, which needs --dry-run; give one to write a checkpoint")
    if args.json or args.picture:
        raise UserError("--json and --picture belong to --dry-run")
    if list_steps(args.out):
        raise UserError(f"{args.out} already holds checkpoints: name another folder")


def _selection(args: argparse.Namespace, source: Checkpoint, model):
    """(setting -> modules that stay, settings, statistics where use is measured)."""
    statistics = None
    if args.modules:
        gone = find_modules(source, args.modules)
        return (lambda _: prune.keep_without(model, gone)), [0.0], None
    if args.by == "norm":
        scores = prune.norm_scores(source, model)
    elif args.by == "random":
        scores = prune.random_scores(model, args.seed)
    else:
        statistics = _statistics_of_use(args, source)
        statistics.check(module_counts(model))
        scores = statistics.relative_load()
    if args.tau:
        return (lambda tau: prune.keep_above(model, scores, tau)), args.tau, statistics
    return (lambda share: prune.keep_share(model, scores, share)), args.share, statistics


def _statistics_of_use(args: argparse.Namespace, source: Checkpoint) -> Statistics:
    if args.statistics is not None:
        return one_dataset(args.statistics, source)
    if args.data is None:
        raise UserError("pruning by use needs --data, or --statistics written by `megamf modules show --json`")
    with opened(args) as (model, seq_len):
        return watch(args, model, seq_len, args.data)


def _prune_curve(args: argparse.Namespace, config, choose, settings: list[float], scales) -> int:
    loss, seq_len = None, args.seq_len or trained_length(args.checkpoint)
    if args.data is not None:
        check_tokenizer(args)
        model, _ = load_model(args.checkpoint, DTYPES[args.dtype], device_of(args))

        def loss(keep) -> float:
            small = prune.pruned_model(model, keep, scales(keep))
            with progress(f"loss on {Path(args.data).name}") as advance:
                result = measure(
                    small,
                    args.data,
                    seq_len=seq_len,
                    batch=args.batch or BATCH,
                    max_batches=args.max_batches,
                    on_batch=advance,
                )
            return result.loss

    itemsize = DTYPES[args.dtype].itemsize
    points = prune.curve(config, settings, choose, loss, itemsize=itemsize, seq_len=seq_len)
    wide_console().print(_curve_table(points, "tau" if args.tau else "share" if args.share else "modules"))
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

"""`megamf modules merge`: checkpoints averaged, task vectors added, or the duplicates inside one made one."""

import argparse
from contextlib import ExitStack
from pathlib import Path

from megamf.checkpoint import Checkpoint, list_steps
from megamf.errors import UserError
from megamf.modularity import merge
from megamf.modularity.edit import module_counts, rearrange
from megamf.modularity.places import top_k
from megamf.modularity.similarity import similarity
from megamf.tools._models import add_model_options, progress
from megamf.tools._modules_common import data_options, opened, refuse_without_data, watch


def options(parser: argparse.ArgumentParser) -> None:
    """Of the action."""
    add_model_options(parser)
    parser.add_argument("out", type=Path, metavar="OUT", help="a new folder of checkpoints")
    parser.add_argument("--with", dest="others", type=Path, nargs="+", metavar="CKPT", help="to average with")
    parser.add_argument("--weights", type=float, nargs="+", metavar="W", help="of CKPT and the others (all equal)")
    parser.add_argument(
        "--tasks",
        type=float,
        nargs="+",
        metavar="S",
        help="task arithmetic: CKPT plus S times what each of the others learnt beyond it (one S, or each its own)",
    )
    parser.add_argument(
        "--duplicates",
        type=float,
        metavar="COSINE",
        help="without --with: modules of a layer that are more alike than this on --data become one",
    )
    data_options(parser, required=False, nargs=None)


def run_merge(args: argparse.Namespace) -> int:
    """Write the checkpoint."""
    _check(args)
    return _combine(args) if args.others else _duplicates(args)


def _check(args: argparse.Namespace) -> None:
    if bool(args.others) == (args.duplicates is not None):
        raise UserError("give either --with CKPT ..., to average checkpoints, or --duplicates COSINE")
    if args.others and args.data:
        raise UserError("--data belongs to --duplicates")
    refuse_without_data(args, "seq_len")
    if args.duplicates is not None and not args.data:
        raise UserError("--duplicates compares modules on data: give --data")
    if args.duplicates is not None and not -1 < args.duplicates < 1:
        raise UserError(f"--duplicates {args.duplicates} is no cosine between -1 and 1")
    if not args.others and (args.weights or args.tasks):
        raise UserError("--weights and --tasks belong to --with")
    if args.weights and args.tasks:
        raise UserError("give either --weights or --tasks")
    if args.weights and len(args.weights) != 1 + len(args.others):
        raise UserError(f"--weights has {len(args.weights)} values for {1 + len(args.others)} checkpoints")
    if args.weights and not sum(args.weights) > 0:
        raise UserError(f"--weights add up to {sum(args.weights)}; their sum must be positive")
    if list_steps(args.out):
        raise UserError(f"{args.out} already holds checkpoints: name another folder")


def _combine(args: argparse.Namespace) -> int:
    if args.tasks:
        coefficients = merge.task_arithmetic(len(args.others), args.tasks)
        what = {"job": "merge", "rule": "task arithmetic", "scales": args.tasks}
    else:
        weights = args.weights or [1.0] * (1 + len(args.others))
        coefficients = [weight / sum(weights) for weight in weights]
        what = {"job": "merge", "rule": "average"}
    paths = (args.checkpoint, *args.others)
    with ExitStack() as stack:
        opened = [stack.enter_context(Checkpoint(path)) for path in paths]
        with progress("writing") as advance:
            path = merge.combine(opened, coefficients, args.out, what=what, on_tensor=advance)
    print(f"{path}: {' + '.join(f'{coefficient:g} x {place}' for coefficient, place in zip(coefficients, paths))}")
    return 0


def _duplicates(args: argparse.Namespace) -> int:
    with Checkpoint(args.checkpoint) as source, opened(args) as (model, seq_len):
        with progress("comparing modules") as advance:
            alike = similarity(model, args.data, seq_len=seq_len, on_place=advance)
        least = {place: top_k(model.config, place.kind) for place in alike}
        groups = merge.group_duplicates(alike, args.duplicates, least)
        if not groups:
            best = max((float(m.fill_diagonal_(-1).max()) for m in alike.values() if len(m) > 1), default=-1.0)
            raise UserError(f"no two modules are more alike than {args.duplicates:g}; the most alike have {best:.4f}")
        shares = watch(args, model, seq_len, args.data).frequencies()
        rows = merge.merged_rows(model, args.data, groups, seq_len=seq_len, tokens=4096)
        arrangement = merge.merge_duplicates(source, model, groups, rows, shares)
        what = {"job": "merge", "rule": "duplicates", "above": args.duplicates}
        with progress("writing") as advance:
            path = rearrange(source, args.out, arrangement, what=what, on_tensor=advance)
    gone = sum(len(group) - 1 for place_groups in groups.values() for group in place_groups)
    print(f"{path}: {gone} of {sum(module_counts(model.config).values())} modules were duplicates")
    return 0

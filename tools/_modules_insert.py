"""`megamf modules insert`: a checkpoint with new modules in every layer."""

import argparse
from contextlib import ExitStack
from pathlib import Path

import torch

from megamf.checkpoint import Checkpoint, list_steps
from megamf.config import ModelConfig
from megamf.errors import UserError
from megamf.modularity import insert
from megamf.modularity.edit import model_of, module_counts, rearrange
from megamf.modularity.places import Kind, Place
from megamf.tools._models import add_model_options, progress
from megamf.tools._modules_common import data_options, one_dataset, opened, refuse_without_data


def options(parser: argparse.ArgumentParser) -> None:
    """Of the action."""
    add_model_options(parser)
    parser.add_argument("out", type=Path, metavar="OUT", help="a new folder of checkpoints")
    parser.add_argument("--attention", type=int, default=0, metavar="N", help="new attention modules a layer (0)")
    parser.add_argument("--mlp", type=int, default=0, metavar="N", help="new MLP modules a layer (0)")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--copy", action="store_true", help="copies of the most used modules, not random ones")
    source.add_argument(
        "--transplant", type=Path, metavar="CKPT", help="the most used modules of a checkpoint of the same widths"
    )
    parser.add_argument(
        "--noise", type=float, metavar="X", help="on copied weights, in root mean squares of each tensor (0)"
    )
    parser.add_argument("--statistics", type=Path, metavar="JSON", help="which modules are most used (else the table)")
    parser.add_argument(
        "--rows",
        choices=("random", "copy", "quiet"),
        default="random",
        help="rows of the router: random; those of what is copied; quiet: new ones are not chosen on --data, so that "
        "the model's output stays as it is (random)",
    )
    parser.add_argument("--zero-output", action="store_true", help="new modules begin by adding nothing")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (0)")
    data_options(parser, required=False, nargs=None, windows=False)


def run_insert(args: argparse.Namespace) -> int:
    """Write the checkpoint."""
    _check(args)
    numbers: dict[Kind, int] = {"attention": args.attention, "mlp": args.mlp}
    with ExitStack() as stack:
        source = stack.enter_context(Checkpoint(args.checkpoint))
        model = model_of(source)
        donor = source if args.transplant is None else stack.enter_context(Checkpoint(args.transplant))
        donor_model = _donor_model(args, source, donor, model, numbers)
        chosen = _most_used(args, donor, donor_model)

        def template(place: Place, number: int) -> insert.Template:
            if chosen is None:
                return insert.random_template(model, place, number, args.seed)
            index = insert.most_used(chosen, place, numbers[place.kind])[number]
            return insert.copied_template(donor, donor_model, place, index, args.noise or 0.0, args.seed + number)

        quiet = {}
        if args.rows == "quiet":
            with opened(args) as (watched, seq_len):
                quiet = insert.quiet_rows(watched, args.data, seq_len=seq_len, new=numbers)

        def row(place: Place, number: int, made: insert.Template) -> torch.Tensor:
            if args.rows == "quiet":
                return quiet[place]
            if args.rows == "copy":
                return made.row()
            return insert.random_row(model, place, number, args.seed)

        arrangement = insert.arrangement(source, numbers, template, row, zero_output=args.zero_output)
        what = {"job": "insert", "rows": args.rows, "zero_output": args.zero_output, **numbers}
        with progress("writing") as advance:
            path = rearrange(source, args.out, arrangement, what=what, on_tensor=advance)
    added = (args.attention + args.mlp) * model.n_layer
    print(f"{path}: {added} new modules beside {sum(module_counts(model).values())}")
    return 0


def _check(args: argparse.Namespace) -> None:
    refuse_without_data(args, "seq_len")
    if min(args.attention, args.mlp) < 0 or args.attention + args.mlp == 0:
        raise UserError(f"--attention {args.attention} and --mlp {args.mlp}: nothing to insert")
    copied = args.copy or args.transplant is not None
    if args.noise is not None and (not copied or args.noise < 0):
        raise UserError(f"--noise {args.noise} belongs to --copy or --transplant and is not negative")
    if args.statistics is not None and not copied:
        raise UserError("--statistics say which modules to copy: give --copy or --transplant")
    if args.rows == "copy" and not args.copy:
        raise UserError("--rows copy takes the rows of this router's own modules: give --copy")
    if (args.rows == "quiet") != (args.data is not None):
        raise UserError("--rows quiet needs --data, on which new modules shall not be chosen, and only it does")
    if list_steps(args.out):
        raise UserError(f"{args.out} already holds checkpoints: name another folder")


def _donor_model(
    args: argparse.Namespace, source: Checkpoint, donor: Checkpoint, model: ModelConfig, numbers: dict[Kind, int]
) -> ModelConfig:
    """The donor's architecture. Raises UserError unless its modules fit."""
    donor_model = model_of(donor)
    for kind in (kind for kind, number in numbers.items() if number):
        insert.check_widths(model, donor_model, kind, donor.path)
    if donor_model.n_layer < model.n_layer:
        raise UserError(f"{donor.path} has {donor_model.n_layer} layers, {source.path} {model.n_layer}")
    return donor_model


def _most_used(args: argparse.Namespace, donor: Checkpoint, model: ModelConfig) -> dict[Place, list[float]] | None:
    """Frequencies of the donor's modules; None where modules are random."""
    if not args.copy and args.transplant is None:
        return None
    if args.statistics is None:
        return insert.table_frequencies(donor)
    statistics = one_dataset(args.statistics, donor)
    statistics.check(module_counts(model))
    return statistics.frequencies()

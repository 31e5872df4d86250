"""`megamf modules show`: use of every module on data."""

import argparse
from pathlib import Path

from rich.table import Table

from megamf.checkpoint import Checkpoint
from megamf.evaluate.weights import is_public_folder
from megamf.modularity import pictures
from megamf.modularity.similarity import closest_pairs, similarity
from megamf.modularity.statistics import Statistics, fingerprint, summary
from megamf.tools._models import add_model_options, progress, refuse_unwritable, write_json
from megamf.tools._modules_common import data_options, opened, watch, wide_console


def options(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser)
    data_options(parser, required=True, nargs="+")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all results; `prune --statistics` reads it")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="heat maps (PNG, PDF or SVG): layers x modules")
    parser.add_argument("--duplicates", type=float, metavar="COSINE", help="list pairs of modules that are more alike")


def show(args: argparse.Namespace) -> int:
    for path in (args.json, args.picture):
        refuse_unwritable(path)
    if args.picture is not None:
        pictures.require_matplotlib()
    with opened(args) as (model, seq_len):
        statistics = [watch(args, model, seq_len, prefix) for prefix in args.data]
        alike = {}
        if args.duplicates is not None:
            with progress("comparing modules") as advance:
                alike = similarity(model, args.data[0], seq_len=seq_len, on_place=advance)
    tree = {"checkpoint": str(args.checkpoint), "manifest": _fingerprint(args.checkpoint)}
    tree["statistics"] = [item.model_dump() for item in statistics]
    console = wide_console()
    for item in statistics:
        console.print(_use_table(item))
    if args.duplicates is not None:
        pairs = [
            {"layer": place.layer, "kind": place.kind, "first": i, "second": j, "cosine": cosine}
            for place, matrix in alike.items()
            for i, j, cosine in closest_pairs(matrix, args.duplicates)
        ]
        tree["duplicates"] = pairs
        console.print(_pairs_table(pairs, args.duplicates))
    write_json(args.json, tree)
    if args.picture is not None:
        pictures.heat_maps(statistics, args.picture)
    return 0


def _fingerprint(path: Path) -> str | None:
    if is_public_folder(path):
        return None
    with Checkpoint(path) as checkpoint:
        return fingerprint(checkpoint)


def _use_table(statistics: Statistics) -> Table:
    title = (
        f"{statistics.data}: {statistics.tokens:,} tokens. f: share of tokens that chose a module; < x %: share of "
        "modules below x % of the largest f; H and mutual information (MI) in nats"
    )
    table = Table(title=title, title_justify="left")
    columns = (
        "layer", "kind", "modules", "largest f", "smallest f", "< 0.3 %", "< 3 %", "< 30 %", "H(m)", "H(m|x)", "MI",
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

"""Show what a checkpoint holds, verify that it is whole, repack it, fold its adapters into its weights.

`megamf checkpoint show PATH`, `verify PATH`, `reshard PATH OUT` and `fold PATH OUT`, where PATH is a step directory,
the directory that holds such (its `latest` is taken), or a run directory.
"""

import argparse
import json
import os
import sys
from collections import Counter, defaultdict
from math import prod
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from megamf.adapt.fold import adapters_of, fold
from megamf.checkpoint import Checkpoint, DamagedCheckpoint, Problem, list_steps, reshard, resolve, verify
from megamf.checkpoint.layout import DTYPE_OF_NAME, LATEST, SHARD_SUFFIX, WEIGHTS, split_name, step_path
from megamf.checkpoint.verify import read_manifest
from megamf.cli import run
from megamf.errors import UserError
from megamf.tools._models import progress


def main(argv: list[str] | None = None) -> int:
    """Entry of the job. Exit codes: 0 done and good; 1 damaged (verify); 2 wrong usage."""
    options = _parser().parse_args(argv)
    return {"show": _show, "verify": _verify, "reshard": _reshard, "fold": _fold}[options.action](options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="megamf checkpoint", description=__doc__.splitlines()[0])
    actions = parser.add_subparsers(dest="action", required=True)
    show = actions.add_parser("show", help="step, progress, model, files, bytes, modules")
    show.add_argument("path", type=Path, help="step directory, checkpoints directory or run directory")
    show.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    show.add_argument("--tensors", action="store_true", help="also list every tensor of the logical model")
    check = actions.add_parser("verify", help="read every byte and compare with the checksums; exit code 1: damaged")
    check.add_argument("path", type=Path, help="step directory, checkpoints directory or run directory")
    check.add_argument("--all", action="store_true", help="every checkpoint beside it too, not only this one")
    check.add_argument("--threads", type=int, default=min(8, os.cpu_count() or 1), help="files read at one time")
    repack = actions.add_parser(
        "reshard",
        help="the same step in other files; resuming with other ranks needs no such thing",
        description="Any number of ranks, EP degree and ZeRO stage reads any checkpoint. This repacks one for moving "
        "and publishing: files of another size, or weights alone. Every byte is checked on the way.",
    )
    repack.add_argument("path", type=Path, help="step directory, checkpoints directory or run directory")
    repack.add_argument("out", type=Path, help="a new folder of checkpoints")
    repack.add_argument("--file-mib", type=int, default=2048, metavar="N", help="size of a file at most, in MiB (2048)")
    repack.add_argument("--weights-only", action="store_true", help="without masters and optimizer moments")
    fold_ = actions.add_parser(
        "fold",
        help="a plain checkpoint of one with LoRA adapters",
        description="Write the weights with the adapters of a run with tune.strategy=lora added into them: a "
        "checkpoint like any other, of the same model. It holds no optimizer state.",
    )
    fold_.add_argument("path", type=Path, help="step directory, checkpoints directory or run directory")
    fold_.add_argument("out", type=Path, help="a new folder of checkpoints")
    return parser


def summary(checkpoint: Checkpoint, tensors: bool = False) -> dict[str, Any]:
    """What a checkpoint holds, as plain JSON; with `tensors` also the logical tensors of every group."""
    manifest = checkpoint.manifest
    group_bytes: Counter[str] = Counter()
    group_dtypes: dict[str, set[str]] = defaultdict(set)
    for full, entry in manifest.tensors.items():
        group = split_name(full)[0]
        group_bytes[group] += prod(entry.shape) * DTYPE_OF_NAME[entry.dtype].itemsize
        group_dtypes[group].add(entry.dtype)
    layers: dict[tuple[int, str], Counter[str]] = defaultdict(Counter)
    for module in checkpoint.modules:
        layers[module.layer, module.kind][module.provenance] += 1
    out = {
        "path": str(checkpoint.path),
        "step": checkpoint.step,
        "run_id": manifest.run_id,
        "megamf": manifest.megamf,
        "state": checkpoint.state,
        "model": checkpoint.model,
        "parameters": sum(prod(shape) for shape in checkpoint.logical_shapes().values()),
        "files": len(manifest.files),
        "bytes": manifest.total_bytes,
        "groups": {
            group: {
                "tensors": len(checkpoint.logical_shapes(group)),
                "dtypes": sorted(group_dtypes[group]),
                "bytes": group_bytes[group],
            }
            for group in checkpoint.groups
        },
        "modules": [
            {"layer": layer, "kind": kind, "count": provenance.total(), "provenance": dict(provenance)}
            for (layer, kind), provenance in sorted(layers.items())
        ],
    }
    if tensors:
        out["tensors"] = {
            group: {key: list(shape) for key, shape in checkpoint.logical_shapes(group).items()}
            for group in checkpoint.groups
        }
    return out


def _show(options: argparse.Namespace) -> int:
    with Checkpoint(options.path) as checkpoint:
        facts = summary(checkpoint, options.tensors)
    if options.json:
        print(json.dumps(facts, indent=2))
        return 0
    console = Console(markup=False, highlight=False)
    console.print(_facts_table(facts))
    groups = Table("group", "dtypes", title="Tensors", title_justify="left")
    groups.add_column("tensors", justify="right")
    groups.add_column("bytes", justify="right")
    for name, group in facts["groups"].items():
        groups.add_row(name, ", ".join(group["dtypes"]), f"{group['tensors']:,}", decimal(group["bytes"]))
    console.print(groups)
    if facts["modules"]:
        console.print(_modules_table(facts["modules"]))
    for group, shapes in facts.get("tensors", {}).items():
        listing = Table("key", "shape", title=group, title_justify="left")
        for key, shape in shapes.items():
            listing.add_row(key, " x ".join(map(str, shape)))
        console.print(listing)
    return 0


def _facts_table(facts: dict[str, Any]) -> Table:
    """Step, run, sizes, the simple values of the state, and the model's settings."""
    table = Table("what", "value", title=facts["path"], title_justify="left", show_header=False)
    table.add_row("step", f"{facts['step']:,}")
    table.add_row("run", facts["run_id"])
    table.add_row("written by", f"megamf {facts['megamf']}")
    table.add_row("parameters", f"{facts['parameters']:,}")
    table.add_row("files", f"{facts['files']:,} with {decimal(facts['bytes'])}")
    table.add_section()
    for name, value in facts["state"].items():
        if name != "step" and isinstance(value, int | float | str) and len(str(value)) <= 60:
            table.add_row(name.replace("_", " "), f"{value:,}" if type(value) is int else str(value))
    table.add_section()
    model = facts["model"]
    table.add_row("model", "\n".join(f"{name} = {value}" for name, value in model.items()) or "(nothing recorded)")
    return table


def _modules_table(rows: list[dict[str, Any]]) -> Table:
    """Modules by kind and provenance; neighbouring layers with the same numbers share a line."""
    table = Table("layers", "kind", title="Modules", title_justify="left")
    table.add_column("modules", justify="right")
    table.add_column("provenance")
    for kind in sorted({row["kind"] for row in rows}):
        spans: list[tuple[int, int, dict[str, int]]] = []
        for row in (row for row in rows if row["kind"] == kind):
            if spans and spans[-1][1] == row["layer"] - 1 and spans[-1][2] == row["provenance"]:
                spans[-1] = (spans[-1][0], row["layer"], row["provenance"])
            else:
                spans.append((row["layer"], row["layer"], row["provenance"]))
        for first, last, provenance in spans:
            layers = f"{first}" if first == last else f"{first}-{last}"
            total = f"{sum(provenance.values())}" + ("" if first == last else " each")
            table.add_row(layers, kind, total, ", ".join(f"{count} {name}" for name, count in provenance.items()))
    return table


def _verify(options: argparse.Namespace) -> int:
    if options.threads < 1:
        raise UserError(f"--threads={options.threads} must be at least 1")
    damaged = False
    try:
        path = resolve(options.path)
    except DamagedCheckpoint as error:
        # With --all the steps can be judged although `latest` is wrong.
        print(f"{LATEST}: damaged\n  {error}")
        if not options.all:
            return 1
        damaged, path = True, step_path(error.path, 0)
    root = path.absolute().parent
    paths = [step_path(root, step) for step in list_steps(root)] if options.all else [path]
    for path in paths:
        problems = _verify_one(path, options.threads)
        damaged |= bool(problems)
        print(f"{path}: {'damaged' if problems else 'good'}")
        for problem in problems:
            print(f"  {problem.file}: {problem.what}")
    return 1 if damaged else 0


def _reshard(options: argparse.Namespace) -> int:
    groups = (WEIGHTS,) if options.weights_only else None
    with Checkpoint(options.path) as source, progress("writing") as advance:
        path = reshard(source, options.out, groups=groups, max_file_bytes=options.file_mib << 20, on_tensor=advance)
    with Checkpoint(path) as copy:
        files = sum(name.endswith(SHARD_SUFFIX) for name in copy.manifest.files)
        print(f"{path}: {files} tensor files, {decimal(copy.manifest.total_bytes)}")
    return 0


def _fold(options: argparse.Namespace) -> int:
    with Checkpoint(options.path) as source, progress("writing") as advance:
        adapters = adapters_of(source)
        path = fold(source, options.out, on_tensor=advance)
    print(f"{path}: {len(adapters.shapes) // 2} adapters of rank {adapters.tune.lora_rank} folded in")
    return 0


def _verify_one(path: Path, threads: int) -> list[Problem]:
    """`verify` with a progress bar on stderr."""
    try:
        total = read_manifest(path).total_bytes
    except DamagedCheckpoint as error:
        return [Problem(error.file, error.what)]
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(file=sys.stderr)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(path.name, total=total)
        return verify(path, threads=threads, progress=lambda count: bar.advance(task, count))


if __name__ == "__main__":
    raise SystemExit(run(main))

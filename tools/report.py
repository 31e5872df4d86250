"""Summarises a run: losses, speed, module load, and whether a resume and an export kept what they should."""

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from megamf.checkpoint.layout import step_of
from megamf.cli import run
from megamf.errors import UserError


def main(argv: list[str] | None = None) -> int:
    """Print the report; exit code 1 when a comparison that was asked for fails."""
    args = _parser().parse_args(argv)
    if (args.hf is None) != (args.checkpoint is None):
        raise UserError("--hf and --checkpoint go together: the exported folder and the checkpoint it came from")
    records = read_metrics(args.run)
    summary = summarise(records)
    if args.evaluation:
        found = json.loads(args.evaluation.read_text(encoding="utf-8"))
        summary |= {"valid_loss": found["loss"], "bits_per_byte": found["bits_per_byte"]}
    if args.seconds is not None:
        summary["seconds"] = args.seconds
    if args.same_as:
        summary |= compare_runs(args.run, records, read_metrics(args.same_as))
    if args.hf:
        summary |= {"hf_dir": str(args.hf), "hf_max_abs_diff": hf_difference(args.checkpoint, args.hf)}
    if args.sample:
        summary["sample"] = args.sample.read_text(encoding="utf-8")
    if args.summary:
        args.summary.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    if args.plot:
        draw(records, args.plot)
    _show(summary, records)
    return 0 if summary.get("resume_exact", True) and summary.get("hf_max_abs_diff", 0.0) <= args.tolerance else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="megamf report", description=__doc__)
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument(
        "--same-as", type=Path, metavar="RUN", help="a run whose losses must be the same ones, step by step"
    )
    parser.add_argument("--evaluation", type=Path, metavar="JSON", help="output of `megamf evaluate --json`")
    parser.add_argument("--hf", type=Path, metavar="DIR", help="exported folder to load through transformers")
    parser.add_argument("--checkpoint", type=Path, help="the checkpoint that --hf was exported from")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="largest difference of logits accepted (1e-4)")
    parser.add_argument("--sample", type=Path, metavar="TEXT", help="generated text to include")
    parser.add_argument("--seconds", type=float, help="wall time to include")
    parser.add_argument("--summary", type=Path, metavar="JSON", help="write the summary here")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw losses and module load (needs matplotlib)")
    return parser


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The records of `metrics.jsonl`, one a step, ascending, with an evaluation's fields in the record of its step.

    Of a step that was run again the later record counts. Raises UserError where the file is missing, empty or
    damaged (an unfinished last line is passed over).
    """
    file = folder / "metrics.jsonl"
    if not file.is_file():
        raise UserError(f"{folder} is no run directory: it has no metrics.jsonl")
    by_step: dict[int, dict[str, Any]] = {}
    lines = file.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            step = int(record["step"])
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                break
            raise UserError(f"{file}, line {number} is no record of a step ({error}): {line[:80]!r}") from None
        by_step[step] = by_step.get(step, {}) | record
    records = [by_step[step] for step in sorted(by_step) if "loss" in by_step[step]]
    if not records:
        raise UserError(f"{file} holds no record of a training step yet")
    return records


def summarise(records: list[dict[str, Any]]) -> dict[str, Any]:
    """First and last loss, steps, tokens, and the median speed."""
    speeds = [record["tokens_per_second"] for record in records if record.get("tokens_per_second")]
    rates = [record["mfu"] for record in records if record.get("mfu")]
    return {
        "first_loss": records[0]["loss"],
        "final_loss": records[-1]["loss"],
        "steps": records[-1]["step"],
        "tokens": records[-1].get("tokens"),
        "tokens_per_second": statistics.median(speeds) if speeds else None,
        "mfu": statistics.median(rates) if rates else None,
    } | {key: value for key, value in records[-1].items() if key in ("valid_loss", "valid_bits_per_byte")}


def compare_runs(folder: Path, records: list[dict[str, Any]], others: list[dict[str, Any]]) -> dict[str, Any]:
    """Whether both runs have the same losses at every step they share, beyond the resumed one's first checkpoint."""
    losses = {record["step"]: record["loss"] for record in records}
    shared = [(losses[other["step"]], other["loss"], other["step"]) for other in others if other["step"] in losses]
    steps = [step for path in (folder / "checkpoints").glob("step-*") if (step := step_of(path.name)) is not None]
    if not steps:
        raise UserError(f"{folder} has no checkpoint, so it was never resumed")
    resumed, last = min(steps), max((step for *_, step in shared), default=0)
    if last <= resumed:
        raise UserError(f"the runs share steps up to {last} only, but the resume came after step {resumed}")
    return {
        "resume_exact": all(one == two or (math.isnan(one) and math.isnan(two)) for one, two, _ in shared),
        "resumed_after_step": resumed,
        "compared_steps": len(shared),
        "largest_loss_difference": max(abs(one - two) for one, two, _ in shared),
    }


@torch.no_grad()
def hf_difference(checkpoint: Path, folder: Path) -> float:
    """Largest difference of float32 logits between our model and `AutoModelForCausalLM` on 2 x 64 random tokens.

    The folder is loaded both ways: with the self-contained modelling file it carries, which shares no code with ours,
    and with `megamf.hf`, which wraps our own modules and therefore proves the weights rather than the arithmetic.
    """
    from transformers import AutoModelForCausalLM

    from megamf.evaluate.load import load_model

    ours, config = load_model(checkpoint)
    # Before megamf.hf registers the type, the folder's own file is what transformers finds.
    portable = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True).eval()

    import megamf.hf  # noqa: F401

    registered = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert type(portable) is not type(registered), "the folder's own modelling file was not used"
    token_BT = torch.randint(config.vocab_size, (2, 64), generator=torch.Generator().manual_seed(0))
    logits_BTV = ours.logits(ours(token_BT).hidden_BTD)
    return max((logits_BTV - model(token_BT).logits).abs().max().item() for model in (portable, registered))


def draw(records: list[dict[str, Any]], file: Path) -> None:
    """Loss curve, and for both expert kinds a map of the newest module load (layer by module)."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("--plot needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    loads = next((record["module_load"] for record in reversed(records) if record.get("module_load")), [])
    kinds = sorted({row["kind"] for row in loads})
    figure, axes = pyplot.subplots(1, 1 + len(kinds), figsize=(5 * (1 + len(kinds)), 4), squeeze=False)
    loss_axis = axes[0][0]
    loss_axis.plot([record["step"] for record in records], [record["loss"] for record in records], label="training")
    evaluated = [(record["step"], record["valid_loss"]) for record in records if "valid_loss" in record]
    if evaluated:
        loss_axis.plot(*zip(*evaluated, strict=True), "o", label="validation")
    loss_axis.set(title="loss", xlabel="step", ylabel="nats per token")
    loss_axis.legend()
    for axis, kind in zip(axes[0][1:], kinds, strict=True):
        rows = [row["load"] for row in sorted(loads, key=lambda row: row["layer"]) if row["kind"] == kind]
        image = axis.imshow(rows, aspect="auto", vmin=0)
        axis.locator_params(integer=True)
        axis.set(title=f"{kind}: share of choices", xlabel="module", ylabel="layer")
        figure.colorbar(image, ax=axis)
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def _show(summary: dict[str, Any], records: list[dict[str, Any]]) -> None:
    console = Console()
    table = Table(title="summary", show_header=False)
    for key, value in summary.items():
        if key != "sample":
            table.add_row(key, f"{value:.6g}" if isinstance(value, float) else str(value))
    console.print(table)
    loads = next((record["module_load"] for record in reversed(records) if record.get("module_load")), [])
    if loads:
        table = Table(title="module load at the last record")
        for name in ("layer", "kind", "entropy", "max / mean", "dead"):
            table.add_column(name, justify="right")
        for row in loads:
            figures = (f"{row['entropy']:.3f}", f"{row['max_over_mean']:.2f}", f"{row['dead_fraction']:.0%}")
            table.add_row(str(row["layer"]), row["kind"], *figures)
        console.print(table)
    if "sample" in summary:
        console.rule("sample")
        console.print(summary["sample"], markup=False, highlight=False)


if __name__ == "__main__":
    raise SystemExit(run(main))

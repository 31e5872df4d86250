"""docs/experiments/adamix.md: mixtures of adaptations against full fine-tuning, one adapter and LoRA, on two tasks.

    python -m megamf.experiments.adamix --work DIR [--page docs/experiments/adamix.md] [--minutes 25] [--seeds 3]

Classification with an encoder (MiniLM): which of eight parts of the kernel's documentation a paragraph is from.
Generation with a decoder (SmolLM2-135M): the first line of a Python function's docstring, from its code. Every run is
a `megamf adamix` command and is run once; the page is written from what they left in DIR. `--minutes` is a budget for
two idle cores: training examples and epochs follow from it, and 1 is a trial of the machinery.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

from megamf.cli import run
from megamf.experiments import _adamix_data as data
from megamf.experiments import _adamix_page as page
from megamf.experiments.corpora import build
from megamf.experiments.stages import Study
from megamf.experiments.weights import fetch

USUAL_MINUTES = 25


@dataclass(frozen=True)
class Method:
    """One line of a table: its name, and the options that make it."""

    name: str
    title: str
    options: str
    lr: str


# Ranks make the single modules of a task equal in size to a few percent. Learning rates are usual ones, not searched.
CLASSIFICATION = (
    Method("full", "full fine-tuning", "--method full", "1e-4"),
    Method("adapter", "single adapter", "--method adapter --rank 16 --modules 1", "1e-3"),
    Method("lora", "LoRA", "--rank 8 --modules 1", "1e-3"),
    Method("adamix-adapter", "AdaMix, adapters", "--method adapter --rank 16", "1e-3"),
    Method("adamix", "AdaMix, LoRA", "--rank 8", "1e-3"),
    Method("no-consistency", "AdaMix, LoRA, without consistency", "--rank 8 --consistency 0", "1e-3"),
    Method("no-sharing", "AdaMix, LoRA, without sharing", "--rank 8 --share none", "1e-3"),
)
GENERATION = (
    Method("full", "full fine-tuning", "--method full", "5e-5"),
    Method("adapter", "single adapter", "--method adapter --rank 13 --modules 1", "1e-3"),
    Method("lora", "LoRA", "--rank 8 --modules 1", "1e-3"),
    Method("adamix", "AdaMix, LoRA", "--rank 8", "1e-3"),
    Method("no-consistency", "AdaMix, LoRA, without consistency", "--rank 8 --consistency 0", "1e-3"),
    Method("no-sharing", "AdaMix, LoRA, without sharing", "--rank 8 --share none", "1e-3"),
)


@dataclass(frozen=True)
class Sizes:
    """Examples and epochs of a budget."""

    section_rows: int
    section_valid: int
    section_epochs: int
    summary_rows: int
    summary_valid: int
    generated: int

    @classmethod
    def of(cls, minutes: float) -> "Sizes":
        """Sizes for a budget in minutes of two idle cores; 25 is the usual one."""
        share = minutes / USUAL_MINUTES
        small = min(1.0, share)
        return cls(
            section_rows=max(2, round(32 * min(share, 4))),
            section_valid=max(2, round(30 * small)),
            section_epochs=5,
            summary_rows=max(8, round(160 * share)),
            summary_valid=max(4, round(64 * small)),
            generated=max(2, round(32 * small)),
        )


def commands(sizes: Sizes, seeds: int) -> dict[str, str]:
    """Name of the stage -> command, for all runs."""
    made = {}
    for seed in range(seeds):
        for method in CLASSIFICATION:
            made[f"sections-{method.name}-{seed}"] = (
                f"megamf adamix weights/minilm sections-{method.name}-{seed} --task classification "
                "--train sections-train.jsonl --valid sections-valid.jsonl --modes merged,random --max-length 64 "
                f"--epochs {sizes.section_epochs} --lr {method.lr} {method.options} --seed {seed}"
            )
        for method in GENERATION:
            made[f"summaries-{method.name}-{seed}"] = (
                f"megamf adamix weights/smollm2-135m summaries-{method.name}-{seed} --task generation "
                "--train summaries-train.jsonl --valid summaries-valid.jsonl --modes merged,random --max-length 112 "
                f"--batch-size 8 --epochs 1 --lr {method.lr} {method.options} --generate {sizes.generated} "
                f"--max-new-tokens 20 --seed {seed}"
            )
    return made


def main(argv: list[str] | None = None) -> int:
    """Run what has not been run, and write the page."""
    parser = argparse.ArgumentParser(
        prog="python -m megamf.experiments.adamix", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="where everything is kept")
    parser.add_argument("--page", type=Path, default=Path("docs/experiments/adamix.md"), help="(%(default)s)")
    parser.add_argument("--minutes", type=float, default=USUAL_MINUTES, help="budget, on two idle cores (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each method (%(default)s)")
    parser.add_argument("--at-once", type=int, default=2, help="commands at one time, a core each (%(default)s)")
    args = parser.parse_args(argv)
    study, sizes = Study(args.work), Sizes.of(args.minutes)
    study.compute("weights", lambda names: [path.name for path in fetch(study.path("weights"), tuple(names))],
                  names=["minilm", "smollm2-135m"])  # fmt: skip
    study.compute("corpora", lambda names: build(study.path("corpora"), tuple(names)), names=["english", "python"])
    for name, write, rows, valid in (
        ("sections", data.write_sections, sizes.section_rows, sizes.section_valid),
        ("summaries", data.write_summaries, sizes.summary_rows, sizes.summary_valid),
    ):
        corpus = study.path("corpora") / ("english-train.jsonl" if name == "sections" else "python-train.jsonl")
        made = lambda train, valid, write=write, corpus=corpus: write(corpus, study.folder, train, valid)  # noqa: E731
        study.compute(name, made, train=rows, valid=valid)
    runs = commands(sizes, args.seeds)
    study.commands(runs, at_once=args.at_once)
    page.write(study, args.page, CLASSIFICATION, GENERATION, runs, args.seeds)
    print(args.page)
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))

"""docs/experiments/adamix.md: mixtures of adaptations against full fine-tuning, one adapter and LoRA, on two tasks.

    python -m megamf.experiments.adamix --work DIR [--page docs/experiments/adamix.md] [--minutes 25] [--seeds 3]

Classification with an encoder (MiniLM): which of eight parts of the kernel's documentation a paragraph is from.
Generation with a decoder (SmolLM2-135M): the first line of a Python function's docstring, from its code. Every run is
a `megamf adamix` command and is run once; the page is written from what they left in DIR. Learning rates are searched
first, for single modules. `--minutes` is a budget for two idle cores, the search apart (half as long again): training
examples follow from it, and 1 is a trial of the machinery.
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
    """One line of a table: its name, the options that make it, and whose learning rate it takes."""

    name: str
    title: str
    options: str
    family: str


@dataclass(frozen=True)
class Task:
    """One of the two tasks: what every command on it has, its methods, and learning rates to choose from.

    A family's rate is the one with the lowest validation loss of its single module, with a seed that is not reported.
    """

    name: str
    folder: str
    options: str
    methods: tuple[Method, ...]
    rates: dict[str, tuple[str, ...]]


# Ranks make the single modules of a task equal in size to a few percent.
MIXTURES = (
    Method("adamix", "AdaMix, LoRA", "--rank 8", "lora"),
    Method("no-consistency", "AdaMix, LoRA, without consistency", "--rank 8 --consistency 0", "lora"),
    Method("no-sharing", "AdaMix, LoRA, without sharing", "--rank 8 --share none", "lora"),
)
SECTIONS = Task(
    "sections",
    "weights/minilm",
    "--task classification --max-length 64",
    (
        Method("full", "full fine-tuning", "--method full", "full"),
        Method("adapter", "single adapter", "--method adapter --rank 16 --modules 1", "adapter"),
        Method("lora", "LoRA", "--rank 8 --modules 1", "lora"),
        Method("adamix-adapter", "AdaMix, adapters", "--method adapter --rank 16", "adapter"),
        *MIXTURES,
    ),
    {"full": ("1e-4", "3e-4", "1e-3"), "adapter": ("1e-3", "3e-3", "1e-2"), "lora": ("1e-3", "3e-3", "1e-2")},
)
SUMMARIES = Task(
    "summaries",
    "weights/smollm2-135m",
    "--task generation --max-length 112 --batch-size 8 --epochs 1",
    (
        Method("full", "full fine-tuning", "--method full", "full"),
        Method("adapter", "single adapter", "--method adapter --rank 13 --modules 1", "adapter"),
        Method("lora", "LoRA", "--rank 8 --modules 1", "lora"),
        *MIXTURES,
    ),
    {"full": ("2e-5", "5e-5", "2e-4"), "adapter": ("1e-3", "3e-3", "1e-2"), "lora": ("5e-4", "1e-3", "3e-3")},
)
TASKS = (SECTIONS, SUMMARIES)
SEARCH_SEED = 100


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


def command(task: Task, sizes: Sizes, out: str, options: str, lr: str, seed: int, modes: str) -> str:
    """One training run, as a user would type it."""
    epochs = f" --epochs {sizes.section_epochs}" if task is SECTIONS else ""
    return (
        f"megamf adamix {task.folder} {out} {task.options}{epochs} --train {task.name}-train.jsonl "
        f"--valid {task.name}-valid.jsonl --modes {modes} --lr {lr} {options} --seed {seed}"
    )


def searches(sizes: Sizes) -> dict[str, str]:
    """Name of the stage -> command, for every family's single module with every rate."""
    made = {}
    for task in TASKS:
        singles = {method.family: method.options for method in task.methods[:3]}
        for family, rates in task.rates.items():
            for lr in rates:
                name = f"{task.name}-search-{family}-{lr}"
                made[name] = command(task, sizes, name, singles[family], lr, SEARCH_SEED, "merged")
    return made


def best_rates(losses: dict[str, float]) -> dict[tuple[str, str], str]:
    """(task, family) -> the rate with the lowest loss. losses: of every stage of `searches`."""
    return {
        (task.name, family): min(rates, key=lambda lr: losses[f"{task.name}-search-{family}-{lr}"])
        for task in TASKS for family, rates in task.rates.items()
    }  # fmt: skip


def commands(sizes: Sizes, seeds: int, rates: dict[tuple[str, str], str]) -> dict[str, str]:
    """Name of the stage -> command, for all runs that are reported."""
    made = {}
    for seed in range(seeds):
        for task in TASKS:
            generate = f" --generate {sizes.generated} --max-new-tokens 20" if task is SUMMARIES else ""
            for method in task.methods:
                name, lr = f"{task.name}-{method.name}-{seed}", rates[task.name, method.family]
                made[name] = command(task, sizes, name, method.options + generate, lr, seed, "merged,random")
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
    search = searches(sizes)
    study.commands(search, at_once=args.at_once)
    losses = {name: study.json(f"{name}/adamix.json")["scores"]["merged"]["loss"] for name in search}
    rates = best_rates(losses)
    runs = commands(sizes, args.seeds, rates)
    study.commands(runs, at_once=args.at_once)
    page.write(study, args.page, SECTIONS, SUMMARIES, runs, args.seeds, rates, losses)
    print(args.page)
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))

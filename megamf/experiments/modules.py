"""docs/experiments/modules.md: modules of a model trained on Python and English, specialised, pruned and added to.

    python -m megamf.experiments.modules --work DIR [--page docs/experiments/modules.md] [--at-once 2]

Corpora, a ModuleFormer and a dense baseline trained on equal tokens, then fine-tuning with and without load
concentration, pruning curves, and a new language by full tuning, LoRA and inserted modules. Every stage is a `megamf`
command and is run once; the page is written from what they left in DIR. About an hour and a half on two cores.
"""

import argparse
from pathlib import Path

from megamf.cli import run
from megamf.experiments import _modules_page as page
from megamf.experiments.corpora import build
from megamf.experiments.stages import Study

DOMAINS = ("python", "english", "french")
SHARES = "0 0.05 0.1 0.15 0.2 0.3 0.4 0.5 0.6 0.7"
RANDOM_SEEDS = (0, 1, 2)
PENALTIES = {"inserted": ("0", "0.01", "0.1"), "router_rows": ("0", "0.001", "0.01", "0.1")}
PRUNED_SHARE = "0.3"
TUNED_ON = ("ft-none", "ft-con-0.1")

FINE_TUNED = {
    "ft-none": "losses.balance=none",
    "ft-mi": "losses.balance=mi",
    "ft-con-0.001": "losses.balance=none losses.concentration=0.001",
    "ft-con-0.1": "losses.balance=none losses.concentration=0.1",
}


def data(study: Study) -> None:
    """Corpora, one tokenizer of the old domains, and indexed datasets."""
    study.compute("corpora", lambda names: build(study.path("corpora"), tuple(names)), names=list(DOMAINS))
    study.command(
        "tokenizer",
        "megamf tokenizer --input corpora/python-train.jsonl corpora/english-train.jsonl --vocab-size 4096 "
        "--max-megabytes 12 --output tokenizer.model",
    )
    for name in DOMAINS:
        for split in ("train", "valid"):
            study.command(
                f"prepare-{name}-{split}",
                f"megamf prepare --input corpora/{name}-{split}.jsonl --tokenizer tokenizer.model "
                f"--output data/{name}-{split}",
            )


def _sources(key: str, *names: str) -> str:
    listed = ", ".join(f"{{path: data/{name}}}" for name in names)
    return f'"data.{key}=[{listed}]"'


def base(study: Study) -> None:
    """The two models on Python and English."""
    common = (
        f"data.tokenizer=tokenizer.model {_sources('train', 'python-train', 'english-train')} "
        f"{_sources('valid', 'python-valid', 'english-valid')} "
        "train.global_batch=16 train.micro_batch=8 train.steps=1600 train.eval_every=400 train.eval_batches=16 "
        "optim.warmup_steps=100 checkpoint.every=400"
    )
    study.command(
        "base",
        "torchrun --standalone --nproc-per-node 2 -m megamf.train --preset nano run.dir=base model.n_att_experts=8 "
        f"model.n_mlp_experts=16 parallel.ep=2 {common}",
        threads=1,
    )
    study.command(
        "dense",
        f"torchrun --standalone --nproc-per-node 2 -m megamf.train --preset nano-dense run.dir=dense {common}",
        threads=1,
    )
    study.command(
        "show-base",
        "megamf modules show base --data data/python-valid data/english-valid --max-batches 24 --json show-base.json "
        "--picture use-base.png",
    )


def _tune(model: str, preset: str, name: str, train: str, settings: str, steps: int) -> str:
    """A run from the weights of `model`; evaluated on all three domains while it runs."""
    valid = _sources("valid", *(f"{domain}-valid" for domain in DOMAINS))
    return (
        f"megamf train --preset {preset} --model-from {model} run.dir={name} checkpoint.init_from={model} "
        f"data.tokenizer=tokenizer.model {train} {valid} train.steps={steps} train.global_batch=8 train.micro_batch=8 "
        f"train.eval_every={steps // 2} train.eval_batches=8 optim.lr=1e-3 optim.min_lr=1e-4 optim.warmup_steps=20 "
        f"checkpoint.every=0 {settings}"
    )


def specialisation(study: Study, at_once: int) -> None:
    """Fine-tuning on Python, with and without load concentration, and what the modules do afterwards."""
    train = _sources("train", "python-train")
    study.commands(
        {name: _tune("base", "nano", name, train, settings, 300) for name, settings in FINE_TUNED.items()},
        at_once=at_once,
    )
    study.commands(
        {
            f"show-{name}": f"megamf modules show {name} --data data/python-train --max-batches 24 "
            f"--json show-{name}.json --picture use-{name}.png"
            for name in FINE_TUNED
        },
        at_once=at_once,
    )


def pruning(study: Study, at_once: int) -> None:
    """Curves of the methods, and a pruned model tuned on."""
    ways = {"use": "--by use", "rescaled": "--by use --rescale", "norm": "--by norm"} | {
        f"random{seed}": f"--by random --seed {seed}" for seed in RANDOM_SEEDS
    }
    stages = {}
    for name in FINE_TUNED:
        for way, options in ways.items():
            statistics = f"--statistics show-{name}.json " if way in ("use", "rescaled") else ""
            stages[f"prune-{name}-{way}"] = (
                f"megamf modules prune {name} --dry-run --share {SHARES} {options} {statistics}"
                f"--data data/python-valid --max-batches 8 --json prune-{name}-{way}.json"
            )
    study.commands(stages, at_once=at_once)
    tuned = {}
    for name in TUNED_ON:
        small = f"pruned-{name}"
        study.command(
            small, f"megamf modules prune {name} {small} --share {PRUNED_SHARE} --statistics show-{name}.json"
        )
        tuned[f"{small}-tuned"] = _tune(
            small, "nano", f"{small}-tuned", _sources("train", "python-train"), FINE_TUNED[name], 100
        )
    study.commands(tuned, at_once=at_once)
    study.commands({f"evaluate-{name}": _evaluate(name) for name in tuned}, at_once=at_once)


def insertion(study: Study, at_once: int) -> None:
    """French after Python and English: lifelong (French only) and joint (all three, embeddings trained)."""
    study.command("grown", "megamf modules insert base grown --attention 2 --mlp 4 --seed 0")
    new, every = _sources("train", "french-train"), _sources("train", *(f"{domain}-train" for domain in DOMAINS))
    lora = "tune.strategy=lora tune.lora_rank={} tune.lora_alpha={}"
    runs = {
        "life-full": ("base", "nano", new, "losses.balance=none"),
        "life-lora-4": ("base", "nano", new, f"losses.balance=none {lora.format(4, 8)}"),
        "life-lora-32": ("base", "nano", new, f"losses.balance=none {lora.format(32, 64)}"),
        "life-dense-full": ("dense", "nano-dense", new, ""),
        "life-dense-lora-4": ("dense", "nano-dense", new, lora.format(4, 8)),
        "life-dense-lora-32": ("dense", "nano-dense", new, lora.format(32, 64)),
        "joint-full": ("base", "nano", every, ""),
        "joint-lora-32": ("base", "nano", every, f"losses.balance=none {lora.format(32, 64)} tune.embeddings=true"),
        "joint-inserted": ("grown", "nano", every, "tune.strategy=inserted tune.embeddings=true"),
        "joint-dense-full": ("dense", "nano-dense", every, ""),
        "joint-dense-lora-32": ("dense", "nano-dense", every, f"{lora.format(32, 64)} tune.embeddings=true"),
    }
    for strategy, penalties in PENALTIES.items():
        for penalty in penalties:
            settings = f"losses.balance=none tune.strategy={strategy} tune.rows_regularisation={penalty}"
            runs[f"life-{strategy}-{penalty}"] = ("grown", "nano", new, settings)
    commands = {name: _tune(model, preset, name, *rest, 160) for name, (model, preset, *rest) in runs.items()}
    study.commands(commands, at_once=at_once)
    measured = ["base", "dense", "grown", *runs]
    study.commands({f"evaluate-{name}": _evaluate(name) for name in measured}, at_once=at_once)


def _evaluate(name: str) -> str:
    listed = " ".join(f"data/{domain}-valid" for domain in DOMAINS)
    return f"megamf evaluate {name} --data {listed} --max-batches 20 --json evaluate-{name}.json"


def main(argv: list[str] | None = None) -> int:
    """Run what is not done yet, and write the page."""
    parser = argparse.ArgumentParser(prog="python -m megamf.experiments.modules", description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for corpora, checkpoints and results")
    parser.add_argument("--page", type=Path, default=Path("docs/experiments/modules.md"))
    parser.add_argument("--at-once", type=int, default=2, metavar="N", help="independent runs at one time (2)")
    args = parser.parse_args(argv)
    study = Study(args.work)
    data(study)
    base(study)
    specialisation(study, args.at_once)
    pruning(study, args.at_once)
    insertion(study, args.at_once)
    page.write(study, args.page)
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))

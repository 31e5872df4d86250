"""docs/experiments/cus_prune.md: SmolLM2-135M pruned to an expert, by Cus-Prun and by what it is compared with.

    python -m megamf.experiments.cus_prune --work DIR [--page docs/experiments/cus_prune.md] [--small]

The experts and their dimensions are cut out of the project's corpora by the packages that the texts come from; no
dimension holds a document of the kind that the expert is measured on. Every stage is run once. About half an hour on
two cores; `--small` tries everything on a few documents.
"""

import argparse
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from megamf.cli import run
from megamf.compress.baselines import prune_baseline
from megamf.compress.cus_prune import Settings, dimension_scores, intersect, keep_by, layer_counts
from megamf.compress.documents import mean_loss, token_documents
from megamf.compress.folder import load_causal_lm
from megamf.compress.neurons import neuron_groups, prunable_parameters, removed_parameters
from megamf.compress.relevance import Impacts, impacts
from megamf.compress.remove import remove_neurons
from megamf.experiments import _cus_prune_page as page
from megamf.experiments import corpora, weights
from megamf.experiments.stages import Study

MODEL = "smollm2-135m"
RATIOS = (0.25, 0.4)
LENGTH = 128
QK_TOKENS = 64
SEEDS = (0, 1, 2)
# Characters of an opening: what a text says first about the thing that it is about.
OPENING = 400

# (corpus, packages or none for all, whether only the opening of each document counts)
Source = tuple[str, tuple[str, ...], bool]
EXPERTS: dict[str, dict[str, list[Source]]] = {
    # French x Unix manuals x saying what a command is for; measured on openings of French manual pages.
    "french-manuals": {
        "language": [("french", ("libreoffice-help-fr", "gimp-help-fr", "debian-handbook", "gnome-user-docs"), False)],
        "domain": [("german", ("manpages-de",), False), ("english", ("linux-doc-6.1",), False)],
        "task": [("german", ("libreoffice-help-de", "manpages-de"), True), ("python", (), True)],
        "expert": [("french", ("manpages-fr",), True)],
    },
    # English x databases x reference text; measured on the PostgreSQL manual.
    "english-databases": {
        "language": [("english", ("linux-doc-6.1", "anarchism", "debian-handbook"), False)],
        "domain": [("python", (), False), ("french", ("libreoffice-help-fr",), False)],
        "task": [("french", ("manpages-fr",), False), ("german", ("manpages-de",), False)],
        "expert": [("english", ("postgresql-doc-15",), False)],
    },
}
DIMENSIONS = ("language", "domain", "task")
GENERAL = ("english", "german", "python", "chinese")


def documents(folder: Path, sources: Sequence[Source], count: int, split: str = "train") -> list[str]:
    """`count` documents, taken in turn from the sources and evenly over each."""
    found = []
    for corpus, packages, opening in sources:
        lines = (folder / f"{corpus}-{split}.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [row for row in map(json.loads, lines) if not packages or row["source"] in packages]
        texts = [row["text"][:OPENING] if opening else row["text"] for row in rows]
        own = -(-count // len(sources))
        step = max(1, len(texts) // own)
        found.append(texts[::step][:own])
    mixed = [texts[i] for i in range(max(map(len, found))) for texts in found if i < len(texts)]
    return mixed[:count]


class Bench:
    """The model, its tokenizer and the documents, loaded when the first stage that is not done asks for them."""

    def __init__(self, study: Study, corpora_at: Path, weights_at: Path, size: dict[str, int]) -> None:
        self.study, self.corpora, self.folder, self.size = study, corpora_at, weights_at / MODEL, size

    @functools.cached_property
    def loaded(self) -> tuple[Any, Any]:
        """(model in float32, tokenizer)."""
        return load_causal_lm(self.folder, dtype=torch.float32)

    @functools.cache  # noqa: B019  (one object a process)
    def tokens(self, expert: str, part: str) -> list[torch.Tensor]:
        """Token ids of a dimension of an expert, of what the expert is measured on, or of a general corpus."""
        if part in GENERAL:
            texts = documents(self.corpora, [(part, (), False)], self.size["general"], "valid")
        else:
            texts = documents(
                self.corpora, EXPERTS[expert][part], self.size["expert" if part == "expert" else "calibration"]
            )
        return token_documents(texts, self.loaded[1], LENGTH)

    def losses(self, model: Any, expert: str, general: bool = True) -> dict[str, float]:
        """Loss in nats a token of the expert's documents and of every general corpus that is not the expert's own."""
        parts = ("expert", *GENERAL) if general else ("expert",)
        return {part: mean_loss(model, self.tokens(expert, part), batch=8) for part in parts}

    def calibration(self, expert: str) -> list[torch.Tensor]:
        """Documents of all dimensions, as many as one of them has, for methods with one calibration set."""
        rows = [self.tokens(expert, name) for name in DIMENSIONS]
        return [rows[i % len(rows)][i // len(rows)] for i in range(self.size["calibration"])]


def measure(bench: Bench, expert: str, dimension: str, qk_tokens: int) -> dict[str, Any]:
    """Changes of every neuron on the documents of one dimension, kept in a file."""
    model = bench.loaded[0]
    groups = neuron_groups(model)
    found = impacts(model, groups, bench.tokens(expert, dimension), qk_tokens=qk_tokens)
    name = f"impacts-{expert}-{dimension}.safetensors"
    tensors = {str(group): values.contiguous() for group, values in found.values.items()}
    save_file(tensors | {"stream": found.stream}, bench.study.path(name))
    return {"file": name, "documents": found.stream.shape[1]}


def read_impacts(bench: Bench, expert: str, dimension: str) -> Impacts:
    """What `measure` kept."""
    tensors = load_file(bench.study.path(f"impacts-{expert}-{dimension}.safetensors"))
    values = {group: tensors[str(group)] for group in neuron_groups(bench.loaded[0])}
    return Impacts(values, tensors["stream"])


def by_relevance(
    bench: Bench, expert: str, dimensions: Sequence[str], general: bool = True, **options: Any
) -> dict[str, Any]:
    """Losses of the model pruned by the intersection of these dimensions."""
    model, settings = bench.loaded[0], Settings(**options)
    each = {name: dimension_scores(read_impacts(bench, expert, name), settings) for name in dimensions}
    scores = intersect(each, settings.scale)
    if settings.attention == "none":
        scores = {group: values for group, values in scores.items() if group.kind == "ffn"}
    keep = keep_by(model, scores, settings)
    small = remove_neurons(model, keep)
    return {
        "loss": bench.losses(small, expert, general),
        "reached": removed_parameters(keep) / prunable_parameters(neuron_groups(model)),
        "layers": layer_counts(keep),
    }


def by_baseline(bench: Bench, expert: str, method: str, ratio: float, seed: int, budget: str) -> dict[str, Any]:
    """Losses of the model made smaller by another method."""
    pruned = prune_baseline(
        method, bench.loaded[0], bench.calibration(expert), ratio, seed=seed, budget=budget, length=LENGTH
    )
    return {"loss": bench.losses(pruned.model, expert), "reached": pruned.reached, "detail": pruned.detail}


def dense(bench: Bench, expert: str) -> dict[str, Any]:
    """Losses of the whole model."""
    return {"loss": bench.losses(bench.loaded[0], expert), "reached": 0.0}


VARIANTS: dict[str, dict[str, Any]] = {
    "as above": {},
    "same rank in every dimension": {"scale": "rank"},
    "absolute changes": {"relative": "none"},
    "changes against the median token's norm": {"relative": "token"},
    "below on 90 % of the documents": {"share": 0.9},
    "below on half of the documents": {"share": 0.5},
    "the same share from every layer": {"budget": "layer"},
    "feed-forward only": {"attention": "none"},
}


def stages(bench: Bench, experts: Sequence[str]) -> None:
    """Every measurement that is not done yet."""
    size = bench.size

    def compute(name: str, function: Callable[..., Any], **arguments: Any) -> None:
        bench.study.compute(name, lambda size, **rest: function(bench, **rest), size=size, **arguments)

    for expert in experts:
        compute(f"dense-{expert}", dense, expert=expert)
        for dimension in DIMENSIONS:
            compute(f"impacts-{expert}-{dimension}", measure, expert=expert, dimension=dimension, qk_tokens=QK_TOKENS)
        for ratio in RATIOS:
            at = f"{expert}-{ratio:g}"
            for name, dimensions in {"intersection": DIMENSIONS, **{one: (one,) for one in DIMENSIONS}}.items():
                compute(f"{at}-{name}", by_relevance, expert=expert, dimensions=list(dimensions), ratio=ratio)
            for seed in SEEDS:
                compute(
                    f"{at}-random-{seed}",
                    by_baseline,
                    expert=expert,
                    method="random",
                    ratio=ratio,
                    seed=seed,
                    budget="layer",
                )
            for method in ("magnitude", "gradient"):
                for budget in ("global", "layer"):
                    compute(
                        f"{at}-{method}-{budget}",
                        by_baseline,
                        expert=expert,
                        method=method,
                        ratio=ratio,
                        seed=0,
                        budget=budget,
                    )
            for method in ("layers", "slicing"):
                compute(
                    f"{at}-{method}", by_baseline, expert=expert, method=method, ratio=ratio, seed=0, budget="layer"
                )
    for number, options in enumerate(VARIANTS.values()):
        compute(
            f"variant-{number}",
            by_relevance,
            expert=experts[0],
            dimensions=list(DIMENSIONS),
            general=False,
            **{"ratio": RATIOS[0], **options},
        )


def main(argv: list[str] | None = None) -> int:
    """Run what is not done yet, and write the page."""
    parser = argparse.ArgumentParser(prog="python -m megamf.experiments.cus_prune", description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for corpora, weights and results")
    parser.add_argument("--corpora", type=Path, help="of `megamf.experiments.corpora` (WORK/corpora, built if missing)")
    parser.add_argument(
        "--weights", type=Path, help="of `megamf.experiments.weights` (WORK/weights, fetched if missing)"
    )
    parser.add_argument("--page", type=Path, default=Path("docs/experiments/cus_prune.md"))
    parser.add_argument("--experts", nargs="+", choices=list(EXPERTS), default=list(EXPERTS))
    parser.add_argument("--small", action="store_true", help="a few documents of everything")
    args = parser.parse_args(argv)
    study = Study(args.work)
    if args.corpora is None:
        args.corpora = study.path("corpora")
        study.compute("corpora", lambda names: corpora.build(args.corpora, tuple(names)), names=list(corpora.NAMES))
    if args.weights is None:
        args.weights = study.path("weights")
        study.compute(
            "weights", lambda names: [str(p) for p in weights.fetch(args.weights, tuple(names))], names=[MODEL]
        )
    size = (
        {"calibration": 3, "expert": 2, "general": 2}
        if args.small
        else {"calibration": 24, "expert": 24, "general": 10}
    )
    stages(Bench(study, args.corpora, args.weights, size), args.experts)
    page.write(study, args.page, args.experts, RATIOS, SEEDS, list(VARIANTS), size)
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))

"""docs/experiments/moefication.md: dense models as experts of neurons, three splits by three routers, time.

    python -m megamf.experiments.moefication --work DIR [--page docs/experiments/moefication.md] [--scale 1]

SmolLM2-135M (gated units with SiLU: as it is, by magnitude, and after a short training with ReLU) and a dense baseline
with ReLU trained by `megamf train`, both on English. Every stage is run once; the page is written from what they left
in DIR. `--scale` multiplies the text looked at and the steps trained; 1 takes more than an hour on two cores.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from megamf.cli import run
from megamf.compress.documents import load_documents, mean_loss, token_documents, token_windows
from megamf.compress.moefication import (
    Choices,
    DenseBaseline,
    calibrate,
    calibrate_layer,
    capture_inputs,
    dense_layers,
    open_model,
    relufy,
)
from megamf.compress.moefication.convert import make_split, settings, sparse_layer
from megamf.compress.moefication.portable.sparse_ffn import SparseFfn, replace
from megamf.compress.moefication.routers import MlpRouter, centres, recovered, train_mlp_router, truth
from megamf.compress.moefication.speed import accelerate, ffn_times, seconds
from megamf.compress.moefication.statistics import DenseLayer, activity
from megamf.data.tokenizer import load_tokenizer
from megamf.experiments import _moefication_page as page
from megamf.experiments.corpora import build
from megamf.experiments.stages import Study
from megamf.experiments.weights import fetch

# A dense baseline trained here; SmolLM2-135M after training with ReLU; SmolLM2-135M as it is.
MODELS = ("nano", "relu", "smollm2")
SPLITS = ("random", "clustering", "coactivation")
ROUTERS = ("truth", "similarity", "mlp")
SHARES = (0.1, 0.2, 0.25, 0.3, 0.5, 0.75)
CALIBRATED = (0.1, 0.25, 0.5)
SEQ_LEN = 256


def text(study: Study, model: nn.Module, source: str, tokens: int, documents: int) -> tuple[torch.Tensor, list]:
    """Windows of English to watch and to train on, and held-out documents."""
    if isinstance(model, DenseBaseline):
        tokenizer: Any = load_tokenizer(study.path("tokenizer.model"))
    else:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(study.path(source), local_files_only=True)
    rows = []
    train = load_documents(study.path("corpora/english-train.jsonl"), limit=max(64, tokens // 50))
    for start in range(0, len(train), 64):
        rows += token_documents(train[start : start + 64], tokenizer, 8 * SEQ_LEN)
        if sum(map(len, rows)) > tokens + SEQ_LEN:
            break
    valid = load_documents(study.path("corpora/english-valid.jsonl"), limit=max(2, documents))
    return token_windows(rows, SEQ_LEN), token_documents(valid, tokenizer, SEQ_LEN)


def curves(study: Study, source: str, split: str, tokens: int, documents: int, epochs: int = 30) -> dict[str, Any]:
    """Losses by router and share of one split, and the shares of the activation that the routers found."""
    model = open_model(study.path(source))
    layers = dense_layers(model)
    windows_WT, held = text(study, model, source, tokens, documents)
    inputs = capture_inputs(model, layers, windows_WT, tokens)
    result: dict[str, Any] = {"dense": mean_loss(model, held), "loss": {}, "recovered": {}}
    choices = Choices(split=split, share=0.2, by_magnitude=True, epochs=epochs)
    made = [_watched(layer, x_ND, choices) for layer, x_ND in zip(layers, inputs, strict=True)]
    result["active"] = sum(part["active"] for part in made) / len(made)
    for router in ROUTERS:
        about = settings(layers, Choices(split=split, router=router, by_magnitude=True))
        sparse = _replaced(model, layers, made, about)
        result["recovered"][router] = sum(part["recovered"][router] for part in made) / len(made)
        result["loss"][router] = {}
        for share in SHARES:
            _select(sparse, share)
            result["loss"][router][str(share)] = mean_loss(model, held)
    return result


def fitted(study: Study, source: str, split: str, tokens: int, documents: int, epochs: int = 30) -> dict[str, float]:
    """Share -> loss with MLP routers after fitting every layer's W2."""
    model = open_model(study.path(source))
    layers = dense_layers(model)
    windows_WT, held = text(study, model, source, tokens, documents)
    inputs = capture_inputs(model, layers, windows_WT, tokens)
    choices = Choices(split=split, share=0.2, by_magnitude=True, epochs=epochs)
    made = [_watched(layer, x_ND, choices) for layer, x_ND in zip(layers, inputs, strict=True)]
    losses = {}
    for share in CALIBRATED:
        sparse = _replaced(model, layers, made, settings(layers, choices))
        _select(sparse, share)
        for one, layer, x_ND in zip(sparse, layers, inputs, strict=True):
            calibrate_layer(one, layer, x_ND)
        losses[str(share)] = mean_loss(model, held)
    return losses


@torch.no_grad()
def without(study: Study, source: str, documents: int) -> float:
    """Loss with all feed-forward layers left out: what they are worth."""
    model = open_model(study.path(source))
    _, held = text(study, model, source, SEQ_LEN, documents)
    for layer in dense_layers(model):
        layer.out_MO.zero_()
        if layer.out_bias_O is not None:
            layer.out_bias_O.zero_()
    return mean_loss(model, held)


@torch.no_grad()
def _watched(layer: DenseLayer, x_ND: torch.Tensor, choices: Choices) -> dict[str, Any]:
    h_NM = layer.hidden(x_ND)
    label_M = make_split(layer, h_NM, choices)
    score_NE, centre_ED = truth(h_NM, label_M), centres(layer, label_M)
    top_k = choices.num_selected(score_NE.shape[1])
    router = train_mlp_router(x_ND, score_NE, centre_ED, top_k, epochs=choices.epochs)
    nearness_NE = -torch.cdist(torch.nn.functional.normalize(x_ND, dim=-1), centre_ED)
    found = {
        "truth": recovered(score_NE, score_NE, top_k),
        "similarity": recovered(score_NE, nearness_NE, top_k),
        "mlp": router.recovered,
    }
    return {"label": label_M, "router": router, "active": activity(h_NM), "recovered": found}


def _replaced(
    model: nn.Module, layers: list[DenseLayer], made: list[dict[str, Any]], about: dict[str, Any]
) -> list[SparseFfn]:
    """Sparse layers in the places of the dense (or the last sparse) ones."""
    sparse = []
    for layer, part in zip(layers, made, strict=True):
        router: MlpRouter | None = part["router"] if about["router"] == "mlp" else None
        sparse.append(_in_place(model, layer, part["label"], about, router))
    accelerate(model)
    return sparse


def _in_place(model: nn.Module, layer: DenseLayer, label_M: torch.Tensor, about: dict, router: MlpRouter | None):
    one = sparse_layer(layer, label_M, about, router)
    replace(model, layer.name, layer.holder, layer.form, one)
    return one


def _select(sparse: list[SparseFfn], share: float) -> None:
    for layer in sparse:
        layer.num_selected = max(1, int(share * layer.num_experts + 1e-9))


def tuned(study: Study, source: str, tokens: int, documents: int, steps: int) -> dict[str, Any]:
    """A quarter of the experts (co-activation, MLP routers): loss before and after training W2 on text."""
    model = open_model(study.path(source))
    layers = dense_layers(model)
    windows_WT, held = text(study, model, source, max(tokens, 4 * steps * SEQ_LEN), documents)
    inputs = capture_inputs(model, layers, windows_WT, tokens)
    choices = Choices(by_magnitude=True)
    about = settings(layers, choices)
    made = [_watched(layer, x_ND, choices) for layer, x_ND in zip(layers, inputs, strict=True)]
    _replaced(model, layers, made, about)
    before = mean_loss(model, held)
    losses = calibrate(model, windows_WT, steps, batch=4, lr=2e-4)
    return {"before": before, "after": mean_loss(model, held), "steps": steps, "losses": losses}


def with_relu(study: Study, source: str, out: str, steps: int, documents: int) -> dict[str, Any]:
    """Train with ReLU in the place of SiLU; the model is kept in `out`."""
    from transformers import AutoTokenizer

    model = open_model(study.path(source))
    windows_WT, held = text(study, model, source, 2 * steps * SEQ_LEN, documents)
    before = mean_loss(model, held)
    losses = relufy(model, dense_layers(model), windows_WT, steps, batch=2, lr=2e-4)
    model.save_pretrained(study.path(out))
    AutoTokenizer.from_pretrained(study.path(source)).save_pretrained(study.path(out))
    return {"before": before, "after": mean_loss(model, held), "steps": steps, "losses": losses}


@torch.no_grad()
def whole_model_times(study: Study, source: str, share: float) -> list[dict[str, float]]:
    """Milliseconds of a forward pass with experts chosen by (untrained) MLP routers, beside the dense model."""
    model = open_model(study.path(source))
    layers = dense_layers(model)
    ids = {n: torch.randint(3, 40, (1, n), generator=torch.Generator().manual_seed(0)) for n in (1, 16, 256)}
    dense = {n: seconds(partial(model, input_ids=ids[n]), 9, 10.0) for n in ids}
    choices = Choices(split="random", share=share, by_magnitude=True)
    about = settings(layers, choices)
    for layer in layers:
        label_M = make_split(layer, torch.empty(0), choices)
        centre_ED = centres(layer, label_M)
        router = MlpRouter(centre_ED, torch.eye(len(centre_ED)), 0.0, 0)
        _in_place(model, layer, label_M, about, router)
    accelerate(model)
    return [
        {"tokens": n, "dense": 1000 * dense[n], "sparse": 1000 * seconds(partial(model, input_ids=ids[n]), 9, 10.0)}
        for n in ids
    ]


def times() -> dict[str, Any]:
    """One layer of SmolLM2-135M's sizes and one of T5-base's."""
    return {
        "576 x 1536, gated SiLU": ffn_times(576, 1536, gated=True, activation="silu"),
        "768 x 3072, ReLU": ffn_times(768, 3072, gated=False, activation="relu"),
    }


def nano(study: Study, steps: int) -> None:
    """A dense baseline with ReLU on English."""
    study.command(
        "tokenizer",
        "megamf tokenizer --input corpora/english-train.jsonl --vocab-size 4096 --max-megabytes 8 "
        "--output tokenizer.model",
    )
    for part in ("train", "valid"):
        study.command(
            f"prepare-{part}",
            f"megamf prepare --input corpora/english-{part}.jsonl --tokenizer tokenizer.model --output data/{part}",
        )
    study.command(
        "train-nano",
        "megamf train --preset nano-dense run.dir=nano model.activation_function=relu data.tokenizer=tokenizer.model "
        f'"data.train=[{{path: data/train}}]" "data.valid=[{{path: data/valid}}]" train.steps={steps} '
        f"train.eval_every={steps} checkpoint.every={steps}",
    )


def main(argv: list[str] | None = None) -> int:
    """Run what is missing, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="where the stages leave their results")
    parser.add_argument("--page", type=Path, metavar="FILE", help="the page to write, with pictures beside it")
    parser.add_argument("--scale", type=float, default=1.0, metavar="X", help="of texts and steps (1)")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    args = parser.parse_args(argv)
    study, scale = Study(args.work), args.scale
    study.compute("corpora", lambda names: build(study.path("corpora"), tuple(names)), names=["english"])
    tokens, documents = max(1024, int(4096 * scale)), max(4, int(24 * scale))
    study.compute("times", times)
    sources = []
    if "nano" in args.models:
        nano(study, max(20, int(1200 * scale)))
        sources.append("nano")
    if {"relu", "smollm2"} & set(args.models):
        study.compute(
            "weights", lambda name: [str(p) for p in fetch(study.path("weights"), (name,))], name="smollm2-135m"
        )
        source, steps = "weights/smollm2-135m", max(2, int(60 * scale))
        study.compute("model-times", partial(whole_model_times, study), source=source, share=0.25)
        if "relu" in args.models:
            study.compute(
                "relu", partial(with_relu, study), source=source, out="relu", steps=steps, documents=documents
            )
            sources.append("relu")
        if "smollm2" in args.models:
            sources.append(source)
    for source in sources:
        name = source.rpartition("/")[2]
        study.compute(f"{name}-without", partial(without, study), source=source, documents=documents)
        for split in SPLITS:
            asked = {"source": source, "split": split, "documents": documents}
            study.compute(f"{name}-{split}", partial(curves, study), **asked, tokens=tokens)
            study.compute(f"{name}-{split}-fitted", partial(fitted, study), **asked, tokens=2 * tokens)
        if source != "weights/smollm2-135m":
            steps = max(2, int((200 if source == "nano" else 40) * scale))
            study.compute(
                f"{name}-tuned", partial(tuned, study), source=source, tokens=tokens, documents=documents, steps=steps
            )
    if args.page is not None:
        page.write(study, args.page, [source.rpartition("/")[2] for source in sources], args.scale)
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))

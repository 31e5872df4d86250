"""Split a dense model's feed-forward layers into experts, of which a part is computed for a token (MoEfication).

MODEL is a Hugging Face folder (causal, encoder or encoder-decoder models with feed-forward layers like Llama's, T5's,
OPT's, GPT-2's, GPT-NeoX's or BERT's) or a megamf checkpoint of kind dense. Neurons that answer together become an
expert, and a small router learns which experts a token needs. OUT becomes a Hugging Face folder that loads with
trust_remote_code, or a megamf checkpoint; it appears whole or not at all.
"""

import argparse
import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from megamf.cli import run
from megamf.compress.documents import check_ids, load_documents, mean_loss, token_documents, token_windows
from megamf.compress.moefication import (
    Choices,
    DenseBaseline,
    calibrate,
    calibrate_layer,
    capture_inputs,
    check,
    convert,
    dense_layers,
    is_causal,
    open_model,
    relufy,
    save_checkpoint,
    save_hf,
    sparse_layers,
)
from megamf.compress.moefication.convert import report_tree
from megamf.compress.moefication.models import distance, mean_over
from megamf.compress.moefication.save import checkpoint_config, refuse_existing
from megamf.compress.moefication.speed import accelerate
from megamf.compress.moefication.statistics import DenseLayer
from megamf.data.tokenizer import load_tokenizer
from megamf.errors import UserError
from megamf.tools._models import positive, progress, refuse_unwritable, write_json


def main(argv: list[str] | None = None) -> int:
    """Read, convert, measure, save."""
    args = _parser().parse_args(argv)
    refuse_unwritable(args.json)
    refuse_existing(args.out, args.model)
    choices = Choices(
        args.expert_size, args.share, args.split, args.edges, args.router, args.weighted, args.by_magnitude,
        args.epochs, args.seed,
    )  # fmt: skip
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = open_model(args.model)
    layers = dense_layers(model)
    _check(model, layers, choices, args)
    train_WT, held, documents = _text(model, args)
    tree: dict[str, Any] = {"choices": vars(choices)}

    teacher = None if is_causal(model) else copy.deepcopy(model)
    quality = _Quality(teacher, held, documents)
    tree["dense"] = quality(model)
    print(
        f"{type(model).__name__}: {len(layers)} feed-forward layers of {layers[0].num_neurons} neurons, {quality.name}"
    )
    print(f"dense: {tree['dense']:.4f}")
    if args.relufy_steps:
        with progress("training with ReLU") as advance:
            relufy(
                model, layers, train_WT, args.relufy_steps, lr=args.lr, batch=args.batch, seed=args.seed,
                on_step=lambda done, total, _: advance(done, total),
            )  # fmt: skip
        tree["relufied"] = quality(model)
        print(f"with ReLU: {tree['relufied']:.4f}")
    with progress("watching") as advance:
        advance(0, 1)
        inputs = capture_inputs(model, layers, train_WT, args.tokens)
    with progress("converting") as advance:
        about, reports = convert(model, layers, inputs, choices, advance)
    accelerate(model)
    tree |= {"settings": about, "layers": report_tree(reports), "sparse": quality(model)}
    share = about["num_selected"] / reports[0].experts
    print(f"{about['num_selected']} of {reports[0].experts} experts ({share:.1%} of the neurons): {tree['sparse']:.4f}")
    found = sum(report.recovered for report in reports) / len(reports)
    best = sum(report.recovered_truth for report in reports) / len(reports)
    print(f"activation in the chosen experts: {found:.1%}, at best {best:.1%}")
    if args.calibrate != "none":
        _calibrate(model, layers, inputs, train_WT, teacher, args)
        tree["calibrated"] = quality(model)
        print(f"calibrated: {tree['calibrated']:.4f}")
    if args.format == "checkpoint":
        saved = save_checkpoint(model, about, args.out, args.model.resolve().name)
    else:
        saved = save_hf(model, about, args.out, args.model)
    print(saved)
    write_json(args.json, tree | {"folder": str(saved)})
    return 0


class _Quality:
    """What is measured on held-out text: the loss of a causal model, of others the distance to the dense outputs."""

    def __init__(self, teacher: nn.Module | None, held_WT: torch.Tensor, documents: list[torch.Tensor]) -> None:
        self.teacher, self.held_WT, self.documents = teacher, held_WT, documents
        self.name = (
            f"loss in nats a token on {len(documents)} documents" if teacher is None else "squared error of the outputs"
        )

    def __call__(self, model: nn.Module) -> float:
        if self.teacher is None:
            return mean_loss(model, self.documents)
        return mean_over(lambda m, t, ids: distance(m, t, ids), model, self.held_WT, 8, self.teacher)


def _calibrate(
    model: nn.Module,
    layers: list[DenseLayer],
    inputs: list[torch.Tensor],
    train_WT: torch.Tensor,
    teacher: nn.Module | None,
    args: argparse.Namespace,
) -> None:
    with progress("calibrating") as advance:
        if args.calibrate == "layer":
            for number, (sparse, layer, x_ND) in enumerate(zip(sparse_layers(model), layers, inputs, strict=True)):
                calibrate_layer(sparse, layer, x_ND)
                advance(number + 1, len(layers))
        else:
            calibrate(
                model, train_WT, args.calibrate_steps, what=args.calibrate, teacher=teacher, lr=args.lr,
                batch=args.batch, seed=args.seed, on_step=lambda done, total, _: advance(done, total),
            )  # fmt: skip


def _check(model: nn.Module, layers: list[DenseLayer], choices: Choices, args: argparse.Namespace) -> None:
    """Everything that can be refused before the work begins."""
    is_causal(model)
    if args.relufy_steps and all(layer.activation == "relu" for layer in layers):
        raise UserError("the model uses ReLU already: leave out --relufy-steps")
    as_if = Choices(**{**vars(choices), "by_magnitude": choices.by_magnitude or args.relufy_steps > 0})
    check(layers, as_if)
    if args.format == "checkpoint":
        if not isinstance(model, DenseBaseline):
            raise UserError(
                f"{args.model} is no megamf checkpoint: only those become one; leave out --format checkpoint"
            )
        if args.router != "mlp" or args.weighted:
            raise UserError("a megamf checkpoint holds unweighted experts with routers of --router mlp")
        checkpoint_config(model, layers[0].num_neurons // choices.expert_size, 1, choices.expert_size)
    elif isinstance(model, DenseBaseline):
        raise UserError(
            f"{args.model} is a megamf checkpoint: give --format checkpoint (megamf export-hf reads the result)"
        )


def _text(model: nn.Module, args: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Windows to train on, held-out windows, held-out documents. Raises UserError for too little text."""
    if isinstance(model, DenseBaseline):
        if args.tokenizer is None:
            raise UserError("a megamf checkpoint carries no tokenizer: name it with --tokenizer")
        tokenizer: Any = load_tokenizer(args.tokenizer)
    else:
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(args.tokenizer or args.model, local_files_only=True)
        except (OSError, ValueError) as error:
            raise UserError(f"no tokenizer in {args.tokenizer or args.model}: {str(error).splitlines()[0]}") from None
    texts = load_documents(args.data, args.text_field, blank_lines=args.blank_lines)
    if args.valid is None:
        count = max(1, min(len(texts) // 10, args.valid_documents))
        texts, valid = texts[:-count], texts[-count:]
    else:
        valid = load_documents(
            args.valid, args.text_field, args.valid_documents, minimum=1, blank_lines=args.blank_lines
        )
    documents = token_documents(valid, tokenizer, args.seq_len)
    held_WT = token_windows(documents, min(args.seq_len, sum(map(len, documents))))
    steps = args.relufy_steps + (args.calibrate_steps if args.calibrate in ("out", "ffn", "all") else 0)
    limit = max(args.tokens, steps * args.batch * args.seq_len)
    tokens, total = [], 0
    for start in range(0, len(texts), 256):
        rows = token_documents(texts[start : start + 256], tokenizer, 64 * args.seq_len)
        tokens, total = tokens + rows, total + sum(map(len, rows))
        if total > 2 * limit:
            break
    check_ids(model, [*tokens, *documents])
    return token_windows(tokens, args.seq_len), held_WT, documents


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megamf moefy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, metavar="MODEL", help="Hugging Face folder, or megamf checkpoint (dense)")
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to write")
    parser.add_argument(
        "--data", type=Path, nargs="+", required=True, metavar="PATH", help="text: .jsonl, .txt, folders"
    )
    parser.add_argument(
        "--valid", type=Path, nargs="+", metavar="PATH", help="held-out text (the last tenth of --data)"
    )
    parser.add_argument("--valid-documents", type=positive, default=64, metavar="N", help="documents of it (64)")
    parser.add_argument("--text-field", default="text", metavar="NAME", help="JSON field or column of the text (text)")
    parser.add_argument("--blank-lines", action="store_true", help="split .txt files into documents at blank lines")
    parser.add_argument("--tokenizer", type=Path, metavar="PATH", help="of a megamf checkpoint, or in place of MODEL's")
    parser.add_argument("--format", choices=("hf", "checkpoint"), default="hf", help="what OUT becomes (hf)")
    group = parser.add_argument_group("experts")
    group.add_argument("--expert-size", type=positive, default=32, metavar="N", help="neurons of one (32)")
    group.add_argument("--share", type=float, default=0.25, help="of the experts, computed for a token (0.25)")
    group.add_argument("--split", choices=("random", "clustering", "coactivation"), default="coactivation")
    group.add_argument(
        "--edges", choices=("product", "binary"), default="product", help="weights of the co-activation graph (product)"
    )
    group.add_argument("--router", choices=("truth", "similarity", "mlp"), default="mlp", help="(mlp)")
    group.add_argument("--weighted", action="store_true", help="experts count by their scores (they count alike)")
    group.add_argument("--by-magnitude", action="store_true", help="allow activations other than ReLU as they are")
    group.add_argument("--tokens", type=positive, default=8192, metavar="N", help="tokens that are watched (8192)")
    group.add_argument("--epochs", type=positive, default=30, metavar="N", help="of a router's training (30)")
    group = parser.add_argument_group("training")
    group.add_argument("--relufy-steps", type=int, default=0, metavar="N", help="steps of training with ReLU first (0)")
    group.add_argument(
        "--calibrate",
        choices=("none", "layer", "out", "ffn", "all"),
        default="none",
        help="afterwards: layer, fit each layer's output weights to its dense output; out, train them on text; ffn and "
        "all, train more (none)",
    )
    group.add_argument("--calibrate-steps", type=positive, default=100, metavar="N", help="of out, ffn and all (100)")
    group.add_argument("--lr", type=float, default=1e-4, help="largest learning rate (1e-4)")
    group.add_argument("--batch", type=positive, default=4, metavar="N", help="sequences a step (4)")
    group.add_argument("--seq-len", type=positive, default=256, metavar="N", help="tokens of one (256)")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="(0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured there")
    return parser


if __name__ == "__main__":
    raise SystemExit(run(main))

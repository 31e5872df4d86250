"""Continued training around the conversion: ReLU in the place of another activation, and calibration afterwards.

Shapes: B batch, T time, W windows, N tokens, M neurons of a layer, O output width.
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
from torch import nn

from megamf.compress.moefication.convert import sparse_layers
from megamf.compress.moefication.models import distance, is_causal, next_token_loss
from megamf.compress.moefication.portable.sparse_ffn import SparseFfn, put
from megamf.compress.moefication.statistics import DenseLayer
from megamf.errors import TrainingFailed, UserError

Trained = Literal["out", "ffn", "all"]
OnStep = Callable[[int, int, float], None]


def relufy(
    model: nn.Module,
    layers: Sequence[DenseLayer],
    windows_WT: torch.Tensor,
    steps: int,
    *,
    lr: float = 1e-4,
    batch: int = 4,
    seed: int = 0,
    on_step: OnStep | None = None,
) -> list[float]:
    """Put ReLU in the place of the activations and train all weights on text, in place; returns the losses.

    Causal language models learn to predict the next token, other models to give the outputs they gave before
    (`distance`). Raises UserError where there are no steps to train.
    """
    if steps < 1:
        raise UserError(f"a model does not get used to ReLU in {steps} steps: at least 1 is needed")
    teacher = None if is_causal(model) else copy.deepcopy(model).eval()
    for layer in layers:
        put(layer.holder, layer.form["act"], nn.ReLU())
        layer.activation = "relu"
    _tell_config(model)
    return train(model, list(model.parameters()), windows_WT, steps, teacher, lr, batch, seed, on_step)


def calibrate(
    model: nn.Module,
    windows_WT: torch.Tensor,
    steps: int,
    *,
    what: Trained = "out",
    teacher: nn.Module | None = None,
    lr: float = 1e-4,
    batch: int = 4,
    seed: int = 0,
    on_step: OnStep | None = None,
) -> list[float]:
    """Train a converted model on text with its routers fixed, in place; returns the losses.

    what: the output projections W2 and their biases (`out`), all weights of the experts (`ffn`), or everything but the
    routers (`all`). A causal language model predicts the next token; for other models `teacher`, the dense one, says
    what the outputs are to be. Raises UserError without one.
    """
    if teacher is None and not is_causal(model):
        raise UserError(f"{type(model).__name__} has no loss on plain text: it needs the dense model as a teacher")
    routers = {id(p) for layer in sparse_layers(model) for p in _router_parameters(layer)}
    if what == "all":
        chosen = [p for p in model.parameters() if id(p) not in routers]
    else:
        chosen = [p for layer in sparse_layers(model) for p in _expert_parameters(layer, what)]
    return train(model, chosen, windows_WT, steps, teacher, lr, batch, seed, on_step)


def _expert_parameters(layer: SparseFfn, what: Trained) -> Iterator[nn.Parameter]:
    for name, parameter in layer.named_parameters(recurse=False):
        if name.startswith("out") or (what == "ffn" and name != "centre_ED"):
            yield parameter


def _router_parameters(layer: SparseFfn) -> list[nn.Parameter]:
    own = [] if layer.router is None else list(layer.router.parameters())
    return own if layer.centre_ED is None else [*own, layer.centre_ED]


def train(
    model: nn.Module,
    parameters: list[nn.Parameter],
    windows_WT: torch.Tensor,
    steps: int,
    teacher: nn.Module | None,
    lr: float,
    batch: int,
    seed: int,
    on_step: OnStep | None = None,
) -> list[float]:
    """AdamW (no decay) over `parameters`, warm-up over a tenth and a cosine to a tenth of lr, gradients clipped at 1.

    Raises TrainingFailed for a loss that is no number. The model is left in evaluation mode, every gradient gone.
    """
    generator = torch.Generator().manual_seed(seed)
    wanted = {id(parameter) for parameter in parameters}
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in wanted)
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    warm = max(1, steps // 10)

    def factor(step: int) -> float:
        done = max(0, step - warm) / max(1, steps - warm)
        return min((step + 1) / warm, 0.55 + 0.45 * math.cos(math.pi * done))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    losses = []
    # Dropout off: a few steps are too few to gain by it.
    model.eval()
    try:
        for step, ids_BT in zip(range(steps), _batches(windows_WT, batch, generator)):
            loss = next_token_loss(model, ids_BT) if teacher is None else distance(model, teacher, ids_BT)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise TrainingFailed(
                    f"the loss is {losses[-1]} at step {step + 1} of {steps}: take a smaller lr than {lr}"
                )
            if on_step is not None:
                on_step(step + 1, steps, losses[-1])
    finally:
        for name, parameter in model.named_parameters():
            parameter.grad = None
            parameter.requires_grad_(before[name])
    return losses


def _batches(windows_WT: torch.Tensor, batch: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    while True:
        order = torch.randperm(len(windows_WT), generator=generator)
        yield from windows_WT[order].split(batch)


@torch.no_grad()
def calibrate_layer(
    sparse: SparseFfn, layer: DenseLayer, x_ND: torch.Tensor, ridge: float | None = None
) -> tuple[float, float]:
    """Fit W2 of one layer, in place, so that its output comes as close as it can to the dense layer's on x_ND.

    Least squares with a pull of `ridge` (times the mean square of an activation) to the weights as they are; solved
    directly. None takes the one of RIDGES that does best on every tenth token when it is fitted on the others. Returns
    the mean squared error over the variance of the dense output, before and after.
    """
    x_ND = x_ND.to(layer.gate_DM.dtype)
    y_NO = layer.output(x_ND).double()
    h_NEF = sparse.hidden(x_ND)
    expert_NK, weight_NK = sparse.choose(sparse.scores(x_ND, h_NEF))
    value = torch.ones_like(expert_NK, dtype=h_NEF.dtype) if weight_NK is None else weight_NK.to(h_NEF.dtype)
    h_NEF = h_NEF * torch.zeros_like(h_NEF[..., 0]).scatter(1, expert_NK, value).unsqueeze(-1)
    h_NM, w_MO = h_NEF.flatten(1).double(), sparse.out_EFO.flatten(0, 1).double()
    if sparse.out_bias_O is not None:
        y_NO = y_NO - sparse.out_bias_O.double()
    error_NO = y_NO - h_NM @ w_MO
    w_MO = w_MO + _ridge(h_NM, error_NO, ridge)
    sparse.out_EFO.copy_(w_MO.view(sparse.out_EFO.shape))
    scale = y_NO.var()
    return (error_NO.square().mean() / scale).item(), ((y_NO - h_NM @ w_MO).square().mean() / scale).item()


RIDGES = (0.01, 0.1, 1.0, 10.0)


def _ridge(h_NM: torch.Tensor, error_NO: torch.Tensor, ridge: float | None) -> torch.Tensor:
    """The correction of W2 (M, O) that explains the error best, for a given ridge or the best of RIDGES."""

    def solve(gram_MM: torch.Tensor, right_MO: torch.Tensor, ridge: float) -> torch.Tensor:
        pull = ridge * gram_MM.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
        return torch.linalg.solve(gram_MM + pull * torch.eye(len(gram_MM), dtype=gram_MM.dtype), right_MO)

    gram_MM, right_MO = h_NM.t() @ h_NM, h_NM.t() @ error_NO
    if ridge is None:
        held_NM, held_NO = h_NM[::10], error_NO[::10]
        rest = gram_MM - held_NM.t() @ held_NM, right_MO - held_NM.t() @ held_NO
        ridge = min(RIDGES, key=lambda one: (held_NO - held_NM @ solve(*rest, one)).square().sum().item())
    return solve(gram_MM, right_MO, ridge)


def _tell_config(model: nn.Module) -> None:
    """The configuration of a Hugging Face model says what its activation is now."""
    for name in ("hidden_act", "hidden_activation", "activation_function"):
        if isinstance(getattr(model.config, name, None), str):
            setattr(model.config, name, "relu")
    kind = getattr(model.config, "feed_forward_proj", None)
    if isinstance(kind, str):
        model.config.feed_forward_proj = "gated-relu" if kind.startswith("gated") else "relu"
        model.config.dense_act_fn = "relu"

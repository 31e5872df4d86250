"""The models that can be converted: Hugging Face folders and megamf's dense baselines, seen in one way.

Shapes: B batch, T time, V vocabulary.
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from megamf.checkpoint import Checkpoint
from megamf.errors import UserError
from megamf.evaluate.load import load_model
from megamf.model import ModuleFormer

# Endings of class names, and the Auto class that loads them.
HEADS = {
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",
    "ForConditionalGeneration": "AutoModelForSeq2SeqLM",
    "ForMaskedLM": "AutoModelForMaskedLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "Model": "AutoModel",
}


class DenseBaseline(nn.Module):
    """A megamf model behind the interface of a Hugging Face one: input_ids in, `.logits` out."""

    def __init__(self, model: ModuleFormer) -> None:
        super().__init__()
        self.model = model
        text = SimpleNamespace(vocab_size=model.config.vocab_size)
        self.config = SimpleNamespace(is_encoder_decoder=False, get_text_config=lambda: text)

    def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
        """input_ids [B, T] -> logits [B, T, V]."""
        return SimpleNamespace(logits=self.model.logits(self.model(input_ids).hidden_BTD))


def open_model(path: Path | str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A Hugging Face folder (safetensors, a class that transformers has), or a megamf checkpoint of kind dense.

    Raises UserError for anything else: what is there, and what was expected.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"there is no model at {path}")
    if not (path / "config.json").is_file() or _is_checkpoint(path):
        model, config = load_model(path, dtype)
        if config.kind != "dense":
            raise UserError(f"{path} is a model of kind={config.kind}; expected kind=dense, or a Hugging Face folder")
        return DenseBaseline(model).eval()
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        names = config.get("architectures") or []
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path / 'config.json'} cannot be read as a configuration: {error}") from None
    import transformers

    kind = getattr(transformers, names[0], None) if names else None
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise UserError(
            f"{path / 'config.json'} names the architecture {names[0] if names else None!r}; expected a model class of "
            "transformers (code out of a folder is not run)"
        )
    try:
        model = kind.from_pretrained(path, dtype=dtype, use_safetensors=True, local_files_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} cannot be loaded as {names[0]}: {str(error).splitlines()[0]}") from None
    return model.eval()


def _is_checkpoint(path: Path) -> bool:
    try:
        with Checkpoint(path):
            return True
    except (UserError, OSError):
        return False


def auto_class(model: nn.Module) -> str:
    """Name of the Auto class that loads models like this one. Raises UserError where there is none."""
    name = type(model).__name__
    found = next((auto for ending, auto in HEADS.items() if name.endswith(ending)), None)
    if found is None:
        raise UserError(f"no Auto class is known for {name}; known endings: {', '.join(HEADS)}")
    return found


def is_causal(model: nn.Module) -> bool:
    """Whether a model predicts the next token, so that it has a loss on plain text."""
    return isinstance(model, DenseBaseline) or auto_class(model) == "AutoModelForCausalLM"


def outputs(model: nn.Module, ids_BT: torch.Tensor) -> torch.Tensor:
    """Logits, or the last hidden states of a model without a head [B, T, ...].

    An encoder-decoder reads the first half of every row and is fed the second half.
    """
    if model.config.is_encoder_decoder:
        half = ids_BT.shape[1] // 2
        found: Any = model(input_ids=ids_BT[:, :half], decoder_input_ids=ids_BT[:, half:])
    else:
        found = model(input_ids=ids_BT)
    return found.logits if hasattr(found, "logits") else found.last_hidden_state


def next_token_loss(model: nn.Module, ids_BT: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of ids_BT[:, 1:] in nats, differentiable."""
    logits_BTV = outputs(model, ids_BT)[:, :-1]
    return F.cross_entropy(logits_BTV.flatten(0, 1).float(), ids_BT[:, 1:].flatten())


def distance(model: nn.Module, teacher: nn.Module, ids_BT: torch.Tensor) -> torch.Tensor:
    """Mean squared difference of the two models' outputs over the variance of the teacher's, differentiable."""
    with torch.no_grad():
        wanted = outputs(teacher, ids_BT).float()
    return (outputs(model, ids_BT).float() - wanted).square().mean() / wanted.var()


@torch.no_grad()
def mean_over(measure: Any, model: nn.Module, windows_WT: torch.Tensor, batch: int, *rest: Any) -> float:
    """The mean of `measure(model, *rest, ids_BT)` over windows of one length, in evaluation mode."""
    training = model.training
    model.eval()
    try:
        parts = [(measure(model, *rest, ids_BT).item(), len(ids_BT)) for ids_BT in windows_WT.split(batch)]
    finally:
        model.train(training)
    return sum(value * count for value, count in parts) / len(windows_WT)

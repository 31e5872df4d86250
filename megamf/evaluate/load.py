"""A model ready for use from whatever holds its weights."""

from pathlib import Path
from typing import Any

import torch

from megamf.config import ModelConfig
from megamf.data.tokenizer import Tokenizer
from megamf.errors import UserError
from megamf.evaluate.weights import expected_shapes, open_weights
from megamf.model import ModuleFormer

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@torch.no_grad()
def load_model(
    path: Path | str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> tuple[ModuleFormer, ModelConfig]:
    """A megamf checkpoint (step, checkpoints or run directory) or a public-layout folder -> (model, architecture).

    The model is in evaluation mode, its parameters in `dtype` on `device`, filled one tensor at a time. Raises
    UserError where there is no such thing, DamagedCheckpoint or UserError, naming the tensor, where it is not whole.
    """
    with open_weights(path, dtype) as weights:
        weights.check(expected_shapes(weights.model))
        with torch.device("meta"):
            model = ModuleFormer(weights.model)
        model = model.to(dtype).to_empty(device=device)
        for name, parameter in model.named_parameters():
            parameter.copy_(weights.read(name))
    return model.eval(), weights.model


def check_tokenizer(tokenizer: Tokenizer, path: Path | str) -> None:
    """Raise UserError where the tokenizer is not that of the model at `path` (as `load_model` takes it).

    It makes ids that the model does not know, or the checkpoint or folder names the tokenizer it belongs to and this is
    another.
    """
    with open_weights(path) as weights:
        check_vocabulary(tokenizer, weights.model.vocab_size)
        check_recorded(tokenizer, weights.tokenizer, weights.path)


def check_recorded(tokenizer: Tokenizer, recorded: dict[str, Any] | None, where: Path) -> None:
    """Raise UserError where `recorded` (name and sha256, a list) is there and is of another tokenizer."""
    if not recorded or tokenizer.sha256 in recorded["sha256"]:
        return
    raise UserError(
        f"the tokenizer {tokenizer.name} (sha256 {tokenizer.sha256[:12]}) does not belong to {where}, whose own is "
        f"{recorded['name']} (sha256 {', '.join(str(found)[:12] for found in recorded['sha256'])}): give that one"
    )


def check_vocabulary(tokenizer: Tokenizer, model_vocab: int) -> None:
    """Raise UserError, with both sizes, where the tokenizer makes ids that the model does not know."""
    if tokenizer.vocab_size > model_vocab:
        raise UserError(
            f"the tokenizer {tokenizer.name} has {tokenizer.vocab_size} ids, the model's vocabulary {model_vocab}: "
            "this is not the tokenizer that the model was trained with"
        )

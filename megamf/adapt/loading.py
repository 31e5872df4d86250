"""Base models for adaptation: any Hugging Face folder with safetensors, exports of this project among them."""

import json
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import megamf.hf  # noqa: F401  (registers the ModuleFormer classes)
from megamf.adapt.tasks import Task
from megamf.errors import UserError


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The folder's tokenizer. Raises UserError where the folder is none of a Hugging Face model, or has none."""
    _check_folder(folder)
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} has no tokenizer that can be loaded: {_first_line(error)}") from None


def load_base(
    folder: Path, task: Task, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """The model with the head that the task needs: language modelling, or a fresh one with a row for each label (one
    row for regression), drawn from torch's global generator.

    Raises UserError for a folder that cannot be loaded that way, weights in other files than safetensors, or a
    tokenizer with ids outside of the model's vocabulary.
    """
    _check_folder(folder)
    options = {"dtype": dtype, "use_safetensors": True, "local_files_only": True}
    try:
        if task.kind == "generation":
            model = AutoModelForCausalLM.from_pretrained(folder, **options)
        else:
            if task.kind == "classification":
                options["id2label"] = dict(enumerate(task.labels))
                options["label2id"] = {name: index for index, name in enumerate(task.labels)}
            number = len(task.labels) if task.kind == "classification" else 1
            model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=number, **options)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"{folder} cannot be loaded for {task.kind}: {_first_line(error)}") from None
    if task.kind == "generation" and not model.can_generate():
        raise UserError(f"{folder} holds a {model.config.model_type!r}, which does not generate text: name a decoder")
    vocab = model.get_input_embeddings().weight.shape[0]
    if len(task.tokenizer) > vocab:
        raise UserError(
            f"{folder}: the tokenizer has {len(task.tokenizer)} tokens, the model {vocab}: they do not belong"
        )
    model.config.pad_token_id = task.pad_id
    return model.to(device)


def _check_folder(folder: Path) -> None:
    try:
        tree = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        tree = None
    if not isinstance(tree, dict) or "model_type" not in tree:
        raise UserError(
            f"{folder} is not a Hugging Face model folder (config.json with a model_type). A checkpoint of this "
            "project becomes one by `megamf export-hf`"
        )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"

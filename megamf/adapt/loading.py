"""Base models for adaptation: any Hugging Face folder with safetensors, exports of this project among them."""

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

import megamf.hf  # noqa: F401  (registers the ModuleFormer classes)
from megamf.adapt.adamix import head_names
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
    options = {"dtype": dtype, "use_safetensors": True, "local_files_only": True, "output_loading_info": True}
    try:
        if task.kind == "generation":
            model, report = AutoModelForCausalLM.from_pretrained(folder, **options)
        else:
            if task.kind == "classification":
                options["id2label"] = dict(enumerate(task.labels))
                options["label2id"] = {name: index for index, name in enumerate(task.labels)}
            number = len(task.labels) if task.kind == "classification" else 1
            model, report = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=number, **options)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"{folder} cannot be loaded for {task.kind}: {_first_line(error)}") from None
    _check_loaded(folder, task, model, report["missing_keys"])
    vocab = model.get_input_embeddings().weight.shape[0]
    if len(task.tokenizer) > vocab:
        raise UserError(
            f"{folder}: the tokenizer has {len(task.tokenizer)} tokens, the model {vocab}: they do not belong"
        )
    model.config.pad_token_id = task.pad_id
    return model.to(device)


def _check_loaded(folder: Path, task: Task, model: PreTrainedModel, missing: Iterable[str]) -> None:
    """Raise UserError for a model that sees the future, and for frozen tensors with random values."""
    kind = model.config.model_type
    both_ways = kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(model.config, "is_decoder", False)
    if task.kind == "generation" and (both_ways or not model.can_generate()):
        raise UserError(f"{folder} cannot be loaded for generation: a {kind!r} is an encoder; name a decoder")
    head = head_names(model, task.kind)
    random = sorted(name for name in missing if name.split(".")[0] not in head)
    if random:
        raise UserError(
            f"{folder} cannot be loaded for {task.kind}: {len(random)} tensors are not in its files, first "
            f"{random[0]}; they would be random and stay so"
        )


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

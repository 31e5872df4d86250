"""The folder of an adapted model: the merged module, all copies, and what they belong to.

OUT/adapter_config.json, adapter_model.safetensors   LoRA: the average, in PEFT's format; `peft` loads it unchanged
OUT/bottleneck.safetensors                           adapters: the average, and the task head. PEFT has no such
                                                     module: `load_adapted(..., merged=True)` reads it
OUT/copies.safetensors                               all copies and the task head
OUT/adamix.json                                      settings, classes, the base model's fingerprint, results
Full fine-tuning instead writes an ordinary Hugging Face folder, and adamix.json.
"""

import hashlib
import json
import math
import os
import shutil
import uuid
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from megamf.adapt.adamix import AdamixConfig, head_names, pairs_of, prepare, route
from megamf.adapt.mixture import merge, mixtures_in
from megamf.errors import UserError

RECORD = "adamix.json"
COPIES = "copies.safetensors"
BOTTLENECK = "bottleneck.safetensors"


def fingerprint(model: PreTrainedModel, head: list[str]) -> str:
    """SHA-256 of names, shapes and first values of the pretrained tensors: the same in every precision of loading.

    Take it before `prepare`. The task head is left out, as it starts at random.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if name.split(".")[0] in head:
            continue
        values = tensor.flatten()[:64].to(torch.bfloat16).view(torch.int16)
        digest.update(f"{name} {tuple(tensor.shape)} {values.tolist()}\n".encode())
    return digest.hexdigest()


def check_out(out: Path) -> None:
    """Raise UserError where OUT cannot become a new folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists already: name another folder")
    parent = out.absolute().parent
    if not parent.is_dir():
        raise UserError(f"the folder of {out} does not exist")
    if not os.access(parent, os.W_OK):
        raise UserError(f"{parent} cannot be written to")


def save(
    out: Path, model: nn.Module, config: AdamixConfig, task: str, record: dict[str, Any], tokenizer: Any = None
) -> None:
    """Write a prepared (and trained) model's folder; it appears whole or not at all. The model is left as it is."""
    part = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}.part")
    part.mkdir()
    try:
        if config.method == "full":
            model.save_pretrained(part)
            if tokenizer is not None:
                tokenizer.save_pretrained(part)
        else:
            tensors = trained_tensors(model)
            _save_tensors(tensors, part / COPIES)
            if config.method == "lora":
                model.save_pretrained(part, state_dict=averaged(model, model.state_dict()), save_embedding_layers=False)
                (part / "README.md").unlink(missing_ok=True)
            else:
                _save_tensors(averaged(model, tensors), part / BOTTLENECK)
        record = {"adamix": asdict(config), "task": task} | record
        (part / RECORD).write_text(json.dumps(_plain(record), indent=2, allow_nan=False) + "\n", encoding="utf-8")
        if out.exists():
            out.rmdir()
        os.rename(part, out)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def trained_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """All copies and the task head of a prepared model, by their names in its state."""
    state = model.state_dict()
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return {name: state[name] for name in names}


def averaged(model: nn.Module, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`state` with the tensors of every mixture replaced by those of its average, under the name of a plain layer."""
    state = dict(state)
    for _, _, name, mixture in mixtures_in(model):
        for key in [key for key in state if key.startswith(f"{name}.copies.")]:
            del state[key]
        state |= {f"{name}.{key}": tensor for key, tensor in mixture.average().state_dict().items()}
    return state


def _save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, str(path))


def read_record(folder: Path) -> dict[str, Any]:
    """adamix.json of a folder. Raises UserError where it is missing or not one."""
    path = Path(folder) / RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        config = AdamixConfig(**_tuples(record["adamix"]))
        record["task"], record["base"]["fingerprint"], record["labels"]
    except FileNotFoundError:
        raise UserError(f"{folder} holds no {RECORD}: it was not written by `megamf adamix`") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read: {type(error).__name__}: {error}") from None
    if config.method == "full":
        raise UserError(f"{folder} is a whole model from full fine-tuning: give it as MODEL")
    return record | {"config": config}


def load_adapted(model: PreTrainedModel, folder: Path | str, *, merged: bool = False) -> nn.Module:
    """Put saved copies (or their average alone) into the base model that they were trained on.

    Returns what `prepare` returns, with the average chosen. Raises UserError where the folder was written for another
    model (fingerprint of its weights, or shapes), with both names, or where tensors are missing or too many; the
    files of the folder are never changed.
    """
    folder = Path(folder)
    record = read_record(folder)
    config, task, base = record["config"], record["task"], record["base"]
    own = fingerprint(model, head_names(model, task))
    if own != base["fingerprint"]:
        raise UserError(
            f"the adapters in {folder} belong to {base['name']} ({base['model_type']}), whose weights differ from "
            f"those of {model.config.name_or_path or 'the given model'} ({model.config.model_type}): give the model "
            "that they were trained on"
        )
    if merged and config.method == "lora":
        import peft

        return peft.PeftModel.from_pretrained(model, str(folder))
    if merged:
        adapted = prepare(model, replace(config, modules=1, start=None), task)
        merge(adapted)
    else:
        adapted = prepare(model, config, task)
    _fill(adapted, folder / (BOTTLENECK if merged else COPIES))
    route(pairs_of(adapted), "merged")
    return adapted


def _fill(adapted: nn.Module, path: Path) -> None:
    try:
        tensors = load_file(str(path))
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    expected = {name: tuple(tensor.shape) for name, tensor in trained_tensors(adapted).items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if expected != found:
        differing = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        first = differing[0]
        raise UserError(
            f"{path} does not fit: {len(differing)} tensors are missing, too many or of another shape; first {first}: "
            f"{found.get(first, 'missing')} in the file, {expected.get(first, 'none')} expected"
        )
    adapted.load_state_dict(tensors, strict=False)


def _plain(tree: Any) -> Any:
    """The same tree with None for every number that JSON does not know."""
    if isinstance(tree, dict):
        return {name: _plain(value) for name, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_plain(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def _tuples(tree: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in tree.items()}

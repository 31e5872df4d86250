"""Converted models on disk: a Hugging Face folder that needs no megamf, and a megamf checkpoint.

Shapes: E experts, D width, A attention width.
"""

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import nn

from megamf.checkpoint import WEIGHTS, expert_name, full_name, list_steps, module_table, save
from megamf.compress.moefication.convert import sparse_layers
from megamf.compress.moefication.models import DenseBaseline, auto_class
from megamf.config import ModelConfig
from megamf.errors import UserError

MODELLING = '''"""{base} with feed-forward layers split into experts; needs torch and transformers."""

from transformers import {config}, {classes}

from .sparse_ffn import install


class MoefiedConfig({config}):
    model_type = "{model_type}"
'''
CLASS = """

class Moefied{name}({name}):
    config_class = MoefiedConfig

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        install(self, config.moefication)
"""
TOKENIZER = (
    "tokenizer",
    "special_tokens",
    "added_tokens",
    "vocab",
    "merges",
    "spiece",
    "sentencepiece",
    "chat_template",
)


def refuse_existing(out: Path, source: Path | None = None) -> None:
    """Raise UserError where something stands at `out` already, other than an empty folder."""
    if source is not None and source.resolve() in (out.resolve(), *out.resolve().parents):
        raise UserError(f"{out} is inside of the model {source} itself: name another folder")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} exists already: name another folder")


def save_hf(model: nn.Module, about: dict[str, Any], out: Path | str, source: Path | str | None = None) -> Path:
    """Write a converted Hugging Face model as a folder that `from_pretrained(..., trust_remote_code=True)` loads.

    It has a model type of its own, so that nothing loads it as the dense model that it no longer is. Tokenizer files
    are copied from `source`. The folder appears whole or not at all. Raises UserError where `out` exists.
    """
    out = Path(out)
    refuse_existing(out, None if source is None else Path(source))
    part = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}.tmp")
    part.mkdir(parents=True)
    try:
        # The names that the model has in memory: renaming on loading goes by the model type.
        model.save_pretrained(part, save_original_format=False)
        _describe(model, about, part)
        if source is not None:
            for file in sorted(Path(source).iterdir()):
                if file.is_file() and file.name.startswith(TOKENIZER):
                    shutil.copyfile(file, part / file.name)
        if out.exists():
            out.rmdir()
        os.rename(part, out)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return out


def _describe(model: nn.Module, about: dict[str, Any], part: Path) -> None:
    """config.json with the settings and where the classes are, and the Python files."""
    name, config = type(model).__name__, type(model.config).__name__
    base = type(model.base_model).__name__
    classes = {auto_class(model): name}
    if base != name and base.endswith("Model"):
        classes["AutoModel"] = base
    tree = json.loads((part / "config.json").read_text(encoding="utf-8"))
    model_type = f"moefied_{tree['model_type']}"
    tree |= {
        "model_type": model_type,
        "moefication": about,
        "architectures": [f"Moefied{name}"],
        "auto_map": {"AutoConfig": "modeling_moefied.MoefiedConfig"}
        | {auto: f"modeling_moefied.Moefied{kind}" for auto, kind in classes.items()},
    }
    (part / "config.json").write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
    names = sorted(set(classes.values()))
    text = MODELLING.format(base=name, config=config, classes=", ".join(names), model_type=model_type)
    text += "".join(CLASS.format(name=kind) for kind in names)
    (part / "modeling_moefied.py").write_text(text, encoding="utf-8")
    sparse = resources.files("megamf.compress.moefication.portable") / "sparse_ffn.py"
    (part / "sparse_ffn.py").write_text(sparse.read_text(encoding="utf-8"), encoding="utf-8")


def save_checkpoint(model: nn.Module, about: dict[str, Any], out: Path | str, origin: str) -> Path:
    """Write a converted dense baseline as a megamf checkpoint of step 0 below `out`; returns the step directory.

    It is an ordinary ModuleFormer, so that module tools, expert parallelism and export work on it: MLP modules are the
    experts, routed by `gate_type: tanh`; dense attention is one attention expert that every token chooses, with a gate
    of 1. Raises UserError for models that are not megamf's, for routers other than `mlp`, for weighted experts, and
    where `out` exists.
    """
    out = Path(out)
    if not isinstance(model, DenseBaseline):
        raise UserError(
            f"{type(model).__name__} has attention that megamf's model has not: only megamf's dense baselines become "
            "megamf checkpoints; write a Hugging Face folder"
        )
    if about["router"] != "mlp" or about["weighted"]:
        raise UserError(
            f"a megamf checkpoint holds unweighted experts with MLP routers, not router={about['router']} with "
            f"weighted={about['weighted']}"
        )
    refuse_existing(out)
    assert not list_steps(out)
    experts = sparse_layers(model)[0].num_experts
    config = checkpoint_config(model, experts, about["num_selected"], about["expert_size"], about["activation"])
    state = {
        "step": 0,
        "consumed_tokens": 0,
        "origin": {"format": "MoEfication of a dense baseline", "name": origin},
        "moefication": about,
        "losses": {"balance": "none", "balance_weight": 0.0},
    }
    table = module_table(config.n_layer, config.n_att_experts, config.n_mlp_experts)
    return save(out, 0, _stored(model), state, table, config.model_dump(mode="json"), run_id=uuid.uuid4().hex)


def checkpoint_config(
    model: DenseBaseline, experts: int, selected: int, expert_size: int, activation: str = "relu"
) -> ModelConfig:
    """The ModuleFormer that a converted dense baseline is. Raises UserError where there is none."""
    dense = model.model.config
    if dense.att_hidden == dense.n_embd and dense.n_head == 1:
        raise UserError(
            "a ModuleFormer with one head as wide as the model has K = V = x, and no place for the key and value "
            "projections of this dense baseline (n_head=1): it cannot become a megamf checkpoint"
        )
    tree = dense.model_dump(mode="json", exclude_unset=True) | {
        "kind": "moduleformer",
        "n_att_experts": 1,
        "k_att": 1,
        "n_mlp_experts": experts,
        "k_mlp": selected,
        "ffd_hidden": expert_size,
        "gate_type": "tanh",
        "gating_size": experts,
        "activation_function": activation,
    }
    return ModelConfig.model_validate(tree)


def moduleformer_tensors(model: DenseBaseline) -> dict[str, torch.Tensor]:
    """The state dict of the ModuleFormer that a converted dense baseline is, by the public names."""
    tensors: dict[str, torch.Tensor] = {}
    experts = sparse_layers(model)[0].num_experts
    for name, value in model.model.state_dict().items():
        head, _, tail = name.rpartition(".attn.")
        if head and tail == "q_proj.weight":
            tensors[f"{head}.attn.q_proj.experts.weight"] = value.t().unsqueeze(0)
            # One expert is chosen with gate 1 whatever its score is.
            tensors[f"{head}.attn.q_proj.gate.w_gate.0.weight"] = value.new_zeros(experts, value.shape[1])
            tensors[f"{head}.attn.q_proj.gate.w_gate.2.weight"] = value.new_zeros(1, experts)
        elif head and tail == "o_proj.weight":
            tensors[f"{head}.attn.q_proj.output_experts.weight"] = value.t().unsqueeze(0)
        elif ".mlpf." in name:
            head, _, tail = name.rpartition(".mlpf.fc1.")
            new = {
                "gate_EDF": "experts.weight", "out_EFO": "output_experts.weight",
                "router.0.weight": "gate.w_gate.0.weight", "router.2.weight": "gate.w_gate.2.weight",
            }  # fmt: skip
            tensors[f"{head}.mlpf.{new[tail]}"] = value
        else:
            tensors[name] = value
    return tensors


def _stored(model: DenseBaseline) -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in moduleformer_tensors(model).items():
        if value.dim() == 3:
            for expert, weight in enumerate(value):
                yield full_name(expert_name(name, expert), WEIGHTS), weight.contiguous()
        else:
            yield full_name(name, WEIGHTS), value.contiguous()

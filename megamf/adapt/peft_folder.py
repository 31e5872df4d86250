"""The adapters of a checkpoint as a folder that `peft.PeftModel.from_pretrained` loads onto the exported base model.

Shapes: E experts, D input width, F output width, r rank.
PEFT keeps the pairs of stacked experts as two matrices, for a weight [E, D, F]: `lora_A` [E r, F], row e r + j, and
`lora_B` [D, r E], column j E + e. Its product for expert e is B_e A_e of [D, r] and [r, F]: what is called B there is
A here, and the other way round. (`peft.tuners.lora.layer.ParamWrapper` of PEFT 0.21.)
"""

import json
import shutil
import uuid
from pathlib import Path

import torch
from safetensors.torch import save_file

from megamf.adapt.fold import adapters_of
from megamf.adapt.lora import NAMES, Target, targets
from megamf.checkpoint import MASTER, WEIGHTS, Checkpoint, expert_name
from megamf.config import ModelConfig
from megamf.errors import UserError
from megamf.hf import gpt_neox

PREFIX = "base_model.model."


def export_adapters(
    checkpoint: Path | str, out: Path | str, *, base: str | None = None, dtype: torch.dtype | None = None
) -> Path:
    """Write adapter_config.json and adapter_model.safetensors; the folder appears whole or not at all.

    base: where the base model in the public layout is, or will be, noted in the configuration. dtype: of the adapters
    (default: of the best precision they have). Returns `out`. Raises UserError where the checkpoint has no adapters,
    where embeddings were trained too (an adapter cannot hold them), for a dense baseline without a public layout
    (kind=dense), and for a folder that exists.
    """
    out = Path(out)
    with Checkpoint(checkpoint) as source:
        adapters = adapters_of(source)
        if adapters is None:
            raise UserError(f"{source.path} has no adapters; what it holds is exported by megamf export-hf")
        model = ModelConfig.model_validate(source.model)
        if model.kind == "dense":
            raise UserError(f"{source.path} is a dense baseline (kind=dense): it has no Hugging Face layout to adapt")
        if adapters.tune.embeddings:
            raise UserError(
                f"{source.path} was trained with tune.embeddings=true: its embeddings are no adapters; export the "
                "whole model (megamf export-hf folds adapters in)"
            )
        if out.exists():
            raise UserError(f"{out} exists already: name another folder")
        found = list(targets(model, adapters.tune.lora_targets))
        tensors = {}
        for target in found:
            pair = [_whole(source, f"{target.prefix}.{name}", target) for name in NAMES]
            a, b = pair if target.num_experts is None else _as_peft(*pair)
            for name, value in zip(NAMES, (a, b)):
                tensors[f"{PREFIX}{_public(model, target)}.{name}.weight"] = value.to(dtype or value.dtype).contiguous()
        settings = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "inference_mode": True,
            "r": adapters.tune.lora_rank,
            "lora_alpha": adapters.tune.lora_alpha,
            "lora_dropout": 0.0,
            "bias": "none",
            "target_modules": [_public(model, target) for target in found if target.num_experts is None],
            "target_parameters": [
                f"{_public(model, target)}.weight" for target in found if target.num_experts is not None
            ],
        }
    part = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}.tmp")
    part.mkdir(parents=True)
    try:
        save_file(tensors, part / "adapter_model.safetensors", metadata={"format": "pt"})
        (part / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        part.rename(out)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return out


def _public(model: ModelConfig, target: Target) -> str:
    """The adapted layer in the exported base model."""
    if model.sparse:
        return target.prefix
    return gpt_neox.public_name(f"{target.prefix}.weight").removesuffix(".weight")


def _whole(source: Checkpoint, key: str, target: Target) -> torch.Tensor:
    stored = key if target.num_experts is None else expert_name(key, 0)
    return source.full(key, MASTER if source.has(stored, MASTER) else WEIGHTS)


def _as_peft(a_EDr: torch.Tensor, b_ErF: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """PEFT's `lora_A` and `lora_B` of stacked experts."""
    return b_ErF.flatten(0, 1), a_EDr.permute(1, 2, 0).flatten(1)

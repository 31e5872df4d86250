"""A small logical model with experts, under its names in a checkpoint."""

import torch
from torch import Tensor

from megamf.checkpoint import module_table

NUM_LAYERS, NUM_ATTENTION, NUM_MLP = 2, 2, 3
MODULES = module_table(NUM_LAYERS, NUM_ATTENTION, NUM_MLP)


def logical_model(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """State_dict key -> tensor of the whole model."""
    rng = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64).to(dtype)

    model = {"transformer.wte.weight": draw(11, 4), "lm_head.weight": draw(11, 4)}
    for layer in range(NUM_LAYERS):
        prefix = f"transformer.h.{layer}"
        model[f"{prefix}.ln_1.bias"] = draw(4)
        model[f"{prefix}.attn.q_proj.experts.weight"] = draw(NUM_ATTENTION, 4, 6)
        model[f"{prefix}.attn.q_proj.output_experts.weight"] = draw(NUM_ATTENTION, 6, 4)
        model[f"{prefix}.mlpf.experts.weight"] = draw(NUM_MLP, 4, 5)
        model[f"{prefix}.mlpf.output_experts.weight"] = draw(NUM_MLP, 5, 4)
    return model


def stored(model: dict[str, Tensor], group: str) -> dict[str, Tensor]:
    """The same tensors under their names in a checkpoint, experts one by one."""
    out = {}
    for key, tensor in model.items():
        if key.endswith("experts.weight"):
            out.update({f"{group}/{key}.{index}": part for index, part in enumerate(tensor)})
        else:
            out[f"{group}/{key}"] = tensor
    return out


def training_state(seed: int = 0) -> dict[str, Tensor]:
    """bf16 weights, float32 masters and moments, under their names in a checkpoint."""
    out = stored(logical_model(seed, torch.bfloat16), "weights")
    for offset, group in enumerate(("master", "exp_avg", "exp_avg_sq"), start=1):
        out |= stored(logical_model(seed + offset), group)
    return out

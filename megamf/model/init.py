"""Initial weights, the same for every layout: each tensor (each expert of it) has a generator of its own.

Source: the released code. Linear and embedding N(0, initializer_range), biases 0, norms 1 and 0, expert tensors
U(-1/d_in, 1/d_in), centroids N(0, 1), temperature 0; no scaling with depth.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import nn

from megamf.config import ModelConfig
from megamf.model.experts import ExpertLinear, RoutedExperts


@torch.no_grad()
def initialise(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Fill every parameter in place from (seed, its name, its expert). Independent of ranks and of device."""
    experts = expert_indices(model)
    for name, parameter in model.named_parameters():
        parameter.copy_(initial_value(name, parameter.shape, config, seed, experts.get(name)))


def initial_value(
    name: str, shape: Sequence[int], config: ModelConfig, seed: int, experts: range | None = None
) -> torch.Tensor:
    """What `initialise` fills one parameter with, float32 on the CPU; `experts` for an expert tensor of this share."""
    if experts is not None:
        value_LDF = torch.zeros(shape)
        for local, expert in enumerate(experts):
            value_LDF[local].uniform_(-1.0 / shape[1], 1.0 / shape[1], generator=generator(seed, f"{name}.{expert}"))
        return value_LDF
    if name.endswith("expert_centroids"):
        return _normal(shape, 1.0, seed, name)
    if ".ln_" in name and name.endswith("weight"):
        return torch.ones(shape)
    if name.endswith(("bias", "temperature")):
        return torch.zeros(shape)
    return _normal(shape, config.initializer_range, seed, name)


def expert_indices(model: nn.Module) -> dict[str, range]:
    """Name of every expert tensor -> the global indices of the experts that it holds."""
    found = {}
    for prefix, module in model.named_modules():
        if isinstance(module, RoutedExperts):
            for child, layer in module.named_children():
                if isinstance(layer, ExpertLinear):
                    found[f"{prefix}.{child}.weight"] = module.local_experts
                    if layer.adapter is not None:
                        for name, _ in layer.adapter.named_parameters():
                            found[f"{prefix}.{child}.adapter.{name}"] = module.local_experts
                    if layer.inserted is not None:
                        found[f"{prefix}.{child}.weight"] = module.local_experts[: layer.weight.shape[0]]
                        found[f"{prefix}.{child}.inserted"] = module.local_experts[layer.weight.shape[0] :]
    return found


def generator(seed: int, name: str) -> torch.Generator:
    """A generator of its own for everything that has a name."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def _normal(shape: Sequence[int], std: float, seed: int, name: str) -> torch.Tensor:
    return torch.empty(shape).normal_(0.0, std, generator=generator(seed, name))

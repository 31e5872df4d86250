"""Initial weights, the same for every layout: each tensor (each expert of it) has a generator of its own.

Source: the released code. Linear and embedding N(0, initializer_range), biases 0, norms 1 and 0, expert tensors
U(-1/d_in, 1/d_in), centroids N(0, 1), temperature 0; no scaling with depth.
"""

import hashlib

import torch
from torch import nn

from megamf.config import ModelConfig
from megamf.model.experts import ExpertLinear, RoutedExperts


@torch.no_grad()
def initialise(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Fill every parameter in place from (seed, its name, its expert). Independent of ranks and of device."""
    experts = expert_indices(model)
    for name, parameter in model.named_parameters():
        if name in experts:
            bound = 1.0 / parameter.shape[1]
            for local, expert in enumerate(experts[name]):
                parameter[local].copy_(_uniform(parameter[local], bound, seed, f"{name}.{expert}"))
        elif name.endswith("expert_centroids"):
            parameter.copy_(_normal(parameter, 1.0, seed, name))
        elif ".ln_" in name and name.endswith("weight"):
            parameter.fill_(1.0)
        elif name.endswith(("bias", "temperature")):
            parameter.zero_()
        else:
            parameter.copy_(_normal(parameter, config.initializer_range, seed, name))


def expert_indices(model: nn.Module) -> dict[str, range]:
    """Name of every expert tensor -> the global indices of the experts that it holds."""
    found = {}
    for prefix, module in model.named_modules():
        if isinstance(module, RoutedExperts):
            for child, layer in module.named_children():
                if isinstance(layer, ExpertLinear):
                    found[f"{prefix}.{child}.weight"] = module.local_experts
    return found


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def _normal(like: torch.Tensor, std: float, seed: int, name: str) -> torch.Tensor:
    return torch.empty(like.shape).normal_(0.0, std, generator=_generator(seed, name))


def _uniform(like: torch.Tensor, bound: float, seed: int, name: str) -> torch.Tensor:
    return torch.empty(like.shape).uniform_(-bound, bound, generator=_generator(seed, name))

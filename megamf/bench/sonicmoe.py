"""The expert layer of SonicMoE (package sonic-moe, arXiv 2512.14080), to measure beside ours where it is installed.

Its grouped GEMM takes gated activations only: three matrices an expert instead of two. The same FLOPs are then spent at
two thirds of the hidden width, rounded to whole tiles.
"""

from importlib import import_module
from importlib.util import find_spec

import torch
from torch import nn

from megamf.config import ModelConfig

TILE = 64
WIDTH_RULE = f"SwiGLU of 2/3 of the hidden width in tiles of {TILE} (about the same FLOPs)"
HOW = (
    "needs the package sonicmoe, which is missing: install it with `pip install sonic-moe` (Python 3.12, a Hopper or "
    "Blackwell GPU; add --no-deps for a torch newer than the one it pins, and nvidia-cutlass-dsl and quack-kernels)"
)


def layer(
    config: ModelConfig, device: str, dtype: torch.dtype, x_BTD: torch.Tensor
) -> tuple[nn.Module, str] | tuple[None, str]:
    """(the layer for the MLP experts of `config`, ""), or (None, why it cannot be measured here).

    It is tried on x_BTD, forward and backward: what it raises here must not end a suite that measures other things.
    """
    if find_spec("sonicmoe") is None:
        return None, HOW
    try:
        package, enums = import_module("sonicmoe"), import_module("sonicmoe.enums")
        made = package.MoE(
            num_experts=config.n_mlp_experts,
            num_experts_per_tok=config.k_mlp,
            hidden_size=config.n_embd,
            intermediate_size=width(config.ffd_hidden),
            activation_function=enums.ActivationType.SWIGLU,
            add_bias=False,
            std=0.02,
        ).to(device=device, dtype=dtype)
        y_BTD, _ = made(x_BTD)
        torch.autograd.grad(y_BTD, (x_BTD, *made.parameters()), torch.ones_like(y_BTD))
    except Exception as error:
        return None, f"sonicmoe does not run here: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return made, ""


def width(hidden: int) -> int:
    """Hidden width of a gated expert with the FLOPs of a plain one of `hidden`, a multiple of TILE."""
    return max(1, round(2 * hidden / 3 / TILE)) * TILE

"""Inputs on which a stick lasts as long as one asks for.

Shapes: B batch, H heads, T time, C head channels.
"""

import math

import torch


def sticks(
    B: int, H: int, T: int, C: int, tokens: float, *, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v (standard normal but for one channel), for which a key leaves exp(-1 / tokens) of a stick on average.

    With the default scale the logits are about normal, of deviation 1, around `bias_for(tokens)`, which the first
    channels of q and k add: attention over some `tokens` newest keys, as in a trained model.
    """
    q, k, v = (torch.randn(B, H, T, C, device=device, dtype=dtype) for _ in range(3))
    q[..., 0], k[..., 0] = bias_for(tokens), math.sqrt(C)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


def bias_for(tokens: float) -> float:
    """The mean of normal logits of deviation 1 for which log(1 - sigmoid) is -1 / tokens on average (bisection)."""
    x = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    weight = torch.exp(-x * x / 2) / torch.exp(-x * x / 2).sum()
    low, high = -60.0, 60.0
    for _ in range(60):
        middle = (low + high) / 2
        lost = float((weight * torch.nn.functional.softplus(x + middle)).sum())
        low, high = (middle, high) if lost < 1 / tokens else (low, middle)
    return low

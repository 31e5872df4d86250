"""Glue around the Triton kernels of `megamf.kernels.router`: operators, fake (shape) kernels, and autograd.

Importing this module needs the package triton. Shapes as in the kernels' module.
"""

from typing import Any

import torch

from megamf.kernels.router import route_backward, route_forward


@torch.library.custom_op("megamf::route", mutates_args=())
def route(
    h: torch.Tensor, a: torch.Tensor, top_k: int
) -> tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor
]:
    """The fields of `Decision`, then logits_NE and logsumexp_N, which the backward pass needs (no gradient)."""
    return route_forward(h.contiguous(), a.contiguous(), top_k)


@route.register_fake
def _route_fake(h, a, top_k):
    N, E = h.shape[0], a.shape[0]
    shapes = ((N, top_k), (E,), (), (), (E,), (N, E), (N,))
    return h.new_empty(N, top_k, dtype=torch.int64), *(h.new_empty(shape, dtype=torch.float32) for shape in shapes)


@torch.library.custom_op("megamf::route_backward", mutates_args=())
def backward(
    grad_gate: torch.Tensor,
    grad_prob: torch.Tensor,
    grad_entropy: torch.Tensor,
    grad_lse2: torch.Tensor,
    h: torch.Tensor,
    a: torch.Tensor,
    expert: torch.Tensor,
    logits: torch.Tensor,
    lse: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(grad_h, grad_a)."""
    tensors = (grad_gate, grad_prob, grad_entropy, grad_lse2, h, a, expert, logits, lse)
    return route_backward(*(tensor.contiguous() for tensor in tensors))


@backward.register_fake
def _backward_fake(grad_gate, grad_prob, grad_entropy, grad_lse2, h, a, expert, logits, lse):
    return h.new_empty(h.shape), a.new_empty(a.shape)


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    h, a, _ = inputs
    expert, _, _, _, _, count, logits, lse = output
    ctx.mark_non_differentiable(expert, count, logits, lse)
    ctx.save_for_backward(h, a, expert, logits, lse)


def _grad(ctx: Any, _expert, gate, prob, entropy, lse2, *_rest) -> tuple:
    return *backward(gate, prob, entropy, lse2, *ctx.saved_tensors), None


route.register_autograd(_grad, setup_context=_setup)

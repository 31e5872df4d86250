"""Glue around the compiled permutation kernels: fake (shape) kernels for tracing, and autograd.

Importing this module needs `megamf._C`. Shapes as in naive.py.
"""

from typing import Any

import torch

from megamf.ops import backend

assert backend.has_extension(), "import this module only when the extension is there"

sort_by_expert = torch.ops.megamf.sort_by_expert
permute = torch.ops.megamf.permute
unpermute = torch.ops.megamf.unpermute
unpermute_backward = torch.ops.megamf.unpermute_backward


@torch.library.register_fake("megamf::sort_by_expert")
def _sort_fake(expert, num_experts):
    R = expert.numel()
    return expert.new_empty(R), expert.new_empty(R), expert.new_empty(num_experts)


@torch.library.register_fake("megamf::permute")
def _permute_fake(x, order, inverse, top_k):
    return x.new_empty(order.shape[0], x.shape[1])


@torch.library.register_fake("megamf::unpermute")
def _unpermute_fake(y, order, inverse, gate, top_k):
    return y.new_empty(y.shape[0] // top_k, y.shape[1])


@torch.library.register_fake("megamf::unpermute_backward")
def _unpermute_backward_fake(grad, y, order, gate):
    return y.new_empty(y.shape), gate.new_empty(gate.shape)


def _permute_setup(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    _, order, inverse, ctx.top_k = inputs
    ctx.save_for_backward(order, inverse)


def _permute_grad(ctx: Any, grad: torch.Tensor) -> tuple:
    order, inverse = ctx.saved_tensors
    return unpermute(grad, order, inverse, None, ctx.top_k), None, None, None


def _unpermute_setup(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    y, order, inverse, gate, ctx.top_k = inputs
    ctx.save_for_backward(y, order, inverse, gate)


def _unpermute_grad(ctx: Any, grad: torch.Tensor) -> tuple:
    y, order, inverse, gate = ctx.saved_tensors
    if gate is None:
        return permute(grad, order, inverse, ctx.top_k), None, None, None, None
    grad_y, grad_gate = unpermute_backward(grad, y, order, gate)
    return grad_y, None, None, grad_gate, None


torch.library.register_autograd("megamf::permute", _permute_grad, setup_context=_permute_setup)
torch.library.register_autograd("megamf::unpermute", _unpermute_grad, setup_context=_unpermute_setup)

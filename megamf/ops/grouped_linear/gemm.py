"""torch's grouped GEMM as an operator of our own, which can be traced in every dtype (torch's only in bfloat16).

On a CPU torch's is a loop over the experts in which all threads wait for each other after every product. Where
`megamf._C` is built, its threads take torch's matrix products block by block instead: as fast on an idle machine, up to
twice as fast on a busy one and with many small experts.

Shapes: `R` rows grouped by expert, `L` local experts, `D` input width, `F` output width.
"""

from typing import Any

import torch
from torch.nn import functional

from megamf.ops import backend

if backend.has_extension():

    @torch.library.register_fake("megamf::expert_products")
    def _products_fake(x, w, count):
        return x.new_empty(x.shape[0], w.shape[2])

    @torch.library.register_fake("megamf::expert_outer_products")
    def _outer_products_fake(x, grad, count):
        return x.new_empty(count.shape[0], x.shape[1], grad.shape[1])


@torch.library.custom_op("megamf::grouped_linear", mutates_args=())
def grouped_linear(x: torch.Tensor, w: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """y_RF."""
    if x.device.type == "cpu" and backend.has_extension():
        return torch.ops.megamf.expert_products(x, w, count)
    return functional.grouped_mm(x.contiguous(), w, offs=_ends(count))


@grouped_linear.register_fake
def _grouped_linear_fake(x, w, count):
    return x.new_empty(x.shape[0], w.shape[2])


@torch.library.custom_op("megamf::grouped_linear_grad_w", mutates_args=())
def grad_w(x: torch.Tensor, grad: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """dw_LDF: x^T grad over the rows of each expert."""
    if x.device.type == "cpu" and backend.has_extension():
        return torch.ops.megamf.expert_outer_products(x, grad, count)
    return functional.grouped_mm(x.contiguous().t(), grad.contiguous(), offs=_ends(count))


@grad_w.register_fake
def _grad_w_fake(x, grad, count):
    return x.new_empty(count.shape[0], x.shape[1], grad.shape[1])


def _setup(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _grad(ctx: Any, grad: torch.Tensor) -> tuple:
    x, w, count = ctx.saved_tensors
    need_x, need_w, _ = ctx.needs_input_grad
    return grouped_linear(grad, w.mT, count) if need_x else None, grad_w(x, grad, count) if need_w else None, None


grouped_linear.register_autograd(_grad, setup_context=_setup)


def _ends(count: torch.Tensor) -> torch.Tensor:
    return count.cumsum(0).to(torch.int32)

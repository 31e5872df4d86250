"""Glue around the Triton kernels of `megamf.kernels.grouped_linear`: operators, fake (shape) kernels, and autograd.

Importing this module needs the package triton. Shapes and fans as in the kernels' module.
"""

from typing import Any

import torch

from megamf.kernels.grouped_linear import rows_times_experts, rows_to_weights


@torch.library.custom_op("megamf::routed_linear", mutates_args=())
def routed_linear(
    x: torch.Tensor,
    w: torch.Tensor,
    count: torch.Tensor,
    order: torch.Tensor | None,
    gate: torch.Tensor | None,
    in_fan: int,
    out_fan: int,
) -> torch.Tensor:
    """y in the layout of out_fan; gate_NK scales each copy before the copies of a token are added up."""
    y, _ = rows_times_experts(
        x.contiguous(),
        w,
        count,
        order_R=order,
        gate_R=None if gate is None else gate.contiguous(),
        num_rows=_num_rows(x, order),
        in_fan=in_fan,
        out_fan=min(out_fan, 1),
    )
    return _sum_copies(y, out_fan)


@routed_linear.register_fake
def _routed_linear_fake(x, w, count, order, gate, in_fan, out_fan):
    return x.new_empty(_num_rows(x, order) // max(out_fan, 1), w.shape[2])


@torch.library.custom_op("megamf::routed_linear_grad_x", mutates_args=())
def routed_linear_grad_x(
    grad: torch.Tensor,
    x: torch.Tensor,
    w: torch.Tensor,
    count: torch.Tensor,
    order: torch.Tensor | None,
    gate: torch.Tensor | None,
    in_fan: int,
    out_fan: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dx, dgate): the product with the transposed weights, the two fans exchanged. dgate is empty without a gate.

    The gate's gradient <grad, x @ w> is taken as <grad @ w^T, x> from the same product, so that y is never kept.
    """
    dx, dots = rows_times_experts(
        grad.contiguous(),
        w.mT,
        count,
        order_R=order,
        gate_R=None if gate is None else gate.contiguous(),
        match=None if gate is None else x.contiguous(),
        num_rows=_num_rows(x, order),
        in_fan=out_fan,
        out_fan=min(in_fan, 1),
        match_fan=in_fan,
    )
    dgate = x.new_empty(0) if gate is None or dots is None else dots.view_as(gate).to(gate.dtype)
    return _sum_copies(dx, in_fan), dgate


@routed_linear_grad_x.register_fake
def _routed_linear_grad_x_fake(grad, x, w, count, order, gate, in_fan, out_fan):
    return torch.empty_like(x, memory_format=torch.contiguous_format), (
        x.new_empty(0) if gate is None else torch.empty_like(gate, memory_format=torch.contiguous_format)
    )


@torch.library.custom_op("megamf::routed_linear_grad_w", mutates_args=())
def routed_linear_grad_w(
    grad: torch.Tensor,
    x: torch.Tensor,
    count: torch.Tensor,
    order: torch.Tensor | None,
    gate: torch.Tensor | None,
    in_fan: int,
    out_fan: int,
) -> torch.Tensor:
    """dw_LDF."""
    return rows_to_weights(
        x.contiguous(),
        grad.contiguous(),
        count,
        order_R=order,
        gate_R=None if gate is None else gate.contiguous(),
        x_fan=in_fan,
        g_fan=out_fan,
    )


@routed_linear_grad_w.register_fake
def _routed_linear_grad_w_fake(grad, x, count, order, gate, in_fan, out_fan):
    return x.new_empty(count.shape[0], x.shape[1], grad.shape[1])


def _setup(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    x, w, count, order, gate, ctx.in_fan, ctx.out_fan = inputs
    ctx.save_for_backward(x, w, count, order, gate)


def _grad(ctx: Any, grad: torch.Tensor) -> tuple:
    x, w, count, order, gate = ctx.saved_tensors
    need_x, need_w, _, _, need_gate, *_ = ctx.needs_input_grad
    dx = dgate = dw = None
    if need_x or need_gate:
        dx, dgate = routed_linear_grad_x(grad, x, w, count, order, gate, ctx.in_fan, ctx.out_fan)
    if need_w:
        dw = routed_linear_grad_w(grad, x, count, order, gate, ctx.in_fan, ctx.out_fan)
    return dx, dw, None, None, dgate if need_gate else None, None, None


routed_linear.register_autograd(_grad, setup_context=_setup)


def _num_rows(x: torch.Tensor, order: torch.Tensor | None) -> int:
    return x.shape[0] if order is None else order.shape[0]


def _sum_copies(y: torch.Tensor, fan: int) -> torch.Tensor:
    """Copies of a token added up; torch adds low precisions in float32."""
    return y if fan <= 1 else y.view(-1, fan, y.shape[1]).sum(1)

"""Glue around the compiled stick-breaking kernels: fake (shape) kernels for tracing, and autograd.

Importing this module needs `megamf._C`. Shapes as in naive.py.
"""

from typing import Any

import torch

from megamf.ops import backend

assert backend.has_extension(), "import this module only when the extension is there"

attention = torch.ops.megamf.stickbreaking_attention
attention_rest = torch.ops.megamf.stickbreaking_attention_rest
attention_backward = torch.ops.megamf.stickbreaking_attention_backward
decode = torch.ops.megamf.stickbreaking_decode
scan = torch.ops.megamf.stickbreaking_scan
scan_backward = torch.ops.megamf.stickbreaking_scan_backward


@torch.library.register_fake("megamf::stickbreaking_attention")
def _attention_fake(q, k, v, start_BT, key_mask_BS, scale, stop, causal=True):
    return torch.empty_like(q)


@torch.library.register_fake("megamf::stickbreaking_attention_rest")
def _attention_rest_fake(q, k, v, start_BT, key_mask_BS, scale, stop, causal=True):
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))


@torch.library.register_fake("megamf::stickbreaking_attention_backward")
def _attention_backward_fake(grad_o, q, k, v, start_BT, key_mask_BS, scale, stop, grad_log_rem_BHT=None, causal=True):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


@torch.library.register_fake("megamf::stickbreaking_decode")
def _decode_fake(q, k, v, start_B, key_mask_BS, scale, stop):
    return torch.empty_like(q)


@torch.library.register_fake("megamf::stickbreaking_scan")
def _scan_fake(logits, start):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@torch.library.register_fake("megamf::stickbreaking_scan_backward")
def _scan_backward_fake(grad, logits, start):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _attention_setup(ctx: Any, inputs: tuple, output: Any) -> None:
    q, k, v, start_BT, key_mask_BS, ctx.scale, ctx.stop, ctx.causal = inputs
    ctx.save_for_backward(q, k, v, start_BT, key_mask_BS)


def _attention_grad(ctx: Any, grad_o: torch.Tensor, grad_log_rem: torch.Tensor | None = None) -> tuple:
    grads = attention_backward(grad_o, *ctx.saved_tensors, ctx.scale, ctx.stop, grad_log_rem, ctx.causal)
    return (*grads, None, None, None, None, None)


def _scan_setup(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _scan_grad(ctx: Any, grad: torch.Tensor) -> tuple:
    logits, start = ctx.saved_tensors
    return scan_backward(grad, logits, start), None


torch.library.register_autograd("megamf::stickbreaking_attention", _attention_grad, setup_context=_attention_setup)
torch.library.register_autograd("megamf::stickbreaking_attention_rest", _attention_grad, setup_context=_attention_setup)
torch.library.register_autograd("megamf::stickbreaking_scan", _scan_grad, setup_context=_scan_setup)

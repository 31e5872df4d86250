"""Routing decisions: gate product, softmax, top-k, and the sums that the balance losses need.

Shapes: `N` tokens, `G` router width, `E` experts, `K` top-k.
Source: the released ModuleFormer's gate. Softmax over all experts, then top-k; gates are not renormalised.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from megamf.ops import backend as backends
from megamf.ops.router import naive
from megamf.ops.router.naive import promote

if not backends.package_problem("triton"):
    from megamf.ops.router import triton

__all__ = ["Decision", "promote", "route", "route_by_logits"]

IMPLEMENTATIONS = {"torch": frozenset[str](), "triton": backends.TRITON_DEVICES}
# One program holds the logits of a block of tokens for all experts.
MOST_EXPERTS = 128
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Decision(NamedTuple):
    """expert_NK int64; the rest float32 (float64 for float64 inputs), sums are over the N tokens.

    gate_NK: raw probabilities of the chosen experts. prob_E: sum of p. entropy: sum of -p log p. logsumexp2: sum of the
    squared logsumexp of the logits. count_E: how often each expert was chosen (no gradient).
    """

    expert_NK: torch.Tensor
    gate_NK: torch.Tensor
    prob_E: torch.Tensor
    entropy: torch.Tensor
    logsumexp2: torch.Tensor
    count_E: torch.Tensor


def route(h_NG: torch.Tensor, a_EG: torch.Tensor, top_k: int, *, backend: str = "auto") -> Decision:
    """The top_k likeliest of E experts for every token, from logits h_NG a_EG^T; differentiable in h and a.

    h_NG, a_EG: floating, one dtype; lower precisions are multiplied as they are and summed in float32.
    backend: "torch" is `naive.py`. "triton" makes everything in one pass over h, sums per block of tokens and then over
    blocks (deterministic): bfloat16, float16 or float32 and at most 128 experts. "auto" is "triton" on a GPU where it
    takes the operands, "torch" elsewhere.

    Raises ValueError for shapes or types that do not fit, UserError for a backend that cannot run.
    """
    E = a_EG.shape[0]
    if h_NG.dim() != 2 or a_EG.dim() != 2 or h_NG.shape[1] != a_EG.shape[1] or h_NG.dtype != a_EG.dtype:
        raise ValueError(
            f"route: got h {h_NG.dtype} {tuple(h_NG.shape)} and a {a_EG.dtype} {tuple(a_EG.shape)}, expected [N, G] "
            "and [E, G] of one dtype"
        )
    if not 1 <= top_k <= E:
        raise ValueError(f"route: got top_k {top_k}, expected 1 to {E}, the number of experts")
    takes = E <= MOST_EXPERTS and h_NG.dtype in DTYPES
    fast = h_NG.device.type == "cuda" and takes and not backends.package_problem("triton")
    name = backends.choose("route", backend, h_NG.device, IMPLEMENTATIONS, "triton" if fast else "torch")
    if name == "torch":
        return Decision(*naive.route(h_NG, a_EG, top_k))
    if not takes:
        raise ValueError(
            f"route: backend 'triton' got {h_NG.dtype} and {E} experts, expected one of "
            f"{', '.join(map(str, DTYPES))} and at most {MOST_EXPERTS}"
        )
    expert_NK, gate_NK, prob_E, entropy, logsumexp2, count_E, _, _ = triton.route(h_NG, a_EG, top_k)
    return Decision(expert_NK, gate_NK, prob_E, entropy, logsumexp2, count_E)


def route_by_logits(logits_NE: torch.Tensor, choose: Callable[[torch.Tensor], torch.Tensor]) -> Decision:
    """The same sums from given logits (float32 or float64); `choose` picks expert_NK (int64) from prob_NE."""
    return Decision(*naive.decide(logits_NE, choose))

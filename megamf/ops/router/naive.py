"""Which experts serve a token, the specification: plain torch, any floating dtype, autograd by torch.

Shapes: `N` tokens, `G` router width, `E` experts, `K` top-k.
"""

from collections.abc import Callable

import torch


def route(h_NG: torch.Tensor, a_EG: torch.Tensor, top_k: int) -> tuple[torch.Tensor, ...]:
    """(expert_NK, gate_NK, prob_E, entropy, logsumexp2, count_E) of logits h a^T; the k likeliest experts."""
    # Rounding the logits to a low precision would reorder experts whose scores are close.
    return decide(promote(h_NG) @ promote(a_EG).t(), lambda prob_NE: prob_NE.topk(top_k, dim=-1).indices)


def decide(logits_NE: torch.Tensor, choose: Callable[[torch.Tensor], torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The same from logits (float32 or float64), where `choose` picks expert_NK from prob_NE."""
    log_prob_NE = logits_NE.log_softmax(dim=-1)
    prob_NE = log_prob_NE.exp()
    expert_NK = choose(prob_NE.detach())
    return (
        expert_NK,
        prob_NE.gather(1, expert_NK),
        prob_NE.sum(0),
        -(prob_NE * log_prob_NE).sum(),
        logits_NE.logsumexp(dim=-1).square().sum(),
        torch.bincount(expert_NK.flatten(), minlength=logits_NE.shape[1]).to(prob_NE.dtype),
    )


def promote(x: torch.Tensor) -> torch.Tensor:
    """float32 for lower precisions, unchanged for float32 and float64."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x

"""How far two forward passes of one batch, through different copies, are from each other.

Shapes: N rows (examples, or target tokens), V classes or vocabulary.
Source: AdaMix (arXiv 2205.12410): half the sum of two Kullback-Leibler divergences; in each the target does not
receive a gradient, so each pass is pulled towards the other one as it stands.
"""

import torch
import torch.nn.functional as F


def symmetric_kl(a_NV: torch.Tensor, b_NV: torch.Tensor) -> torch.Tensor:
    """(KL(sg(p_b) || p_a) + KL(sg(p_a) || p_b)) / 2 of two sets of logits, averaged over rows -> scalar, float32 or
    better. sg: without gradient."""
    log_a, log_b = (_promote(logits).log_softmax(-1) for logits in (a_NV, b_NV))
    to_a = F.kl_div(log_a, log_b.detach(), reduction="batchmean", log_target=True)
    to_b = F.kl_div(log_b, log_a.detach(), reduction="batchmean", log_target=True)
    return (to_a + to_b) / 2


def squared_difference(a_N: torch.Tensor, b_N: torch.Tensor) -> torch.Tensor:
    """((a - sg(b))^2 + (sg(a) - b)^2) / 2 of two sets of predictions, averaged over rows -> scalar.

    The form for regression. The published one, on the softmax of a single logit, is zero whatever the predictions
    are. This one is the symmetric divergence of two normal distributions of variance 1/2 around the predictions.
    """
    a_N, b_N = _promote(a_N), _promote(b_N)
    return (((a_N - b_N.detach()) ** 2 + (b_N - a_N.detach()) ** 2) / 2).mean()


def _promote(x: torch.Tensor) -> torch.Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x

"""The router: which k of E experts serve a token, with which gates, and the statistics the losses need.

Shapes: N tokens, D width, E experts, K top-k, G router width.
Source: the released ModuleFormer's gate. Softmax over all experts, then top-k; gates are not renormalised.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from megamf.config import ModelConfig


class RouterStats(NamedTuple):
    """Sums over the N tokens of one routing decision; float32 (float64 for float64 models).

    prob_E: sum of p(m|x), differentiable. entropy: sum of H(m|x), differentiable. logsumexp2: sum of squared
    logsumexp of the logits, differentiable. count_E: how often each expert was chosen, no gradient. tokens: N.
    """

    prob_E: torch.Tensor
    entropy: torch.Tensor
    logsumexp2: torch.Tensor
    count_E: torch.Tensor
    tokens: torch.Tensor


@dataclass
class Routing:
    """expert_NK int64; gate_NK float32 (float64 for float64 models), the raw probabilities of the chosen."""

    expert_NK: torch.Tensor
    gate_NK: torch.Tensor
    stats: RouterStats


class Router(nn.Module):
    """One router a layer and kind; parameter names are those of the public checkpoints.

    `mlp`: A gelu(B x + b), `linear`: A x, `gmm`: scaled cosine to centroids.
    """

    def __init__(self, config: ModelConfig, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.gate_type = config.gate_type
        self.num_experts = num_experts
        self.top_k = top_k
        self.sample_topk = config.sample_topk
        if config.gate_type == "mlp":
            self.w_gate = nn.Sequential(
                nn.Linear(config.n_embd, config.gating_size),
                nn.GELU(),
                nn.Dropout(config.moe_pdrop),
                nn.Linear(config.gating_size, num_experts, bias=False),
            )
        elif config.gate_type == "linear":
            self.w_gate = nn.Sequential(nn.Linear(config.n_embd, num_experts, bias=False))
        else:
            self.w_gate = nn.Linear(config.n_embd, config.gating_size, bias=False)
            self.expert_centroids = nn.Parameter(torch.empty(num_experts, config.gating_size))
            self.temperature = nn.Parameter(torch.zeros(1))

    def expert_rows(self) -> nn.Parameter:
        """The matrix with one row an expert (A of the paper, or the centroids) [E, G or D]."""
        return self.expert_centroids if self.gate_type == "gmm" else self.w_gate[-1].weight

    def logits(self, x_ND: torch.Tensor) -> torch.Tensor:
        """x_ND -> logits_NE in float32 (float64 for float64 models)."""
        if self.gate_type == "gmm":
            h_NG = F.normalize(promote(self.w_gate(x_ND)), dim=-1)
            c_EG = F.normalize(promote(self.expert_centroids), dim=-1)
            return h_NG @ c_EG.t() * promote(self.temperature).exp()
        h_NG = x_ND
        for layer in self.w_gate[:-1]:
            h_NG = layer(h_NG)
        # Rounding the logits to a low precision would reorder experts whose scores are close.
        return promote(h_NG) @ promote(self.w_gate[-1].weight).t()

    def forward(self, x_ND: torch.Tensor) -> Routing:
        """x_ND -> Routing, with the logits and everything after them in float32 or better."""
        logits_NE = self.logits(x_ND)
        log_prob_NE = logits_NE.log_softmax(dim=-1)
        prob_NE = log_prob_NE.exp()
        expert_NK = self.choose(prob_NE.detach())
        gate_NK = prob_NE.gather(1, expert_NK)
        count_E = torch.bincount(expert_NK.flatten(), minlength=self.num_experts).to(prob_NE.dtype)
        stats = RouterStats(
            prob_E=prob_NE.sum(0),
            entropy=-(prob_NE * log_prob_NE).sum(),
            logsumexp2=logits_NE.logsumexp(dim=-1).square().sum(),
            count_E=count_E,
            tokens=prob_NE.new_tensor(x_ND.shape[0]),
        )
        return Routing(expert_NK, gate_NK, stats)

    def choose(self, prob_NE: torch.Tensor) -> torch.Tensor:
        """The k chosen experts of each token, int64 [N, K]; `sample_topk` of them are drawn in training."""
        drawn = self.sample_topk if self.training else 0
        fixed_NK = prob_NE.topk(self.top_k - drawn, dim=-1).indices
        if not drawn or not prob_NE.shape[0]:
            return fixed_NK if not drawn else fixed_NK.new_empty(0, self.top_k)
        rest_NE = (prob_NE + 1e-6).scatter(1, fixed_NK, 0.0)
        return torch.cat([fixed_NK, torch.multinomial(rest_NE, drawn)], dim=1)


def promote(x: torch.Tensor) -> torch.Tensor:
    """float32 for lower precisions, unchanged for float32 and float64."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x

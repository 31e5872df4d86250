"""The router: which k of E experts serve a token, with which gates, and the statistics the losses need.

Shapes: N tokens, D width, E experts, K top-k, G router width.
Source: the released ModuleFormer's gate. Softmax over all experts, then top-k; gates are not renormalised.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from megamf.config import ModelConfig
from megamf.ops.router import promote, route, route_by_logits


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


class Routing(NamedTuple):
    """expert_NK int64; gate_NK float32 (float64 for float64 models), the raw probabilities of the chosen."""

    expert_NK: torch.Tensor
    gate_NK: torch.Tensor
    stats: RouterStats


class Router(nn.Module):
    """One router a layer and kind; parameter names are those of the public checkpoints.

    `mlp`: A gelu(B x + b), `linear`: A x, `gmm`: scaled cosine to centroids. `tanh`: A tanh(B x / |x|), with gates of 1
    for the chosen experts: the routers of models that were dense (MoEfication), whose experts are parts of one sum.
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
        elif config.gate_type == "tanh":
            self.w_gate = nn.Sequential(
                nn.Linear(config.n_embd, config.gating_size, bias=False),
                nn.Tanh(),
                nn.Linear(config.gating_size, num_experts, bias=False),
            )
        else:
            self.w_gate = nn.Linear(config.n_embd, config.gating_size, bias=False)
            self.expert_centroids = nn.Parameter(torch.empty(num_experts, config.gating_size))
            self.temperature = nn.Parameter(torch.zeros(1))
        self.num_inserted = 0
        self.register_parameter("inserted_rows", None)

    @property
    def rows_name(self) -> str:
        """Name of the matrix with one row an expert."""
        return "expert_centroids" if self.gate_type == "gmm" else f"w_gate.{len(self.w_gate) - 1}.weight"

    def expert_rows(self) -> torch.Tensor:
        """The matrix with one row an expert (A of the paper, or the centroids) [E, G or D]; a parameter if unsplit."""
        rows = self.expert_centroids if self.gate_type == "gmm" else self.w_gate[-1].weight
        return rows if self.inserted_rows is None else torch.cat([rows, self.inserted_rows])

    def new_rows(self) -> torch.Tensor:
        """The rows of the inserted experts (A' of the paper), the last of all [I, G or D]."""
        return self.expert_rows()[self.num_experts - self.num_inserted :]

    def train_rows_from(self, index: int) -> None:
        """Freeze the rows before `index`; those from there on become a parameter of their own."""
        whole = self.expert_rows().detach()
        frozen = nn.Parameter(whole[:index].clone(), requires_grad=False)
        if self.gate_type == "gmm":
            self.expert_centroids = frozen
        else:
            self.w_gate[-1].weight = frozen
        self.inserted_rows = nn.Parameter(whole[index:].clone())

    def factors(self, x_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """h [N, G or D] and a [E, G or D] of one dtype, whose product h a^T is the logits."""
        if self.gate_type == "gmm":
            h_NG = F.normalize(promote(self.w_gate(x_ND)), dim=-1) * promote(self.temperature).exp()
            return h_NG, F.normalize(promote(self.expert_rows()), dim=-1)
        h_NG = F.normalize(promote(x_ND), dim=-1).to(x_ND.dtype) if self.gate_type == "tanh" else x_ND
        for layer in self.w_gate[:-1]:
            h_NG = layer(h_NG)
        return h_NG, self.expert_rows()

    def logits(self, x_ND: torch.Tensor) -> torch.Tensor:
        """x_ND -> logits_NE in float32 (float64 for float64 models)."""
        h_NG, a_EG = self.factors(x_ND)
        # Rounding the logits to a low precision would reorder experts whose scores are close.
        return promote(h_NG) @ promote(a_EG).t()

    def forward(self, x_ND: torch.Tensor) -> Routing:
        """x_ND -> Routing, with the logits and everything after them in float32 or better."""
        if self.training and self.sample_topk:
            found = route_by_logits(self.logits(x_ND), self.choose)
        else:
            found = route(*self.factors(x_ND), self.top_k)
        tokens = found.gate_NK.new_tensor(x_ND.shape[0])
        stats = RouterStats(found.prob_E, found.entropy, found.logsumexp2, found.count_E, tokens)
        gate_NK = torch.ones_like(found.gate_NK) if self.gate_type == "tanh" else found.gate_NK
        return Routing(found.expert_NK, gate_NK, stats)

    def choose(self, prob_NE: torch.Tensor) -> torch.Tensor:
        """The k experts of each token in training, int64 [N, K]: the likeliest, and `sample_topk` drawn ones."""
        fixed_NK = prob_NE.topk(self.top_k - self.sample_topk, dim=-1).indices
        if not prob_NE.shape[0]:
            return fixed_NK.new_empty(0, self.top_k)
        rest_NE = (prob_NE + 1e-6).scatter(1, fixed_NK, 0.0)
        return torch.cat([fixed_NK, torch.multinomial(rest_NE, self.sample_topk)], dim=1)

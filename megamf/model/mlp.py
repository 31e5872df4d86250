"""The two feed-forward layers: a sparse mixture of experts, and the dense one of the baselines.

Shapes: B batch, T time, N = B*T tokens, D width, F hidden width, R rows grouped by local expert.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from megamf.config import ModelConfig
from megamf.model.backends import AUTOMATIC, Backends
from megamf.model.dispatch import Dispatcher, Plan
from megamf.model.experts import ACTIVATIONS, RoutedExperts
from megamf.model.router import RouterStats


class ExpertMlp(RoutedExperts):
    """Sparse feed-forward layer: sum over the chosen e of p_e * W2_e act(W1_e x)."""

    def __init__(self, config: ModelConfig, dispatcher: Dispatcher, backends: Backends = AUTOMATIC) -> None:
        super().__init__(config, config.n_mlp_experts, config.k_mlp, config.ffd_hidden, dispatcher, backends)
        self.activation = ACTIVATIONS[config.activation_function]
        self.recompute = False

    def forward(self, x_BTD: torch.Tensor) -> tuple[torch.Tensor, RouterStats]:
        """x_BTD -> y_BTD and the router's statistics."""
        x_ND = x_BTD.flatten(0, 1)
        routing = self.gate(x_ND)
        plan = self.dispatcher.plan(routing.expert_NK, self.num_experts)
        if self.fuses(x_ND, plan):
            y_ND = self._run(self._fused, x_ND, plan, routing.gate_NK)
        else:
            x_RD = self.dispatcher.dispatch(x_ND, plan)
            y_RD = self._run(self._compute, x_RD, plan)
            y_ND = self.dispatcher.combine(y_RD, plan, routing.gate_NK)
        return y_ND.view_as(x_BTD), routing.stats

    def _run(self, compute: Callable[..., torch.Tensor], *arguments: Any) -> torch.Tensor:
        if self.recompute and self.training and torch.is_grad_enabled():
            # Only local arithmetic is repeated in the backward pass, never a collective.
            return checkpoint(compute, *arguments, use_reentrant=False)
        return compute(*arguments)

    def _fused(self, x_ND: torch.Tensor, plan: Plan, gate_NK: torch.Tensor) -> torch.Tensor:
        return self.project_out(self.activation(self.project_in(x_ND, plan, 0)), plan, gate_NK, 0)

    def _compute(self, x_RD: torch.Tensor, plan: Plan) -> torch.Tensor:
        return self.output_experts(self.activation(self.experts(x_RD, plan)), plan)


class DenseMlp(nn.Module):
    """W2 act(W1 x), no biases: one expert for every token."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.n_embd, config.ffd_hidden, bias=False)
        self.fc2 = nn.Linear(config.ffd_hidden, config.n_embd, bias=False)
        self.activation = ACTIVATIONS[config.activation_function]

    def forward(self, x_BTD: torch.Tensor) -> tuple[torch.Tensor, None]:
        """x_BTD -> y_BTD; a dense layer has no router statistics."""
        return self.fc2(self.activation(self.fc1(x_BTD))), None

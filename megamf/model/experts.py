"""A router, its experts' input and output projections, and what is common to attention and MLP experts.

Shapes: N tokens, D width, L local experts, K top-k, R rows grouped by local expert, F expert width.
Parameter names and layout ([expert, in, out], y = x W) are those of the public checkpoints.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from megamf.config import ModelConfig
from megamf.model.backends import AUTOMATIC, Backends
from megamf.model.dispatch import Dispatcher, Plan
from megamf.model.router import Router
from megamf.ops.grouped_linear import grouped_linear, implementation, routed_linear

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
}


class ExpertLinear(nn.Module):
    """One bias-free linear map for each local expert: weight_LDF, without the last ones where they are `inserted`.

    `adapter`: a module whose result, for the arguments of `forward`, is added to the products.
    """

    def __init__(
        self, num_local: int, in_features: int, out_features: int, dispatcher: Dispatcher, backend: str = "auto"
    ) -> None:
        super().__init__()
        self.dispatcher = dispatcher
        self.backend = backend
        self.shape = (num_local, in_features, out_features)
        self.weight = nn.Parameter(torch.empty(self.shape))
        self.register_parameter("inserted", None)
        self.register_module("adapter", None)

    def train_from(self, index: int) -> None:
        """Freeze the experts before `index`; those from there on become a parameter of their own."""
        whole_LDF = self.weight.detach()
        self.weight = nn.Parameter(whole_LDF[:index].clone(), requires_grad=False)
        self.inserted = nn.Parameter(whole_LDF[index:].clone())

    def whole(self) -> torch.Tensor:
        """weight_LDF of all local experts."""
        return self.weight if self.inserted is None else torch.cat([self.weight, self.inserted])

    def forward(
        self, x: torch.Tensor, plan: Plan, fans: tuple[int, int] | None = None, gate_NK: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x_RD, rows as the dispatcher grouped them by `plan` -> y_RF; with fans (in, out) as `routed_linear` does."""
        y = self._products(x, plan, fans, gate_NK)
        return y if self.adapter is None else y + self.adapter(x, plan, fans, gate_NK)

    def _products(
        self, x: torch.Tensor, plan: Plan, fans: tuple[int, int] | None, gate_NK: torch.Tensor | None
    ) -> torch.Tensor:
        known = x.device.type == "cpu" and not isinstance(x, FakeTensor)
        if fans is None and self.inserted is not None and self.weight.shape[0] and known:
            return self._apart(x, plan)
        if fans is None:
            return self.dispatcher.linear(x, self.whole(), plan, self.backend)
        return routed_linear(
            x, self.whole(), plan.count_L, plan.order_R, in_fan=fans[0], out_fan=fans[1], gate_NK=gate_NK
        )

    def _apart(self, x_RD: torch.Tensor, plan: Plan) -> torch.Tensor:
        """Products with frozen and with trained experts by themselves: no gradient is computed that nobody takes.

        On a GPU the number of rows is not at hand, and waiting for it would cost more than that gradient.
        """
        frozen = self.weight.shape[0]
        rows = int(plan.count_L[:frozen].sum())
        return torch.cat(
            [
                grouped_linear(x_RD[:rows], self.weight, plan.count_L[:frozen], backend=self.backend),
                grouped_linear(x_RD[rows:], self.inserted, plan.count_L[frozen:], backend=self.backend),
            ]
        )


class RoutedExperts(nn.Module):
    """Router `gate`, input projections `experts` [L, D, F] and output projections `output_experts` [L, F, D]."""

    def __init__(
        self,
        config: ModelConfig,
        num_experts: int,
        top_k: int,
        hidden: int,
        dispatcher: Dispatcher,
        backends: Backends = AUTOMATIC,
    ) -> None:
        super().__init__()
        self.backend = backends.experts
        self.num_experts = num_experts
        self.dispatcher = dispatcher
        self.local_experts = dispatcher.expert_range(num_experts)
        self.gate = Router(config, num_experts, top_k)
        num_local = dispatcher.num_slots(num_experts)
        self.shape_LDF = (num_local, config.n_embd, hidden)
        self.experts = ExpertLinear(num_local, config.n_embd, hidden, dispatcher, backends.experts)
        self.output_experts = ExpertLinear(num_local, hidden, config.n_embd, dispatcher, backends.experts)

    def fuses(self, x: torch.Tensor, plan: Plan) -> bool:
        """Whether products gather and scatter rows themselves: rows and experts are all here, and Triton multiplies."""
        if plan.transport is not None or len(self.local_experts) != self.num_experts:
            return False
        # A stand-in: outside of its own module's call the weight itself may be elsewhere, in pieces.
        w_LDF = x.new_empty(self.shape_LDF, device="meta")
        return implementation(x, w_LDF, self.backend) == "triton"

    def project_in(self, x_ND: torch.Tensor, plan: Plan, out_fan: int) -> torch.Tensor:
        """Only where `fuses`. x_ND -> h_RF in expert order (out_fan 0) or by copy (1), through `experts`."""
        return self.experts(x_ND, plan, (plan.top_k, out_fan))

    def project_out(self, h_RF: torch.Tensor, plan: Plan, gate_NK: torch.Tensor, in_fan: int) -> torch.Tensor:
        """Only where `fuses`. h_RF in expert order (in_fan 0) or by copy (1) -> y_ND, through `output_experts`."""
        return self.output_experts(h_RF, plan, (in_fan, plan.top_k), gate_NK)

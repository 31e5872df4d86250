"""How tokens reach their experts: the interface the model relies on, and its one-process form.

Shapes: N tokens, D width, K experts a token, E experts, L local experts, R rows that this process computes.

A dispatcher is handed to the model, which knows no process group. `megamf.parallel.dispatch` has the form that
moves tokens between ranks. One `Plan` is made for every routing decision and reused by the query and the output
projection of an attention layer.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from megamf.ops.grouped_linear import grouped_linear
from megamf.ops.permutation import permute, sort_by_expert, unpermute


@dataclass
class Plan:
    """Where the N*K routed copies of one routing decision go.

    order_R, inverse_R: int64 [N*K], the copies in expert order and back. count_L: int64 [L], rows of each local
    expert in the tensors that `dispatch` returns; a dispatcher that has to ask other ranks fills it in at the first
    `send`. transport: what a distributed dispatcher adds.
    """

    order_R: torch.Tensor
    inverse_R: torch.Tensor
    count_L: torch.Tensor | None
    top_k: int
    transport: Any = None


class Dispatcher(Protocol):
    """What the model asks of a dispatcher. `peak_rows`: the most rows that one plan gave this process (resettable)."""

    peak_rows: int

    def expert_range(self, num_experts: int) -> range:
        """The global indices of the experts that live in this process."""

    def num_slots(self, num_experts: int) -> int:
        """L: places for experts in this process's tensors, the same in every process; those without one come last."""

    def plan(self, expert_NK: torch.Tensor, num_experts: int) -> Plan:
        """Prepare the routing decision `expert_NK` (int64); collective where ranks are involved."""

    def send(self, x: torch.Tensor, plan: Plan) -> Any:
        """Set x_ND (one row a token) or x_NKD (one row a copy) on its way; what is computed before `receive` runs
        beside it."""

    def receive(self, sent: Any, plan: Plan) -> torch.Tensor:
        """What `send` returned -> x_RD, rows grouped by local expert."""

    def dispatch(self, x: torch.Tensor, plan: Plan) -> torch.Tensor:
        """`send` and `receive` at once."""

    def linear(self, x_RD: torch.Tensor, weight_LDF: torch.Tensor, plan: Plan, backend: str) -> torch.Tensor:
        """x_RD from `dispatch` -> y_RF, each row times its expert's matrix."""

    def combine(self, y_RD: torch.Tensor, plan: Plan, gate_NK: torch.Tensor | None) -> torch.Tensor:
        """y_RD -> y_ND weighted by the gates, or y_NKD (each copy by itself) where gate_NK is None."""


class LocalDispatcher:
    """All experts in this process: sort the copies by expert, and back."""

    def __init__(self) -> None:
        self.peak_rows = 0

    def expert_range(self, num_experts: int) -> range:
        return range(num_experts)

    def num_slots(self, num_experts: int) -> int:
        return num_experts

    def plan(self, expert_NK: torch.Tensor, num_experts: int) -> Plan:
        order_R, inverse_R, count_E = sort_by_expert(expert_NK, num_experts)
        self.peak_rows = max(self.peak_rows, expert_NK.numel())
        return Plan(order_R, inverse_R, count_E, expert_NK.shape[1])

    def send(self, x: torch.Tensor, plan: Plan) -> torch.Tensor:
        return sort_copies(x, plan)

    def receive(self, sent: torch.Tensor, plan: Plan) -> torch.Tensor:
        return sent

    def dispatch(self, x: torch.Tensor, plan: Plan) -> torch.Tensor:
        return self.receive(self.send(x, plan), plan)

    def linear(self, x_RD: torch.Tensor, weight_LDF: torch.Tensor, plan: Plan, backend: str) -> torch.Tensor:
        return grouped_linear(x_RD, weight_LDF, plan.count_L, backend=backend)

    def combine(self, y_RD: torch.Tensor, plan: Plan, gate_NK: torch.Tensor | None) -> torch.Tensor:
        return unsort_copies(y_RD, plan, gate_NK)


def sort_copies(x: torch.Tensor, plan: Plan) -> torch.Tensor:
    """x_ND or x_NKD -> rows in expert order [N*K, D]."""
    if x.dim() == 3:
        return permute(x.reshape(-1, x.shape[-1]), plan.order_R, plan.inverse_R, 1)
    return permute(x, plan.order_R, plan.inverse_R, plan.top_k)


def unsort_copies(y_RD: torch.Tensor, plan: Plan, gate_NK: torch.Tensor | None) -> torch.Tensor:
    """Rows in expert order [N*K, D] -> gated sum y_ND, or y_NKD where gate_NK is None."""
    if gate_NK is None:
        # Undoing a permutation is the permutation with its two index lists exchanged.
        copies = permute(y_RD, plan.inverse_R, plan.order_R, 1)
        return copies.view(-1, plan.top_k, y_RD.shape[-1])
    return unpermute(y_RD, plan.order_R, plan.inverse_R, gate_NK)

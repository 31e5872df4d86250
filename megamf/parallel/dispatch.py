"""Tokens to the ranks of their experts, and back: one all-to-all each way.

Shapes: N tokens, D width, K experts a token, E experts, L local experts, P expert-parallel ranks, R rows computed here.

Every rank calls every collective in the same order, also with zero tokens. Split sizes are exchanged once per routing
decision; an attention layer's query and output projections share them.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from megamf import faults
from megamf.model.dispatch import Dispatcher, LocalDispatcher, Plan, sort_copies, unsort_copies
from megamf.ops.permutation import permute, sort_by_expert
from megamf.parallel.mesh import Mesh


@dataclass
class Transport:
    """Rows for and from each of the P ranks, and the order that groups received rows by local expert."""

    send_P: list[int]
    receive_P: list[int]
    order_R: torch.Tensor
    inverse_R: torch.Tensor


class AllToAllDispatcher:
    """Experts are split over the P ranks of `group` in contiguous blocks of E/P."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.num_ranks = dist.get_world_size(group)

    def expert_range(self, num_experts: int) -> range:
        if num_experts % self.num_ranks:
            raise ValueError(f"{num_experts} experts are not divisible by {self.num_ranks} expert-parallel ranks")
        local = num_experts // self.num_ranks
        return range(self.rank * local, (self.rank + 1) * local)

    def plan(self, expert_NK: torch.Tensor, num_experts: int) -> Plan:
        order_R, inverse_R, count_E = sort_by_expert(expert_NK, num_experts)
        send_PL = count_E.view(self.num_ranks, -1).contiguous()
        receive_PL = torch.empty_like(send_PL)
        dist.all_to_all_single(receive_PL, send_PL, group=self.group)

        # Rows arrive rank by rank, each rank's sorted by expert; a second sort groups them by expert alone.
        local = torch.arange(send_PL.shape[1], device=send_PL.device).repeat(self.num_ranks)
        expert_R1 = torch.repeat_interleave(local, receive_PL.flatten()).unsqueeze(1)
        regrouped = sort_by_expert(expert_R1, send_PL.shape[1])
        splits = torch.stack([send_PL.sum(1), receive_PL.sum(1)]).tolist()
        transport = Transport(splits[0], splits[1], regrouped.order_R, regrouped.inverse_R)
        return Plan(order_R, inverse_R, regrouped.count_E, expert_NK.shape[1], transport)

    def dispatch(self, x: torch.Tensor, plan: Plan) -> torch.Tensor:
        way = plan.transport
        received = AllToAll.apply(sort_copies(x, plan), way.send_P, way.receive_P, self.group)
        return permute(received, way.order_R, way.inverse_R, 1)

    def combine(self, y_RD: torch.Tensor, plan: Plan, gate_NK: torch.Tensor | None) -> torch.Tensor:
        way = plan.transport
        by_rank = permute(y_RD, way.inverse_R, way.order_R, 1)
        returned = AllToAll.apply(by_rank, way.receive_P, way.send_P, self.group)
        return unsort_copies(returned, plan, gate_NK)


class AllToAll(torch.autograd.Function):
    """Row blocks of x to the ranks; the gradient travels the same way back."""

    @staticmethod
    def forward(ctx, x_RD, send_P, receive_P, group):
        ctx.way = (receive_P, send_P, group)
        return exchange(x_RD, send_P, receive_P, group)

    @staticmethod
    def backward(ctx, grad_RD):
        return exchange(grad_RD, *ctx.way), None, None, None


def exchange(x_RD: torch.Tensor, send_P: list[int], receive_P: list[int], group: dist.ProcessGroup) -> torch.Tensor:
    """x_RD, rows in rank order -> the rows that the ranks sent here, in rank order."""
    faults.reach("dispatch")
    received = x_RD.new_empty(sum(receive_P), *x_RD.shape[1:])
    dist.all_to_all_single(received, x_RD.contiguous(), receive_P, send_P, group=group)
    return received


def make_dispatcher(mesh: Mesh) -> Dispatcher:
    """The dispatcher that this layout needs: no collective where every rank holds all experts."""
    return LocalDispatcher() if mesh.ep == 1 else AllToAllDispatcher(mesh.ep_group)

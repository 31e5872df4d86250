"""Tokens to the ranks of their experts, and back, by one all-to-all each way; or the experts' weights to the tokens.

Shapes: N tokens, D width, K experts a token, E experts, L local experts, P expert-parallel ranks, R rows computed here.

Every rank calls every collective in the same order, also with zero tokens. Split sizes are exchanged once per routing
decision, from the moment it is known; an attention layer's query and output projections share them.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F

from megamf.model.dispatch import Dispatcher, LocalDispatcher, Plan, sort_copies, unsort_copies
from megamf.ops.grouped_linear import grouped_linear
from megamf.ops.permutation import permute, sort_by_expert
from megamf.parallel.exchange import CountExchange, Transfer, begin, finish
from megamf.parallel.gather import with_all_experts
from megamf.parallel.mesh import Mesh
from megamf.parallel.traffic import Strategy


class Transport(NamedTuple):
    """Rows for and from each of the P ranks, and the order that groups received rows by local expert."""

    send_P: list[int]
    receive_P: list[int]
    order_R: torch.Tensor
    inverse_R: torch.Tensor


class Sent(NamedTuple):
    """Rows on their way."""

    buffer: torch.Tensor
    transfer: Transfer


class AllToAllDispatcher:
    """Experts are split over the P ranks of `group` in contiguous blocks (`share_of_experts`); rows travel."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.num_ranks = dist.get_world_size(group)
        self.peak_rows = 0
        self.stream: Any = None

    def expert_range(self, num_experts: int) -> range:
        return share_of_experts(num_experts, self.rank, self.num_ranks)

    def num_slots(self, num_experts: int) -> int:
        return slots_of_experts(num_experts, self.num_ranks)

    def plan(self, expert_NK: torch.Tensor, num_experts: int) -> Plan:
        order_R, inverse_R, count_E = sort_by_expert(expert_NK, num_experts)
        if self.stream is None and count_E.is_cuda:
            self.stream = torch.cuda.Stream(count_E.device)
        counts = CountExchange(counts_by_slot(count_E, self.num_ranks), self.group, self.stream)
        return Plan(order_R, inverse_R, None, expert_NK.shape[1], counts)

    def send(self, x: torch.Tensor, plan: Plan) -> Sent:
        rows = sort_copies(x, plan)
        counts = plan.transport
        if not isinstance(counts, CountExchange):
            return self._begin(rows, counts.send_P, counts.receive_P)
        send_P, receive_P = counts.splits()
        sent = self._begin(rows, send_P, receive_P)
        self.peak_rows = max(self.peak_rows, sum(receive_P))
        # Rows arrive rank by rank, each rank's sorted by expert; a second sort groups them by expert alone.
        receive_PL = counts.receive_PL
        local = torch.arange(receive_PL.shape[1], device=receive_PL.device).repeat(self.num_ranks)
        expert_R = torch.repeat_interleave(local, receive_PL.flatten(), output_size=sum(receive_P))
        regrouped = sort_by_expert(expert_R.unsqueeze(1), receive_PL.shape[1])
        plan.count_L = regrouped.count_E
        plan.transport = Transport(send_P, receive_P, regrouped.order_R, regrouped.inverse_R)
        return sent

    def receive(self, sent: Sent, plan: Plan) -> torch.Tensor:
        way = plan.transport
        return permute(finish(sent.buffer, sent.transfer), way.order_R, way.inverse_R, 1)

    def dispatch(self, x: torch.Tensor, plan: Plan) -> torch.Tensor:
        return self.receive(self.send(x, plan), plan)

    def linear(self, x_RD: torch.Tensor, weight_LDF: torch.Tensor, plan: Plan, backend: str) -> torch.Tensor:
        return grouped_linear(x_RD, weight_LDF, plan.count_L, backend=backend)

    def combine(self, y_RD: torch.Tensor, plan: Plan, gate_NK: torch.Tensor | None) -> torch.Tensor:
        way = plan.transport
        sent = self._begin(permute(y_RD, way.inverse_R, way.order_R, 1), way.receive_P, way.send_P)
        return unsort_copies(finish(sent.buffer, sent.transfer), plan, gate_NK)

    def _begin(self, rows: torch.Tensor, send_P: list[int], receive_P: list[int]) -> Sent:
        transfer = Transfer(send_P, receive_P, self.group)
        return Sent(begin(rows, transfer), transfer)


class GatheringDispatcher(LocalDispatcher):
    """Experts are split as above, but rows stay: a product gathers the weights of all experts.

    recomputed: every forward pass with a gradient is repeated right before its backward pass.
    """

    def __init__(self, group: dist.ProcessGroup, *, recomputed: bool) -> None:
        super().__init__()
        self.group = group
        self.recomputed = recomputed

    def expert_range(self, num_experts: int) -> range:
        return share_of_experts(num_experts, dist.get_rank(self.group), dist.get_world_size(self.group))

    def num_slots(self, num_experts: int) -> int:
        return slots_of_experts(num_experts, dist.get_world_size(self.group))

    def plan(self, expert_NK: torch.Tensor, num_experts: int) -> Plan:
        plan = super().plan(expert_NK, num_experts)
        # Weights arrive with the slots of all ranks, the empty ones too.
        plan.count_L = counts_by_slot(plan.count_L, dist.get_world_size(self.group)).flatten()
        return plan

    def linear(self, x_RD: torch.Tensor, weight_LDF: torch.Tensor, plan: Plan, backend: str) -> torch.Tensor:
        product = partial(_product, x_RD, plan.count_L, backend)
        return with_all_experts(product, weight_LDF, self.group, keep=self.recomputed)


def _product(x_RD: torch.Tensor, count_E: torch.Tensor, backend: str, weight_EDF: torch.Tensor) -> torch.Tensor:
    return grouped_linear(x_RD, weight_EDF, count_E, backend=backend)


def share_of_experts(num_experts: int, rank: int, num_ranks: int) -> range:
    """The contiguous block of experts that lives on `rank`: the first E mod P ranks hold one more than the others.

    Raises ValueError where there are fewer experts than ranks.
    """
    if num_experts < num_ranks:
        raise ValueError(f"{num_experts} experts cannot be shared out over {num_ranks} expert-parallel ranks")
    size, larger = divmod(num_experts, num_ranks)
    first = rank * size + min(rank, larger)
    return range(first, first + size + (rank < larger))


def slots_of_experts(num_experts: int, num_ranks: int) -> int:
    """Places for experts in the tensors of every rank. Where shares differ, a rank with the smaller one has a slot of
    zeros behind them: all ranks fill the buckets in which gradients are summed alike, and the most that a rank holds
    is as much as without."""
    return -(-num_experts // num_ranks)


def counts_by_slot(count_E: torch.Tensor, num_ranks: int) -> torch.Tensor:
    """Rows of every expert -> [P, L], by rank and slot; 0 for an empty slot."""
    size, larger = divmod(count_E.shape[0], num_ranks)
    if not larger:
        return count_E.view(num_ranks, size).contiguous()
    full, rest = count_E.split([larger * (size + 1), (num_ranks - larger) * size])
    return torch.cat([full.view(larger, size + 1), F.pad(rest.view(num_ranks - larger, size), (0, 1))])


class Dispatchers(NamedTuple):
    """One for each kind of expert."""

    attention: Dispatcher
    mlp: Dispatcher


def make_dispatchers(mesh: Mesh, strategy: Strategy, *, recomputed: bool) -> Dispatchers:
    """The dispatchers that this layout needs: no collective where every rank holds all experts.

    strategy: for attention experts. recomputed: blocks are computed again in the backward pass.
    """
    if mesh.ep == 1:
        return Dispatchers(LocalDispatcher(), LocalDispatcher())
    mlp = AllToAllDispatcher(mesh.ep_group)
    if strategy == "gather_weights":
        return Dispatchers(GatheringDispatcher(mesh.ep_group, recomputed=recomputed), mlp)
    return Dispatchers(mlp, mlp)

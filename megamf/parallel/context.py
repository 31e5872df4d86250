"""Attention over sequences that are split over ranks.

Shapes: B batch, T a rank's tokens of a sequence, S = P*T tokens of the whole, U = T/2 tokens of a chunk, H query heads,
G key/value heads, C head channels, P ranks, X = G*C channels of all keys of a token (twice that where K is not V).

A rank holds the chunks `chunk_indices(rank, P)`. It attends to the keys of each chunk itself while those of the other
ranks are on their way, then to all older keys of the sequence; `combine` makes the two into one, exactly. Every rank
visits the same number of keys: U * U * (2*P - 1) older ones and two triangles of U.

A layer moves, to and from each rank, (P-1)/P of B*S*X values in the type of the keys, forward and once more for the
backward pass (whether it is recomputed or not: the whole sequence's keys are not kept in between), and as many backward
in float32 or better: there the ranks' gradients of a key are added up, in the same order in every run.
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from megamf.data.zigzag import chunk_indices
from megamf.model.context import WHOLE, Context
from megamf.ops.stickbreaking import DEFAULT_STOP, combine, stickbreaking_attention
from megamf.parallel.mesh import Mesh


class Transfer:
    """What one layer has under way between the ranks of `group`, one thing at a time: keys, later their gradients."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.num_ranks = dist.get_world_size(group)
        self.under_way: tuple[dist.Work, torch.Tensor, torch.Tensor] | None = None
        self.whole_SBX: torch.Tensor | None = None
        self.let_go = False

    def gather(self, own_TBX: torch.Tensor) -> torch.Tensor:
        """The buffer in which the rows of all ranks arrive [P * T, B, X], rank by rank; not to be read before."""
        rows_SBX = own_TBX.new_empty(self.num_ranks * own_TBX.shape[0], *own_TBX.shape[1:])
        own_TBX = own_TBX.contiguous()
        work = dist.all_gather_into_tensor(rows_SBX, own_TBX, group=self.group, async_op=True)
        # What is sent has to outlive the transfer.
        self.under_way = (work, rows_SBX, own_TBX)
        return rows_SBX

    def add_up(self, grad_SBX: torch.Tensor) -> None:
        """Begin to add up what the ranks have for each rank's rows; [T, B, X] in float32 or better arrives."""
        wide_SBX = grad_SBX.to(torch.promote_types(grad_SBX.dtype, torch.float32)).contiguous()
        own_TBX = wide_SBX.new_empty(len(wide_SBX) // self.num_ranks, *wide_SBX.shape[1:])
        work = dist.reduce_scatter_tensor(own_TBX, wide_SBX, group=self.group, async_op=True)
        self.under_way = (work, own_TBX, wide_SBX)

    def arrived(self) -> torch.Tensor:
        """Waits for what was begun."""
        assert self.under_way is not None, "a transfer is awaited once, after it was begun"
        work, arrived, _ = self.under_way
        work.wait()
        self.under_way = None
        return arrived

    def note(self, saved: torch.Tensor) -> Any:
        """For autograd, in place of a view of the whole keys: how to find it in them when they come again."""
        if self.whole_SBX is None or not same_storage(saved, self.whole_SBX):
            # As it is; but an output that its own node kept alive would never be freed.
            return saved.detach()
        self.let_go = True
        return saved.size(), saved.stride(), saved.storage_offset()

    def recall(self, noted: Any) -> torch.Tensor:
        """What `note` was given; the first to ask waits for the keys."""
        if isinstance(noted, torch.Tensor):
            return noted
        if self.whole_SBX is None:
            self.whole_SBX = in_sequence(self.arrived(), self.num_ranks)
        return self.whole_SBX.as_strided(*noted)


def same_storage(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are views of one memory."""
    return a.untyped_storage()._cdata == b.untyped_storage()._cdata  # not addresses: fake tensors have none


class Send(torch.autograd.Function):
    """Starts to gather; in the backward pass, receives the sum of the gradients that `Receive` has sent.

    Whatever autograd does between the two, in either direction, runs beside the transfer.
    """

    @staticmethod
    def forward(ctx, own_TBX, transfer):
        ctx.transfer, ctx.dtype = transfer, own_TBX.dtype
        return transfer.gather(own_TBX)

    @staticmethod
    def backward(ctx, _):
        return ctx.transfer.arrived().to(ctx.dtype), None


class Receive(torch.autograd.Function):
    """The gathered rows in the order of the sequence; in the backward pass, sends their gradients."""

    @staticmethod
    def forward(ctx, rows_SBX, transfer):
        ctx.transfer = transfer
        return in_sequence(transfer.arrived(), transfer.num_ranks)

    @staticmethod
    def backward(ctx, grad_SBX):
        ctx.transfer.whole_SBX = None
        ctx.transfer.add_up(by_rank(grad_SBX, ctx.transfer.num_ranks))
        # `Send` takes its gradient from the transfer; between the two there is nothing to pass on.
        return grad_SBX.new_zeros(()).expand(grad_SBX.shape), None


class SendAgain(torch.autograd.Function):
    """Nothing forward; in the backward pass, starts to gather the keys once more."""

    @staticmethod
    def forward(ctx, y, transfer, *own):
        ctx.transfer = transfer
        ctx.save_for_backward(*own)
        return y.view_as(y)

    @staticmethod
    def backward(ctx, grad):
        ctx.transfer.gather(rows_of(ctx.saved_tensors))
        return grad, None, *([None] * len(ctx.saved_tensors))


def rows_of(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Keys, or keys and values, [B, G, T, C] -> what travels, [T, B, X]."""
    return torch.cat([x_BGTC.permute(2, 0, 1, 3).flatten(2) for x_BGTC in tensors], dim=2)


def in_sequence(rows_SX: torch.Tensor, num_ranks: int) -> torch.Tensor:
    """Rows held by rank after rank -> rows in the order of the sequence (any trailing axes)."""
    chunks = rows_SX.unflatten(0, (num_ranks, 2, -1))
    return torch.cat([chunks[:, 0], chunks[:, 1].flip(0)]).flatten(0, 1)


def by_rank(rows_SX: torch.Tensor, num_ranks: int) -> torch.Tensor:
    """The inverse of `in_sequence`."""
    chunks = rows_SX.unflatten(0, (2, num_ranks, -1))
    return torch.stack([chunks[0], chunks[1].flip(0)], dim=1).flatten(0, 2)


class Keys(NamedTuple):
    """A rank's own keys and values (one tensor where K = V), and those of all ranks on their way."""

    own: tuple[torch.Tensor, ...]
    rows_SBX: torch.Tensor
    transfer: Transfer

    def all(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the whole sequence, k_BGSC and v_BGSC; waits for them."""
        G, C = self.own[0].shape[1], self.own[0].shape[3]
        self.transfer.whole_SBX = Receive.apply(self.rows_SBX, self.transfer)
        rows = self.transfer.whole_SBX.split(G * C, dim=2)
        views = [x_SBX.unflatten(2, (G, C)).permute(1, 2, 0, 3) for x_SBX in rows]
        return views[0], views[-1]


class SplitContext:
    """Every sequence is split over the ranks of `group`; see the module.

    recomputed: every forward pass with a gradient is repeated right before its backward pass; otherwise a layer lets
    go of the other ranks' keys after its forward pass and gathers them again for the backward pass.
    """

    def __init__(self, group: dist.ProcessGroup, *, recomputed: bool) -> None:
        self.group = group
        self.num_ranks = dist.get_world_size(group)
        self.chunks = chunk_indices(dist.get_rank(group), self.num_ranks)
        self.recomputed = recomputed

    def share(self, k_BGTC: torch.Tensor, v_BGTC: torch.Tensor) -> Keys:
        own = (k_BGTC,) if k_BGTC is v_BGTC else (k_BGTC, v_BGTC)
        transfer = Transfer(self.group)
        return Keys(own, Send.apply(rows_of(own), transfer), transfer)

    def attend(
        self,
        q_BHTC: torch.Tensor,
        keys: Keys,
        start_BT: torch.Tensor | None,
        key_mask_BS: torch.Tensor | None,
        backend: str,
    ) -> torch.Tensor:
        assert key_mask_BS is None, "the model refuses key masks on split sequences"
        q, *own = (x.chunk(2, dim=2) for x in (q_BHTC, *keys.own))
        starts = (None, None) if start_BT is None else start_BT.chunk(2, dim=1)
        firsts = [index * q[0].shape[2] for index in self.chunks]
        # Where K = V, the first and the last are one object, as the kernels want to see it.
        newest = [own_keys(q[i], own[0][i], own[-1][i], starts[i], firsts[i], backend) for i in (0, 1)]
        k_BGSC, v_BGSC = keys.all()
        with self._saving(keys.transfer):
            o = [
                with_older(q[i], *newest[i], k_BGSC[:, :, : firsts[i]], v_BGSC[:, :, : firsts[i]], starts[i], backend)
                for i in (0, 1)
            ]
        keys.transfer.whole_SBX = None
        return torch.cat([x_BHUC.transpose(1, 2) for x_BHUC in o], dim=1).transpose(1, 2)

    def before_backward(self, y: torch.Tensor, keys: Keys) -> torch.Tensor:
        if not keys.transfer.let_go:
            return y
        return SendAgain.apply(y, keys.transfer, *keys.own)

    def _saving(self, transfer: Transfer) -> AbstractContextManager:
        if self.recomputed or not torch.is_grad_enabled():
            return nullcontext()
        return torch.autograd.graph.saved_tensors_hooks(transfer.note, transfer.recall)


def own_keys(
    q_BHUC: torch.Tensor,
    k_BGUC: torch.Tensor,
    v_BGUC: torch.Tensor,
    start_BU: torch.Tensor | None,
    first: int,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(o_BHUC, log_rem_BHU) of a chunk over its own keys, the first of which stands at `first`."""
    U = q_BHUC.shape[2]
    start_BU = None if start_BU is None else (start_BU - first).clamp(0, U)
    stop = DEFAULT_STOP[q_BHUC.dtype]
    return stickbreaking_attention(
        q_BHUC, k_BGUC, v_BGUC, start_BT=start_BU, stop=stop, return_log_rem=True, backend=backend
    )


def with_older(
    q_BHUC: torch.Tensor,
    o_BHUC: torch.Tensor,
    log_rem_BHU: torch.Tensor,
    k_BGSC: torch.Tensor,
    v_BGSC: torch.Tensor,
    start_BU: torch.Tensor | None,
    backend: str,
) -> torch.Tensor:
    """o_BHUC over a chunk's own keys, continued over the S older ones.

    Queries whose stick the own keys have used up, by the threshold at which the kernels end their walk, see no older
    keys: blocks of such queries cost nothing.
    """
    S = k_BGSC.shape[2]
    if S == 0:
        return o_BHUC
    stop = DEFAULT_STOP[q_BHUC.dtype]
    used_up_BU = log_rem_BHU.detach().amax(dim=1) <= math.log(stop)
    given = torch.zeros_like(used_up_BU, dtype=torch.int32) if start_BU is None else start_BU.clamp(max=S)
    older = stickbreaking_attention(
        q_BHUC,
        k_BGSC,
        v_BGSC,
        start_BT=given.masked_fill(used_up_BU, S),
        causal=False,
        stop=stop,
        return_log_rem=True,
        backend=backend,
    )
    return combine(o_BHUC, log_rem_BHU, *older)[0]


def make_context(mesh: Mesh, *, recomputed: bool) -> Context:
    """The context that this layout needs: no collective where no sequence is split. recomputed: see `SplitContext`."""
    return WHOLE if mesh.context_group is None else SplitContext(mesh.context_group, recomputed=recomputed)

"""The weights of all experts on every rank of a group, for as long as they multiply; the tokens stay where they are.

Shapes: L local experts, E experts of the group, R rows grouped by expert, D and F widths.

Forward, one all-gather. Backward, the weights are gathered again and the gradients added up and scattered to the ranks
whose experts they belong to. Which collectives run depends on the graph alone: a rank without a row runs the same.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist


class Loan:
    """All experts' weights, here between `fetch` and `give_back`."""

    def __init__(self, weight_LDF: torch.Tensor, group: dist.ProcessGroup) -> None:
        self.weight_LDF = weight_LDF
        self.group = group
        self.whole_EDF: torch.Tensor | None = None

    def fetch(self) -> torch.Tensor:
        """Gather them."""
        share = self.weight_LDF.detach().contiguous()
        self.whole_EDF = share.new_empty(share.shape[0] * dist.get_world_size(self.group), *share.shape[1:])
        dist.all_gather_into_tensor(self.whole_EDF, share, group=self.group)
        return self.whole_EDF

    def give_back(self) -> None:
        """Let go of them."""
        self.whole_EDF = None

    def note(self, saved: torch.Tensor) -> Any:
        """In place of a view of the whole weights: how to find it in them again. Another tensor stays what it is."""
        # Storages are told apart by themselves, not by their addresses: fake tensors have none.
        if self.whole_EDF is None or saved.untyped_storage()._cdata != self.whole_EDF.untyped_storage()._cdata:
            return saved
        return saved.size(), saved.stride(), saved.storage_offset()

    def recall(self, noted: Any) -> torch.Tensor:
        """What `note` was given."""
        if isinstance(noted, torch.Tensor):
            return noted
        assert self.whole_EDF is not None, "the weights are fetched before the product's backward pass"
        return self.whole_EDF.as_strided(*noted)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight_LDF, loan):
        ctx.loan = loan
        return loan.fetch()

    @staticmethod
    def backward(ctx, grad_EDF):
        ctx.loan.give_back()
        return scatter_gradient(grad_EDF, ctx.loan.group), None


class _FetchBefore(torch.autograd.Function):
    """Nothing forward; backward, the weights come before the product's own backward pass asks for them."""

    @staticmethod
    def forward(ctx, y_RF, loan):
        ctx.loan = loan
        return y_RF.view_as(y_RF)

    @staticmethod
    def backward(ctx, grad_RF):
        ctx.loan.fetch()
        return grad_RF, None


def scatter_gradient(grad_EDF: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The gradients of all ranks' products added up, in float32 or better; each rank gets those of its experts."""
    wide = grad_EDF.to(torch.promote_types(grad_EDF.dtype, torch.float32)).contiguous()
    share = wide.new_empty(wide.shape[0] // dist.get_world_size(group), *wide.shape[1:])
    dist.reduce_scatter_tensor(share, wide, group=group)
    return share.to(grad_EDF.dtype)


def with_all_experts(
    product: Callable[[torch.Tensor], torch.Tensor], weight_LDF: torch.Tensor, group: dist.ProcessGroup, *, keep: bool
) -> torch.Tensor:
    """product(weight_EDF), whose gradient reaches every rank's weight_LDF. Collective, forward and backward.

    keep: the gathered weights stay until the backward pass, for callers that compute this again right before it
    (activation checkpointing); otherwise they go with the return and are gathered again.
    """
    loan = Loan(weight_LDF, group)
    if keep or not torch.is_grad_enabled():
        y_RF = product(_Gather.apply(weight_LDF, loan))
        # What is kept, the product keeps; the graph would keep a repeated layer's weights from its first pass on.
        loan.give_back()
        return y_RF
    whole_EDF = _Gather.apply(weight_LDF, loan)
    with torch.autograd.graph.saved_tensors_hooks(loan.note, loan.recall):
        y_RF = product(whole_EDF)
    loan.give_back()
    return _FetchBefore.apply(y_RF, loan)

"""Rows between ranks while other work goes on: a transfer is begun, and finished where its rows are needed.

Shapes: R rows, D width, P ranks, L local experts.

Begin and finish are two nodes of the autograd graph. Backward, the finish begins the way back and the begin finishes
it: what was computed between them forward is differentiated between them backward. NCCL transfers on a stream of its
own, for which the model's stream (not the host) waits at the finish; gloo in threads of its own, for which the host
waits. All ranks run the same graph, so they meet in the same order.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megamf.points import reach


@dataclass
class Transfer:
    """How many rows go to and come from each of the P ranks of `group`, and what is under way."""

    send_P: list[int]
    receive_P: list[int]
    group: dist.ProcessGroup
    under_way: tuple[Any, torch.Tensor, torch.Tensor] | None = None

    def start(self, x_RD: torch.Tensor, send_P: list[int], receive_P: list[int]) -> torch.Tensor:
        """The buffer that rows of x, in rank order, arrive in; not to be read before `wait`."""
        reach("dispatch")
        x_RD = x_RD.contiguous()
        received = x_RD.new_empty(sum(receive_P), *x_RD.shape[1:])
        work = dist.all_to_all_single(received, x_RD, receive_P, send_P, group=self.group, async_op=True)
        # What is sent has to outlive the transfer.
        self.under_way = (work, received, x_RD)
        return received

    def wait(self) -> torch.Tensor:
        """The rows that arrived (on a GPU the current stream waits for them, the host goes on)."""
        assert self.under_way is not None, "a transfer is finished once, after it was begun"
        work, received, _ = self.under_way
        work.wait()
        self.under_way = None
        return received


class _Begin(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_RD, transfer):
        ctx.transfer = transfer
        return transfer.start(x_RD, transfer.send_P, transfer.receive_P)

    @staticmethod
    def backward(ctx, _):
        return ctx.transfer.wait(), None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx, received, transfer):
        ctx.transfer = transfer
        transfer.wait()
        return received.view_as(received)

    @staticmethod
    def backward(ctx, grad_RD):
        transfer = ctx.transfer
        transfer.start(grad_RD, transfer.receive_P, transfer.send_P)
        # Autograd wants rows as they came; those that go back have other numbers and travel in the transfer.
        return grad_RD, None


def begin(x_RD: torch.Tensor, transfer: Transfer) -> torch.Tensor:
    """x_RD, rows in rank order -> the buffer of what the ranks send here, for `finish` alone."""
    return _Begin.apply(x_RD, transfer)


def finish(received: torch.Tensor, transfer: Transfer) -> torch.Tensor:
    """What `begin` returned -> the rows from the ranks, in rank order."""
    return _Finish.apply(received, transfer)


class CountExchange:
    """Rows per (rank, local expert) to send, exchanged against those to receive; begun when made.

    On a GPU the host learns the numbers by one copy into pinned memory, queued on `stream` behind the exchange: asking
    for `splits` waits for that copy alone, not for what the model's stream was given since.
    """

    def __init__(self, send_PL: torch.Tensor, group: dist.ProcessGroup, stream: Any = None) -> None:
        self.send_PL = send_PL
        self.receive_PL = torch.empty_like(send_PL)
        self.work = dist.all_to_all_single(self.receive_PL, send_PL, group=group, async_op=True)
        self.copied = None
        if stream is not None:
            self._copy_to_host(stream)

    def _copy_to_host(self, stream: Any) -> None:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.work.wait()
            self.device_splits = torch.stack([self.send_PL.sum(1), self.receive_PL.sum(1)])
            self.host_splits = pinned(self.device_splits.shape)
            self.host_splits.copy_(self.device_splits, non_blocking=True)
            self.copied = torch.cuda.Event()
            self.copied.record(stream)

    def splits(self) -> tuple[list[int], list[int]]:
        """(rows to, rows from) each rank; from here on `receive_PL` may be read on the current stream."""
        if self.copied is None:
            self.work.wait()
            return self.send_PL.sum(1).tolist(), self.receive_PL.sum(1).tolist()
        self.copied.synchronize()
        torch.cuda.current_stream().wait_event(self.copied)
        send_P, receive_P = self.host_splits.tolist()
        return send_P, receive_P


def pinned(shape: torch.Size) -> torch.Tensor:
    """int64 in host memory that a GPU copies to by itself."""
    return torch.empty(shape, dtype=torch.int64, pin_memory=True)

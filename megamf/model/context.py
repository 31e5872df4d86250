"""Where the keys of a sequence are: the interface that attention relies on, and its one-process form.

Shapes: B batch, T query time, S key time, H query heads, G key/value heads, C head channels.

A context is handed to the model, which knows no process group. `megamf.parallel.context` has the form for sequences
that are split over ranks.
"""

from typing import Any, Protocol

import torch

from megamf.ops.stickbreaking import stickbreaking_attention, stickbreaking_decode


class Context(Protocol):
    """What attention asks of a context. `num_ranks`: over how many ranks each sequence is split."""

    num_ranks: int

    def share(self, k_BGSC: torch.Tensor, v_BGSC: torch.Tensor) -> Any:
        """Offer this process's keys and values (one object where K = V); returns what `attend` wants. May only begin
        to send them: collective where ranks are involved."""

    def attend(
        self,
        q_BHTC: torch.Tensor,
        keys: Any,
        start_BT: torch.Tensor | None,
        key_mask_BS: torch.Tensor | None,
        backend: str,
    ) -> torch.Tensor:
        """o_BHTC over all keys up to each query, wherever they are. start_BT, key_mask_BS: see
        `stickbreaking_attention`, with positions in the whole sequence."""

    def before_backward(self, y: torch.Tensor, keys: Any) -> torch.Tensor:
        """y, made of what `attend` returned, as it is; its backward pass may begin with sending `keys` again."""


class LocalContext:
    """Whole sequences in this process."""

    num_ranks = 1

    def share(self, k_BGSC: torch.Tensor, v_BGSC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return k_BGSC, v_BGSC

    def attend(
        self,
        q_BHTC: torch.Tensor,
        keys: tuple[torch.Tensor, torch.Tensor],
        start_BT: torch.Tensor | None,
        key_mask_BS: torch.Tensor | None,
        backend: str,
    ) -> torch.Tensor:
        """One query without gradient takes the decoding kernel."""
        k_BGSC, v_BGSC = keys
        if q_BHTC.shape[2] == 1 and not torch.is_grad_enabled():
            start_B = None if start_BT is None else start_BT[:, 0]
            o_BHC = stickbreaking_decode(
                q_BHTC[:, :, 0], k_BGSC, v_BGSC, start_B=start_B, key_mask_BS=key_mask_BS, backend=backend
            )
            return o_BHC.unsqueeze(2)
        options = {"start_BT": start_BT, "key_mask_BS": key_mask_BS, "backend": backend}
        return stickbreaking_attention(q_BHTC, k_BGSC, v_BGSC, **options)

    def before_backward(self, y: torch.Tensor, keys: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return y


WHOLE = LocalContext()

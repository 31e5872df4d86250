"""What a training engine wraps: the model together with what is computed of its output.

Shapes: B batch, T time.
"""

from typing import Literal

import torch
from torch import nn

from megamf.model.losses import Packed, pack, routing_norm
from megamf.model.moduleformer import ModuleFormer
from megamf.model.router import Router

Rows = Literal["none", "all", "inserted"]


class Objective(nn.Module):
    """From a micro batch to the sums that losses are made of; knows neither weights of losses nor ranks."""

    def __init__(self, model: ModuleFormer, loss_chunk: int, *, measure_rows: Rows = "none") -> None:
        super().__init__()
        self.model = model
        self.loss_chunk = loss_chunk
        self.measure_rows = measure_rows
        self.measured = [m for m in model.modules() if isinstance(m, Router)] if measure_rows != "none" else []

    def forward(
        self, input_BT: torch.Tensor, label_BT: torch.Tensor | None, start_BT: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, Packed | None, torch.Tensor | None]:
        """Sum of the cross entropy over labels that are not -100 (scalar), the router sums, and the routing norm.

        The first is None without labels (the head is not run), the second when dense, the third where `measure_rows`
        is none; else it is of all rows of the routers, or of those of inserted experts.
        Parameters may be in pieces outside of this call and of their module's: every use of them is inside.
        """
        output = self.model(input_BT, start_BT=start_BT)
        loss = None
        if label_BT is not None:
            loss = self.model.lm_head(output.hidden_BTD.flatten(0, 1), label_BT.flatten(), self.loss_chunk)
        norm = None
        if self.measured:
            inserted = self.measure_rows == "inserted"
            norm = routing_norm([router.new_rows() if inserted else router.expert_rows() for router in self.measured])
        return loss, pack(output.stats) if output.stats else None, norm

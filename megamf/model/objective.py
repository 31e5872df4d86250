"""What a training engine wraps: the model together with what is computed of its output.

Shapes: B batch, T time.
"""

import torch
from torch import nn

from megamf.model.losses import Packed, cross_entropy_sum, pack
from megamf.model.moduleformer import ModuleFormer


class Objective(nn.Module):
    """From a micro batch to the sums that losses are made of; knows neither weights of losses nor ranks."""

    def __init__(self, model: ModuleFormer, loss_chunk: int) -> None:
        super().__init__()
        self.model = model
        self.loss_chunk = loss_chunk

    def forward(
        self, input_BT: torch.Tensor, label_BT: torch.Tensor, start_BT: torch.Tensor | None
    ) -> tuple[torch.Tensor, Packed | None]:
        """Sum of the cross entropy over labels that are not -100 (scalar), and the router sums (None when dense)."""
        output = self.model(input_BT, start_BT=start_BT)
        loss = cross_entropy_sum(
            output.hidden_BTD.flatten(0, 1), self.model.lm_head.weight, label_BT.flatten(), self.loss_chunk
        )
        return loss, pack(output.stats) if output.stats else None

    def router_sums(self, input_BT: torch.Tensor, start_BT: torch.Tensor | None) -> Packed:
        """The router sums alone, without the head."""
        return pack(self.model(input_BT, start_BT=start_BT).stats)

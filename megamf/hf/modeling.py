"""The Hugging Face classes on megamf's own blocks: same parameters and heads as the portable file, fast operations.

Shapes: B batch, T query time, S key time, D width.
"""

from typing import Any

import torch

from megamf.hf.configuration import to_model_config
from megamf.hf.portable import modeling_moduleformer as portable
from megamf.hf.portable.configuration_moduleformer import ModuleFormerConfig
from megamf.model.block import Block
from megamf.model.dispatch import LocalDispatcher
from megamf.model.losses import balance_terms, pack


class ModuleFormerBlock(Block):
    """A megamf block that takes the place of the portable one."""

    def __init__(self, config: ModuleFormerConfig) -> None:
        super().__init__(to_model_config(config), LocalDispatcher())
        # As in the released code: everything that is not `mi` means the switch loss.
        self.loss_type = "mi" if config.aux_loss_type == "mi" else "switch"

    def forward(
        self, h_BTD: torch.Tensor, key_mask_BS: torch.Tensor | None, cache: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """h_BTD -> h_BTD and the sum of the two routers' auxiliary losses. `cache` has `append` as in LayerCache."""
        h_BTD, *stats = super().forward(h_BTD, None, key_mask_BS, cache)
        sums = pack(stats)
        return h_BTD, balance_terms(sums, sums)[self.loss_type]


class ModuleFormerModel(portable.ModuleFormerModel):
    """Embedding, blocks and final norm."""

    _no_split_modules = ["ModuleFormerBlock"]  # noqa: RUF012

    def make_block(self, config: ModuleFormerConfig) -> ModuleFormerBlock:
        return ModuleFormerBlock(config)


class ModuleFormerForCausalLM(portable.ModuleFormerForCausalLM):
    """The language model."""

    backbone_class = ModuleFormerModel


class ModuleFormerForSequenceClassification(portable.ModuleFormerForSequenceClassification):
    """A linear head on the last token that is not padding."""

    backbone_class = ModuleFormerModel

"""Models that are looked at one block at a time: data go through layer by layer, the other layers stay on the disk.

Shapes: B windows, T tokens, D width.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch

from megamf.evaluate.weights import Weights, expected_shapes
from megamf.model import ModuleFormer

# Hidden states of so many tokens are in memory together: the layers are read once for each such group.
GROUP_TOKENS = 2**16

Batch = tuple[torch.Tensor, torch.Tensor]
"""input_BT and start_BT."""


class StreamedModel(ModuleFormer):
    """A ModuleFormer whose blocks are read from `weights` when they are used; one of them is in memory at a time.

    Embedding, final norm and head always are. `weights` must stay open. For inference alone. Raises UserError, naming
    tensors, where `weights` are not those of the model they say they are.
    """

    def __init__(self, weights: Weights, dtype: torch.dtype, device: torch.device | str) -> None:
        weights.check(expected_shapes(weights.model))
        with torch.device("meta"):
            super().__init__(weights.model)
        self.to(dtype).eval().requires_grad_(False)
        self._weights, self._device, self._present = weights, device, None
        for layer, block in enumerate(self.transformer.h):
            block.register_forward_pre_hook(partial(self._before, layer))
        for prefix in ("transformer.wte", "transformer.ln_f", "lm_head"):
            self._read(prefix)

    def bring(self, layer: int) -> None:
        """Have the weights of this block in memory, and of no other."""
        if self._present == layer:
            return
        if self._present is not None:
            self.transformer.h[self._present].to("meta")
        self._present = layer
        self._read(f"transformer.h.{layer}")

    def _before(self, layer: int, *_: object) -> None:
        self.bring(layer)

    @torch.no_grad()
    def _read(self, prefix: str) -> None:
        part = self.get_submodule(prefix).to_empty(device=self._device)
        for name, parameter in part.named_parameters():
            parameter.copy_(self._weights.read(f"{prefix}.{name}"))


def bring(model: ModuleFormer, layer: int) -> None:
    """Before the weights of a block are used outside a forward pass."""
    if isinstance(model, StreamedModel):
        model.bring(layer)


@torch.no_grad()
def layer_by_layer(
    model: ModuleFormer, plan: Iterable[Batch], on_block: Callable[[int, int], None] | None = None
) -> None:
    """Send all batches through one block before the next; what hooks see of a block is as in forward passes.

    `on_block(done, total)` counts batches times blocks.
    """
    device, blocks = model.lm_head.weight.device, model.transformer.h
    plan = list(plan)
    done, total = 0, len(plan) * len(blocks)
    for group in _groups(plan):
        starts = [start_BT.to(device) for _, start_BT in group]
        hidden = [model.transformer.wte(input_BT.to(device)) for input_BT, _ in group]
        for block in blocks:
            for number, start_BT in enumerate(starts):
                hidden[number] = block(hidden[number], start_BT)[0]
                done += 1
                if on_block is not None:
                    on_block(done, total)


def _groups(plan: list[Batch]) -> Iterator[list[Batch]]:
    group, tokens = [], 0
    for batch in plan:
        if group and tokens + batch[0].numel() > GROUP_TOKENS:
            yield group
            group, tokens = [], 0
        group.append(batch)
        tokens += batch[0].numel()
    if group:
        yield group

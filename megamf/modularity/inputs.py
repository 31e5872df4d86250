"""What the modules of every place are given on data.

Shapes: N tokens, D width.
"""

from pathlib import Path

import torch

from megamf.data.indexed import IndexedDataset
from megamf.errors import UserError
from megamf.evaluate.perplexity import Windows
from megamf.model import ModuleFormer
from megamf.modularity.places import Place, places
from megamf.modularity.statistics import batches
from megamf.modularity.streamed import layer_by_layer


@torch.no_grad()
def module_inputs(model: ModuleFormer, prefix: str | Path, seq_len: int, tokens: int) -> dict[Place, torch.Tensor]:
    """Place -> x_ND after the layer norm, of the first `tokens` tokens of PREFIX; UserError where it has none."""
    seen: dict[Place, list[torch.Tensor]] = {place: [] for place in places(model.config)}
    hooks = []
    for place, kept in seen.items():
        block = model.get_submodule(f"transformer.h.{place.layer}")
        norm = block.ln_1 if place.kind == "attention" else block.ln_2
        hooks.append(norm.register_forward_hook(lambda _, __, out, kept=kept: kept.append(out.flatten(0, 1))))
    count, plan = 0, []
    try:
        with IndexedDataset(prefix) as dataset:
            for batch in batches(Windows(dataset, seq_len), 1, None, model.config.vocab_size):
                plan.append(batch)
                count += batch[0].numel()
                if count >= tokens:
                    break
        layer_by_layer(model, plan)
    finally:
        for hook in hooks:
            hook.remove()
    if not count:
        raise UserError(f"{prefix} holds fewer than two tokens: nothing to look at")
    return {place: torch.cat(kept)[:tokens] for place, kept in seen.items()}

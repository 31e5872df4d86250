"""A ModuleFormer whose experts lost neurons of their own: loads with `trust_remote_code=True`.

Shapes: N tokens (with their copies), D width, F width of a layer's experts as it is computed.

`config.pruned_layers` has one entry a layer: `ffn`, `queries` and `outputs`, each null where nothing is gone, else the
number of neurons that every expert has left. Weights of all experts of a layer stand side by side and hold what is left
and nothing else. Keys and values are shared by the attention experts and whole; an expert's query and output projection
name the channels that they have.
"""

import torch
from torch import nn

from .configuration_moduleformer import ModuleFormerConfig
from .modeling_moduleformer import ModuleFormerForCausalLM


class PrunedModuleFormerConfig(ModuleFormerConfig):
    model_type = "pruned_moduleformer"

    def __init__(self, pruned_layers=None, **kwargs):
        self.pruned_layers = pruned_layers
        super().__init__(**kwargs)


class RaggedLinear(nn.Module):
    """One linear map for every expert, of its own number of hidden channels.

    `inner`: True for the maps D -> hidden (weight [D, sum of sizes]), False for hidden -> D (weight [sum of sizes, D]).
    `hidden`: channels of the hidden side as the others see it. `named`: the channels are any of these, kept in
    `channels`; otherwise they are the first ones.
    """

    def __init__(self, sizes, width, hidden, inner, named):
        super().__init__()
        self.sizes, self.hidden, self.inner = list(sizes), hidden, inner
        shape = (width, sum(sizes)) if inner else (sum(sizes), width)
        self.weight = nn.Parameter(torch.empty(shape))
        if named:
            self.register_buffer("channels", torch.zeros(sum(sizes), dtype=torch.int64))
        else:
            self.channels = None

    def forward(self, x, expert_N):
        """Row n through expert expert_N[n]."""
        out = x.new_zeros(x.shape[0], self.hidden if self.inner else self.weight.shape[1])
        start = 0
        for expert, size in enumerate(self.sizes):
            rows = (expert_N == expert).nonzero().flatten()
            part = slice(start, start + size)
            start += size
            if not size or not rows.numel():
                continue
            own = torch.arange(size, device=x.device) if self.channels is None else self.channels[part]
            if self.inner:
                spread = x.new_zeros(rows.numel(), self.hidden).index_copy(1, own, x[rows] @ self.weight[:, part])
                out = out.index_copy(0, rows, spread)
            else:
                out = out.index_copy(0, rows, x[rows][:, own] @ self.weight[part])
        return out


def narrow(model):
    """Give the experts of a new model the sizes that its configuration names."""
    config = model.config
    if config.pruned_layers is None or len(config.pruned_layers) != config.n_layer:
        found = "none" if config.pruned_layers is None else len(config.pruned_layers)
        raise ValueError(f"config.pruned_layers has {found} entries, the model has {config.n_layer} layers")
    for block, sizes in zip(model.transformer.h, config.pruned_layers):
        if sizes["ffn"] is not None:
            wide = max(sizes["ffn"])
            block.mlpf.experts = RaggedLinear(sizes["ffn"], config.n_embd, wide, True, False)
            block.mlpf.output_experts = RaggedLinear(sizes["ffn"], config.n_embd, wide, False, False)
        routed = block.attn.q_proj
        if sizes["queries"] is not None:
            routed.experts = RaggedLinear(sizes["queries"], config.n_embd, config.att_hidden, True, True)
        if sizes["outputs"] is not None:
            routed.output_experts = RaggedLinear(sizes["outputs"], config.n_embd, config.att_hidden, False, True)


class PrunedModuleFormerForCausalLM(ModuleFormerForCausalLM):
    """The language model."""

    config_class = PrunedModuleFormerConfig

    def __init__(self, config):
        super().__init__(config)
        narrow(self)

"""The ModuleFormer: embedding, blocks, final norm, and an untied head; also its dense baselines.

Shapes: B batch, T query time, S key time, D width, V vocabulary.
Parameter names are exactly those of the public checkpoints (without their mask buffers).
"""

from typing import NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from megamf.config import ModelConfig
from megamf.model.backends import AUTOMATIC, Backends
from megamf.model.block import Block
from megamf.model.cache import Cache
from megamf.model.context import Context, LocalContext
from megamf.model.dispatch import Dispatcher, LocalDispatcher
from megamf.model.gpt_neox import GptNeoxBlock
from megamf.model.losses import cross_entropy_sum
from megamf.model.mlp import ExpertMlp
from megamf.model.router import RouterStats


class Output(NamedTuple):
    """hidden_BTD after the final norm; statistics of every router, layer by layer, attention before MLP."""

    hidden_BTD: torch.Tensor
    stats: list[RouterStats]


class Backbone(nn.Module):
    """Everything but the head: `wte`, `h`, `ln_f`. There is no positional encoding, save in GPT-NeoX blocks."""

    def __init__(
        self,
        config: ModelConfig,
        dispatcher: Dispatcher | None = None,
        backends: Backends = AUTOMATIC,
        context: Context | None = None,
        *,
        attention_dispatcher: Dispatcher | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        dispatcher, self.context = dispatcher or LocalDispatcher(), context or LocalContext()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.embedding_dropout = nn.Dropout(config.embd_pdrop)
        if config.kind == "gpt_neox":
            self.h = nn.ModuleList(GptNeoxBlock(config, backends) for _ in range(config.n_layer))
        else:
            self.h = nn.ModuleList(
                Block(config.of_layer(i), dispatcher, backends, self.context, attention_dispatcher=attention_dispatcher)
                for i in range(config.n_layer)
            )
        self.ln_f = backends.layer_norm(config.n_embd, config.layer_norm_epsilon)
        self.recompute_blocks = False

    def forward(
        self,
        input_BT: torch.Tensor | None = None,
        *,
        start_BT: torch.Tensor | None = None,
        key_mask_BS: torch.Tensor | None = None,
        cache: Cache | None = None,
        embedding_BTD: torch.Tensor | None = None,
    ) -> Output:
        """Token ids input_BT (int64), or their embeddings -> Output.

        start_BT and key_mask_BS as in `stickbreaking_attention`, over the keys of the cache and then of this call.
        With a cache, earlier positions are seen but carry no gradient (segment history).
        Raises ValueError for a cache or a key mask where sequences are split over ranks.
        """
        if self.context.num_ranks > 1 and not (cache is None and key_mask_BS is None):
            given = "a key mask" if cache is None else "a cache (decoding, segment history)"
            raise ValueError(
                f"sequences are split over {self.context.num_ranks} ranks (parallel.context), and this forward pass "
                f"was given {given}: use parallel.context=1 for it"
            )
        h_BTD = self.embedding_dropout(self.wte(input_BT) if embedding_BTD is None else embedding_BTD)
        stats: list[RouterStats] = []
        recompute = self.recompute_blocks and self.training and torch.is_grad_enabled() and cache is None
        for i, block in enumerate(self.h):
            layer_cache = None if cache is None else cache.layers[i]
            if recompute:
                h_BTD, *found = checkpoint(block, h_BTD, start_BT, key_mask_BS, use_reentrant=False)
            else:
                h_BTD, *found = block(h_BTD, start_BT, key_mask_BS, layer_cache)
            stats.extend(item for item in found if item is not None)
        return Output(self.ln_f(h_BTD), stats)


class Head(nn.Linear):
    """The language-model head: logits, or the summed cross entropy without ever holding all logits."""

    def forward(
        self, hidden: torch.Tensor, label_N: torch.Tensor | None = None, chunk: int | None = None
    ) -> torch.Tensor:
        """hidden [..., D] -> logits [..., V]; with labels hidden_ND -> scalar, see `cross_entropy_sum`."""
        if label_N is None:
            return super().forward(hidden)
        return cross_entropy_sum(hidden, self.weight, label_N, chunk or hidden.shape[0])


class ModuleFormer(nn.Module):
    """Backbone `transformer` and language-model head `lm_head`.

    With a distributed dispatcher (attention experts may have one of their own) the expert tensors hold the local
    experts only; with a distributed context every row holds this rank's part of a sequence. Weights are uninitialised
    until `megamf.model.init.initialise` or a checkpoint fills them.
    """

    def __init__(
        self,
        config: ModelConfig,
        dispatcher: Dispatcher | None = None,
        backends: Backends = AUTOMATIC,
        context: Context | None = None,
        *,
        attention_dispatcher: Dispatcher | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.transformer = Backbone(config, dispatcher, backends, context, attention_dispatcher=attention_dispatcher)
        self.lm_head = Head(config.n_embd, config.vocab_size, bias=False)

    def forward(self, input_BT: torch.Tensor, **kwargs) -> Output:
        """See `Backbone.forward`; the head is applied apart, by `logits` or by the chunked loss."""
        return self.transformer(input_BT, **kwargs)

    def logits(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """hidden_BTD -> logits_BTV."""
        return self.lm_head(hidden_BTD)

    def new_cache(self) -> Cache:
        """An empty cache for decoding or for segments with history."""
        return Cache(self.config.n_layer)

    def set_activation_checkpointing(self, mode: str) -> None:
        """`none`; `experts`: recompute inside the MLP experts; `full`: recompute every block."""
        if mode not in ("none", "experts", "full"):
            raise ValueError(f"activation checkpointing mode {mode!r} is not one of none, experts, full")
        self.transformer.recompute_blocks = mode == "full"
        for module in self.modules():
            if isinstance(module, ExpertMlp):
                module.recompute = mode == "experts"

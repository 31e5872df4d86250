"""One pre-norm layer: h + MoA(LN1 h), then h + MLP(LN2 h).

Shapes: B batch, T query time, S key time, D width.
"""

import torch
from torch import nn

from megamf.config import ModelConfig
from megamf.model.attention import DenseAttention, ExpertAttention
from megamf.model.backends import AUTOMATIC, Backends
from megamf.model.cache import LayerCache
from megamf.model.context import WHOLE, Context
from megamf.model.dispatch import Dispatcher
from megamf.model.mlp import DenseMlp, ExpertMlp
from megamf.model.router import RouterStats


class Block(nn.Module):
    """Attention and feed-forward with residuals, sparse or dense as `config.kind` says."""

    def __init__(
        self,
        config: ModelConfig,
        dispatcher: Dispatcher,
        backends: Backends = AUTOMATIC,
        context: Context = WHOLE,
        *,
        attention_dispatcher: Dispatcher | None = None,
    ) -> None:
        super().__init__()
        self.ln_1 = backends.layer_norm(config.n_embd, config.layer_norm_epsilon)
        if not config.sparse:
            self.attn = DenseAttention(config, backends, context)
        else:
            self.attn = ExpertAttention(config, attention_dispatcher or dispatcher, backends, context)
        self.ln_2 = backends.layer_norm(config.n_embd, config.layer_norm_epsilon)
        self.mlpf = ExpertMlp(config, dispatcher, backends) if config.sparse else DenseMlp(config)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(
        self,
        h_BTD: torch.Tensor,
        start_BT: torch.Tensor | None = None,
        key_mask_BS: torch.Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> tuple[torch.Tensor, RouterStats | None, RouterStats | None]:
        """h_BTD -> h_BTD and the statistics of the attention and the MLP router (None in a dense block)."""
        y_BTD, attention_stats = self.attn(self.ln_1(h_BTD), start_BT, key_mask_BS, cache)
        h_BTD = h_BTD + self.resid_dropout(y_BTD)
        y_BTD, mlp_stats = self.mlpf(self.ln_2(h_BTD))
        return h_BTD + self.resid_dropout(y_BTD), attention_stats, mlp_stats

"""Configuration of a ModuleFormer language model, in the field names of the released checkpoints."""

import copy

from transformers import PreTrainedConfig


class ModuleFormerConfig(PreTrainedConfig):
    """Sizes and switches of a ModuleFormer; defaults are those of MoLM-350M-4B.

    n_head: heads inside each attention expert. att_hidden: attention width of one expert. ffd_hidden: hidden width
    of one MLP expert. k_att, k_mlp: experts a token uses, of n_att_experts and n_mlp_experts. gate_type: `mlp`,
    `linear`, `gmm` or `tanh`; gating_size: the router's width. aux_loss_type: `mi` (mutual information) or `switch`
    (with z-loss); its sum over all routers times aux_loss_weight is added to the loss. sample_topk: how many of the k
    are drawn at random in training. n_att_experts_per_layer, n_mlp_experts_per_layer: lists, only in models whose
    layers differ (n_att_experts and n_mlp_experts are then the largest numbers). block_size, history_length: the
    segments of the original training; neither limits the context. n_ctx: their reach through all layers. Other
    fields of released files are kept as they are.
    Raises ValueError for sizes that contradict each other.
    """

    model_type = "moduleformer"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012
    attribute_map = {  # noqa: RUF012
        "hidden_size": "n_embd",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
        "max_position_embeddings": "n_ctx",
    }

    def __init__(
        self,
        vocab_size=50295,
        n_layer=24,
        n_embd=1024,
        n_head=1,
        att_hidden=1024,
        ffd_hidden=2048,
        n_att_experts=16,
        n_mlp_experts=32,
        k_att=2,
        k_mlp=2,
        gate_type="mlp",
        gating_size=256,
        activation_function="gelu_new",
        layer_norm_epsilon=1e-5,
        initializer_range=0.02,
        sample_topk=0,
        aux_loss_type="mi",
        aux_loss_weight=0.0,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
        moe_pdrop=0.0,
        block_size=512,
        history_length=512,
        n_ctx=None,
        n_att_experts_per_layer=None,
        n_mlp_experts_per_layer=None,
        use_cache=True,
        bos_token_id=50256,
        eos_token_id=50256,
        pad_token_id=None,
        tie_word_embeddings=False,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.n_layer = n_layer
        self.n_embd = n_embd
        self.n_head = n_head
        self.att_hidden = att_hidden
        self.ffd_hidden = ffd_hidden
        self.n_att_experts = n_att_experts
        self.n_mlp_experts = n_mlp_experts
        self.k_att = k_att
        self.k_mlp = k_mlp
        self.gate_type = gate_type
        self.gating_size = gating_size
        self.activation_function = activation_function
        self.layer_norm_epsilon = layer_norm_epsilon
        self.initializer_range = initializer_range
        self.sample_topk = sample_topk
        self.aux_loss_type = aux_loss_type
        self.aux_loss_weight = aux_loss_weight
        self.attn_pdrop = attn_pdrop
        self.embd_pdrop = embd_pdrop
        self.resid_pdrop = resid_pdrop
        self.moe_pdrop = moe_pdrop
        self.block_size = block_size
        self.history_length = history_length
        self.n_ctx = history_length * n_layer if n_ctx is None else n_ctx
        # Absent where layers are alike, so that the file is that of the released models.
        if n_att_experts_per_layer is not None:
            self.n_att_experts_per_layer = list(n_att_experts_per_layer)
        if n_mlp_experts_per_layer is not None:
            self.n_mlp_experts_per_layer = list(n_mlp_experts_per_layer)
        self.use_cache = use_cache
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.pad_token_id = pad_token_id
        self.tie_word_embeddings = tie_word_embeddings
        super().__init__(**kwargs)
        # Since transformers 5 the base class sets these three from its own defaults when it is not given them.
        self.bos_token_id, self.eos_token_id, self.pad_token_id = bos_token_id, eos_token_id, pad_token_id
        self._check()

    @property
    def shares_kv(self):
        """True where keys and values are the normalised input itself: no key and value projections exist."""
        return self.att_hidden == self.n_embd and self.n_head == 1

    def of_layer(self, layer):
        """The configuration that one layer is built from: its own numbers of experts."""
        own = copy.copy(self)
        for name in ("n_att_experts", "n_mlp_experts"):
            per_layer = getattr(self, f"{name}_per_layer", None)
            if per_layer is not None:
                setattr(own, name, per_layer[layer])
                delattr(own, f"{name}_per_layer")
        return own

    def _check(self):
        if self.att_hidden % self.n_head:
            raise ValueError(f"att_hidden={self.att_hidden} is not divisible by n_head={self.n_head}")
        if self.gate_type not in ("mlp", "linear", "gmm", "tanh"):
            raise ValueError(f"gate_type={self.gate_type!r} is not one of mlp, linear, gmm, tanh")
        for kind in ("att", "mlp"):
            k, experts = getattr(self, f"k_{kind}"), getattr(self, f"n_{kind}_experts")
            if not 1 <= k <= experts:
                raise ValueError(f"k_{kind}={k} is outside 1..n_{kind}_experts={experts}")
            if not 0 <= self.sample_topk <= k:
                raise ValueError(f"sample_topk={self.sample_topk} is outside 0..k_{kind}={k}")
            per_layer = getattr(self, f"n_{kind}_experts_per_layer", None)
            if per_layer is not None and (
                len(per_layer) != self.n_layer or max(per_layer) != experts or min(per_layer) < k
            ):
                raise ValueError(
                    f"n_{kind}_experts_per_layer={per_layer} does not fit n_layer={self.n_layer}, "
                    f"n_{kind}_experts={experts} and k_{kind}={k}"
                )

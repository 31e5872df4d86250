"""The architecture of one model, in the field names of the public ModuleFormer `config.json`."""

from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from megamf.config.base import Section

Activation = Literal["gelu_new", "gelu", "relu", "silu"]
GateType = Literal["mlp", "linear", "gmm", "tanh"]
NEOX_FIELDS = ("parallel_residual", "rotary_fraction", "rotary_base")


class ModelConfig(Section):
    """Sizes and switches of a ModuleFormer (`kind: moduleformer`) or of a dense baseline: its own (`kind: dense`), or
    GPT-NeoX with softmax attention and rotary positions (`kind: gpt_neox`, the family of the Pythia models).

    Defaults are those of the released MoLM-350M-4B. For dense kinds the expert fields (`n_att_experts`,
    `n_mlp_experts`, `k_att`, `k_mlp`, `gate_type`, `gating_size`, `sample_topk`, `moe_pdrop`) must not be set. The
    fields of GPT-NeoX (`parallel_residual`, `rotary_fraction`, `rotary_base`) must all be given for it, and for no
    other kind; its attention is as wide as the model.
    """

    kind: Literal["moduleformer", "dense", "gpt_neox"] = "moduleformer"
    vocab_size: PositiveInt = 50295
    n_layer: PositiveInt = 24
    n_embd: PositiveInt = 1024
    n_head: PositiveInt = Field(1, description="heads inside each attention expert")
    att_hidden: PositiveInt = Field(1024, description="attention width of one expert: n_head * head channels")
    ffd_hidden: PositiveInt = Field(2048, description="hidden width of one MLP expert")
    n_att_experts: PositiveInt = 16
    n_mlp_experts: PositiveInt = 32
    n_att_experts_per_layer: list[PositiveInt] | None = Field(
        None, description="where layers differ (pruned models): each layer's number; n_att_experts is the largest"
    )
    n_mlp_experts_per_layer: list[PositiveInt] | None = Field(None, description="likewise for MLP experts")
    k_att: PositiveInt = 2
    k_mlp: PositiveInt = 2
    gate_type: GateType = "mlp"
    gating_size: PositiveInt = 256
    activation_function: Activation = "gelu_new"
    layer_norm_epsilon: float = Field(1e-5, gt=0)
    initializer_range: float = Field(0.02, gt=0)
    sample_topk: int = Field(0, ge=0, description="how many of the top k are drawn at random in training")
    embd_pdrop: float = Field(0.0, ge=0, lt=1)
    resid_pdrop: float = Field(0.0, ge=0, lt=1)
    moe_pdrop: float = Field(0.0, ge=0, lt=1)
    block_size: PositiveInt = Field(512, description="training segment length, informational in the public layout")
    history_length: int = Field(
        512,
        ge=0,
        description="earlier tokens a segment may see, informational like block_size: training rows stand alone",
    )
    bos_token_id: int | None = 50256
    eos_token_id: int | None = 50256
    parallel_residual: bool | None = Field(
        None, description="gpt_neox: attention and MLP both read the block's input; false: one after the other"
    )
    rotary_fraction: float | None = Field(
        None, gt=0, le=1, description="gpt_neox: share of a head's channels that turn with the position"
    )
    rotary_base: float | None = Field(None, gt=1, description="gpt_neox: base of the angular frequencies")

    @property
    def sparse(self) -> bool:
        """Whether there are experts, and routers that choose among them."""
        return self.kind == "moduleformer"

    @property
    def rotary_channels(self) -> int:
        """Channels of a head that turn with the position, of a GPT-NeoX: an even number."""
        assert self.rotary_fraction is not None
        return int(self.head_dim * self.rotary_fraction)

    @property
    def head_dim(self) -> int:
        """Channels C of one head."""
        return self.att_hidden // self.n_head

    @property
    def shares_kv(self) -> bool:
        """True where K = V = the normalised input (identity projections), as in all released models."""
        return self.sparse and self.att_hidden == self.n_embd and self.n_head == 1

    def num_experts(self, layer: int, kind: str) -> int:
        """Experts of one layer; kind: `attention` or `mlp`. Raises ValueError for another kind."""
        if kind not in ("attention", "mlp"):
            raise ValueError(f"kind={kind!r} is neither attention nor mlp")
        name = "n_att_experts" if kind == "attention" else "n_mlp_experts"
        per_layer = getattr(self, f"{name}_per_layer")
        return getattr(self, name) if per_layer is None else per_layer[layer]

    def of_layer(self, layer: int) -> "ModelConfig":
        """The configuration that one layer is built from: its own numbers of experts, no lists."""
        if self.n_att_experts_per_layer is None and self.n_mlp_experts_per_layer is None:
            return self
        own = {
            "n_att_experts": self.num_experts(layer, "attention"),
            "n_mlp_experts": self.num_experts(layer, "mlp"),
            "n_att_experts_per_layer": None,
            "n_mlp_experts_per_layer": None,
        }
        return self.model_copy(update=own)

    @model_validator(mode="after")
    def _consistent(self) -> "ModelConfig":
        if self.att_hidden % self.n_head:
            raise ValueError(f"att_hidden={self.att_hidden} is not divisible by n_head={self.n_head}")
        self._check_neox()
        if not self.sparse:
            expert_fields = {
                "n_att_experts", "n_mlp_experts", "k_att", "k_mlp",
                "n_att_experts_per_layer", "n_mlp_experts_per_layer",
                "gate_type", "gating_size", "sample_topk", "moe_pdrop",
            }  # fmt: skip
            given = sorted(expert_fields & self.model_fields_set)
            if given:
                raise ValueError(f"kind={self.kind} has no experts, but these were set: {', '.join(given)}")
            return self
        for kind, k, num_experts in (
            ("att", self.k_att, self.n_att_experts),
            ("mlp", self.k_mlp, self.n_mlp_experts),
        ):
            if k > num_experts:
                raise ValueError(f"k_{kind}={k} is larger than n_{kind}_experts={num_experts}")
            if self.sample_topk > k:
                raise ValueError(f"sample_topk={self.sample_topk} is larger than k_{kind}={k}")
            self._check_layers(kind, k, num_experts)
        return self

    def _check_neox(self) -> None:
        fields = {name: getattr(self, name) for name in NEOX_FIELDS}
        if self.kind != "gpt_neox":
            given = [f"{name}={value}" for name, value in fields.items() if value is not None]
            if given:
                raise ValueError(f"kind={self.kind} is no GPT-NeoX, but these were set: {', '.join(given)}")
            return
        missing = [name for name, value in fields.items() if value is None]
        if missing:
            raise ValueError(f"kind=gpt_neox needs {', '.join(missing)}")
        if self.att_hidden != self.n_embd:
            raise ValueError(f"kind=gpt_neox has att_hidden equal to n_embd={self.n_embd}, not {self.att_hidden}")
        if self.rotary_channels < 2 or self.rotary_channels % 2:
            raise ValueError(
                f"rotary_fraction={self.rotary_fraction} of {self.head_dim} head channels is {self.rotary_channels}: "
                "channels turn in pairs"
            )

    def _check_layers(self, kind: str, k: int, largest: int) -> None:
        name = f"n_{kind}_experts"
        per_layer = getattr(self, f"{name}_per_layer")
        if per_layer is None:
            return
        if len(per_layer) != self.n_layer:
            raise ValueError(f"{name}_per_layer has {len(per_layer)} entries, n_layer is {self.n_layer}")
        if max(per_layer) != largest:
            raise ValueError(f"{name}={largest}, but the largest of {name}_per_layer is {max(per_layer)}")
        if min(per_layer) < k:
            layer = per_layer.index(min(per_layer))
            raise ValueError(f"k_{kind}={k} is larger than the {min(per_layer)} experts of layer {layer}")

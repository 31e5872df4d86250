"""Configuration of a decoder whose residual stream was sliced to fewer dimensions."""

from transformers import PreTrainedConfig


class SlicedConfig(PreTrainedConfig):
    """Sizes and switches of a sliced decoder.

    stream_size: width of the residual stream between embedding and last block, hidden_size: its width before slicing
    (the divisor of the norms, and the width of the last block's output). parallel_residual: attention and feed-forward
    layer read the same input and are added together. gated: the feed-forward layer has a gate projection.
    final_norm: `rms` or `layer`. inverse_frequencies: angle per position of every rotary pair, of the first
    2 * len(inverse_frequencies) channels of a head; rotary_scaling: factor on cosine and sine. qkv_bias,
    attention_output_bias, mlp_input_bias, mlp_output_bias, head_bias: which linear layers have a bias. With
    tie_word_embeddings the embedding has hidden_size columns and a projection to stream_size behind it, without it
    stream_size columns. Raises ValueError for sizes that contradict each other.
    """

    model_type = "sliced_decoder"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    def __init__(
        self,
        vocab_size=32,
        hidden_size=16,
        stream_size=8,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        hidden_act="silu",
        gated=True,
        parallel_residual=False,
        final_norm="rms",
        norm_eps=1e-5,
        inverse_frequencies=(),
        rotary_scaling=1.0,
        qkv_bias=False,
        attention_output_bias=False,
        mlp_input_bias=False,
        mlp_output_bias=False,
        head_bias=False,
        max_position_embeddings=2048,
        initializer_range=0.02,
        use_cache=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        tie_word_embeddings=False,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.stream_size = stream_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.hidden_act = hidden_act
        self.gated = gated
        self.parallel_residual = parallel_residual
        self.final_norm = final_norm
        self.norm_eps = norm_eps
        self.inverse_frequencies = list(inverse_frequencies)
        self.rotary_scaling = rotary_scaling
        self.qkv_bias = qkv_bias
        self.attention_output_bias = attention_output_bias
        self.mlp_input_bias = mlp_input_bias
        self.mlp_output_bias = mlp_output_bias
        self.head_bias = head_bias
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.pad_token_id = pad_token_id
        self.tie_word_embeddings = tie_word_embeddings
        super().__init__(**kwargs)
        # Since transformers 5 the base class sets these from its own defaults when it is not given them.
        self.bos_token_id, self.eos_token_id, self.pad_token_id = bos_token_id, eos_token_id, pad_token_id
        self.tie_word_embeddings = tie_word_embeddings
        self._check()

    def _check(self):
        if not 1 <= self.stream_size <= self.hidden_size:
            raise ValueError(f"stream_size={self.stream_size} is outside 1..hidden_size={self.hidden_size}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not divisible by "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if 2 * len(self.inverse_frequencies) > self.head_dim:
            raise ValueError(
                f"{len(self.inverse_frequencies)} rotary pairs do not fit into head_dim={self.head_dim} channels"
            )
        if self.final_norm not in ("rms", "layer"):
            raise ValueError(f"final_norm={self.final_norm!r} is not one of rms, layer")

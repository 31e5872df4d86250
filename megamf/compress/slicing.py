"""A narrower residual stream by principal components: SliceGPT (arXiv 2401.15024), for Llama- and GPT-NeoX-like models.

The weights of every norm are folded into the matrices behind it, and the mean subtraction of layer norms into the
matrices before it. What is left of a norm does not change when the stream is rotated, so that every stream gets the
basis of its principal components on calibration text, of which the first W stay. Each block is fitted on what the
blocks before it, already sliced, give. Without slicing (W = D) the model computes what it did before.

Choices where the method leaves room: the output of the last block is not sliced (as published by default); tied
embeddings stay tied and whole, with a projection behind the embedding, so that no second vocabulary matrix is needed.

Shapes: W stream size, D hidden size, H query heads, C head channels, F feed-forward width, N tokens, T time, U windows.
"""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from megamf.compress.documents import check_ids
from megamf.compress.portable.configuration_sliced import SlicedConfig
from megamf.compress.portable.modeling_sliced import SlicedForCausalLM, normalise
from megamf.errors import UserError

# Folders written by save_pretrained carry these two files.
SlicedConfig.register_for_auto_class("AutoConfig")
SlicedForCausalLM.register_for_auto_class("AutoModelForCausalLM")

LLAMA_LIKE = ("llama", "mistral", "qwen2")
SUPPORTED = (*LLAMA_LIKE, "gpt_neox")
# Frequencies of other kinds of position encoding change with the length of the text.
ROTARY_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class Affine:
    """weight [out, in] and bias [out] of a linear layer, or weight [D] and bias [D] of a norm; None: no bias."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None

    def after(self, norm: "Affine") -> "Affine":
        """With the weights of the norm before it, so that the norm itself has none."""
        bias = self.bias
        if norm.bias is not None:
            extra = self.weight @ norm.bias
            bias = extra if bias is None else bias + extra
        return Affine(self.weight * norm.weight, bias)

    def centred(self) -> "Affine":
        """Without the mean of its outputs."""
        bias = None if self.bias is None else self.bias - self.bias.mean()
        return Affine(self.weight - self.weight.mean(0), bias)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


@dataclass(frozen=True)
class BlockWeights:
    """The linear layers of a block without norm weights: `o` and `down` write into the stream, the others read it."""

    q: Affine
    k: Affine
    v: Affine
    o: Affine
    gate: Affine | None
    up: Affine
    down: Affine


def slice_model(
    model: nn.Module,
    windows_UT: torch.Tensor,
    width: int,
    *,
    normalised: bool = False,
    batch: int = 4,
    on_block: Callable[[int, int], None] | None = None,
) -> SlicedForCausalLM:
    """The model with a residual stream of `width` dimensions, fitted on windows of token ids (int64 [U, T]).

    `normalised`: principal components of the normalised stream, in which every token counts the same, and not of the
    stream itself, in which tokens with large states count more (and which lost a little less where both were tried).
    `on_block(done, total)`. Works in float32 (float64 for float64 models); the result has the model's dtype and device.
    Raises UserError for models that are not supported, a width outside 1..D and token ids that the model does not know.
    """
    config = sliced_config(model, width)
    check_ids(model, [windows_UT])
    source = next(model.parameters())
    work = torch.float64 if source.dtype == torch.float64 else torch.float32
    with torch.device(source.device):
        small = SlicedForCausalLM(config).to(work).eval()
    with torch.no_grad():
        _fill(model, small, windows_UT.to(source.device), normalised, batch, work, on_block)
    small.generation_config = copy.deepcopy(model.generation_config)
    return small.to(source.dtype)


def sliced_config(model: nn.Module, width: int) -> SlicedConfig:
    """The configuration of the model sliced to `width`. Raises UserError for models that are not supported."""
    config = getattr(model, "config", None)
    kind = getattr(config, "model_type", type(model).__name__)
    if kind not in SUPPORTED or model.get_output_embeddings() is None:
        raise UserError(
            f"{type(model).__name__} (model_type {kind!r}) cannot be sliced: causal language models of the types "
            f"{', '.join(SUPPORTED)} can"
        )
    if not 1 <= width <= config.hidden_size:
        raise UserError(f"a stream of {width} dimensions is outside 1..{config.hidden_size}, the model's hidden_size")
    if any(name != "full_attention" for name in getattr(config, "layer_types", None) or ()) or (
        kind == "mistral" and config.sliding_window is not None
    ):
        raise UserError(f"a {kind} model with sliding window attention cannot be sliced")
    rope = config.rope_parameters
    if rope["rope_type"] not in ROTARY_TYPES:
        raise UserError(
            f"rope_type {rope['rope_type']!r} cannot be sliced: its frequencies change with the length of the text; "
            f"supported: {', '.join(ROTARY_TYPES)}"
        )
    gated = kind in LLAMA_LIKE
    rotary = (model.model if gated else model.gpt_neox).rotary_emb
    first = _read(model, 0, torch.float32)
    tokens = {name: getattr(config, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return SlicedConfig(
        **tokens,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        stream_size=width,
        intermediate_size=first.up.weight.shape[0],
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads if gated else config.num_attention_heads,
        head_dim=first.q.weight.shape[0] // config.num_attention_heads,
        hidden_act=config.hidden_act,
        gated=gated,
        parallel_residual=False if gated else config.use_parallel_residual,
        final_norm="rms" if gated else "layer",
        norm_eps=config.rms_norm_eps if gated else config.layer_norm_eps,
        inverse_frequencies=rotary.inv_freq.tolist(),
        rotary_scaling=rotary.attention_scaling,
        qkv_bias=first.q.bias is not None,
        attention_output_bias=first.o.bias is not None,
        mlp_input_bias=first.up.bias is not None,
        mlp_output_bias=first.down.bias is not None,
        head_bias=model.lm_head.bias is not None,
        max_position_embeddings=config.max_position_embeddings,
        tie_word_embeddings=model.lm_head.weight is model.get_input_embeddings().weight,
    )


def sliced_parameters(config: SlicedConfig, width: int) -> int:
    """Parameters of the model that `slice_model` makes at this width; tied embeddings count once."""
    D, W, V, F = config.hidden_size, width, config.vocab_size, config.intermediate_size
    query, key = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    inputs, total = (2 if config.gated else 1) * F, V * D + (D * W if config.tie_word_embeddings else V * W)
    total += D * (2 if config.final_norm == "layer" else 1) + config.head_bias * V
    for layer in range(config.num_hidden_layers):
        out = D if layer == config.num_hidden_layers - 1 else W
        mid = out if config.parallel_residual else W
        total += (query + 2 * key + inputs) * W + query * mid + F * out
        total += W * out + (0 if config.parallel_residual else W * W)
        total += config.qkv_bias * (query + 2 * key) + config.attention_output_bias * mid
        total += config.mlp_input_bias * inputs + config.mlp_output_bias * out
    return total


def width_for(config: SlicedConfig, parameters: int, multiple: int = 1) -> int:
    """The multiple of `multiple` at which the sliced model is nearest to this number of parameters.

    Raises UserError where even the narrowest stream has more.
    """
    widths = range(multiple, config.hidden_size + 1, multiple)
    if not widths:
        raise UserError(f"multiple={multiple} is above the hidden size {config.hidden_size}")
    if (least := sliced_parameters(config, widths[0])) > parameters:
        raise UserError(
            f"slicing cannot leave {parameters:,} parameters: a stream of {widths[0]} dimensions has {least:,} already "
            "(embeddings and head stay)"
        )
    return min(widths, key=lambda width: abs(sliced_parameters(config, width) - parameters))


def _fill(
    model: nn.Module,
    small: SlicedForCausalLM,
    windows_UT: torch.Tensor,
    normalised: bool,
    batch: int,
    work: torch.dtype,
    on_block: Callable[[int, int], None] | None,
) -> None:
    config = small.config
    D, W, last = config.hidden_size, config.stream_size, config.num_hidden_layers - 1
    table_VD = model.get_input_embeddings().weight.to(work)
    centre = table_VD.mean(1, keepdim=True) if config.final_norm == "layer" else torch.zeros_like(table_VD[:, :1])

    def components(stream: Callable[[int], torch.Tensor]) -> torch.Tensor:
        return _components(stream, len(windows_UT), batch, normalised, config.norm_eps)[:, :W].to(work)

    def embedded(start: int) -> torch.Tensor:
        ids = windows_UT[start : start + batch]
        return table_VD[ids] - centre[ids]

    basis_DW = components(embedded)
    if config.tie_word_embeddings:
        small.model.embed_tokens.weight.copy_(table_VD)
        mean_free = basis_DW - basis_DW.mean(0) if config.final_norm == "layer" else basis_DW
        small.model.project_in.weight.copy_(mean_free.T)
    else:
        small.model.embed_tokens.weight.copy_((table_VD - centre) @ basis_DW)
        small.lm_head.weight.copy_(model.lm_head.weight)
    if config.head_bias:
        small.lm_head.bias.copy_(model.lm_head.bias)
    small.model.norm.load_state_dict(_final_norm(model).state_dict())

    starts = range(0, len(windows_UT), batch)
    rotary = small.model.rotary(torch.arange(windows_UT.shape[1], device=windows_UT.device)[None], work)
    stream = {start: embedded(start) @ basis_DW for start in starts}
    whole = torch.eye(D, dtype=work, device=basis_DW.device)
    for layer, block in enumerate(small.model.layers):
        weights = _read(model, layer, work)
        _copy_inputs(block.attention, weights, "qkv", basis_DW)

        def unit(start: int) -> torch.Tensor:
            return normalise(stream[start], D, config.norm_eps)

        if config.parallel_residual:
            _copy_inputs(block.mlp, weights, ("gate", "up"), basis_DW)
        # The streams behind the layers in the D dimensions of the model, from the sliced one before them.
        for start in starts:
            heads = block.attention.heads(unit(start), rotary, None, None)
            written = weights.o(heads)
            if config.parallel_residual:
                written = written + weights.down(block.mlp.hidden(unit(start)))
            stream[start] = stream[start] @ basis_DW.T + written
        next_DW = whole if config.parallel_residual and layer == last else components(stream.__getitem__)
        _copy(block.attention.o_proj, weights.o, next_DW)
        if not config.parallel_residual:
            block.attention_shortcut.weight.copy_(next_DW.T @ basis_DW)
            stream.update({start: value @ next_DW for start, value in stream.items()})
            basis_DW = next_DW
            _copy_inputs(block.mlp, weights, ("gate", "up"), basis_DW)
            for start in starts:
                written = weights.down(block.mlp.hidden(unit(start)))
                stream[start] = stream[start] @ basis_DW.T + written
            next_DW = whole if layer == last else components(stream.__getitem__)
        _copy(block.mlp.down_proj, weights.down, next_DW)
        block.mlp_shortcut.weight.copy_(next_DW.T @ basis_DW)
        stream.update({start: value @ next_DW for start, value in stream.items()})
        basis_DW = next_DW
        if on_block is not None:
            on_block(layer + 1, last + 1)


def _copy_inputs(module: nn.Module, weights: BlockWeights, names: Iterable[str], basis_DW: torch.Tensor) -> None:
    """Layers that read the stream, with inputs in the given basis."""
    for name in names:
        part = getattr(weights, name)
        if part is not None:
            linear = module.get_submodule(f"{name}_proj")
            linear.weight.copy_(part.weight @ basis_DW)
            if part.bias is not None:
                linear.bias.copy_(part.bias)


def _components(
    stream: Callable[[int], torch.Tensor], windows: int, batch: int, normalised: bool, eps: float
) -> torch.Tensor:
    """Eigenvectors [D, D] float64 of the uncentred covariance, largest eigenvalue first."""
    covariance_DD = 0.0
    for start in range(0, windows, batch):
        x_ND = stream(start).flatten(0, -2)
        if normalised:
            x_ND = normalise(x_ND, x_ND.shape[-1], eps)
        covariance_DD = covariance_DD + (x_ND.T @ x_ND).double()
    return torch.linalg.eigh(covariance_DD).eigenvectors.flip(-1)


def _copy(linear: nn.Linear, part: Affine, basis_DW: torch.Tensor) -> None:
    """A layer that writes into the stream, with outputs in the given basis."""
    linear.weight.copy_(basis_DW.T @ part.weight)
    if part.bias is not None:
        linear.bias.copy_(basis_DW.T @ part.bias)


def _final_norm(model: nn.Module) -> nn.Module:
    return model.gpt_neox.final_layer_norm if model.config.model_type == "gpt_neox" else model.model.norm


@torch.no_grad()
def _read(model: nn.Module, layer: int, dtype: torch.dtype) -> BlockWeights:
    """The weights of a block in `dtype`, with the norms folded in."""

    def affine(module: nn.Module) -> Affine:
        bias = getattr(module, "bias", None)
        return Affine(module.weight.detach().to(dtype), None if bias is None else bias.detach().to(dtype))

    if model.config.model_type != "gpt_neox":
        block = model.model.layers[layer]
        attention, mlp = block.self_attn, block.mlp
        first, second = affine(block.input_layernorm), affine(block.post_attention_layernorm)
        return BlockWeights(
            *(affine(m).after(first) for m in (attention.q_proj, attention.k_proj, attention.v_proj)),
            o=affine(attention.o_proj),
            gate=affine(mlp.gate_proj).after(second),
            up=affine(mlp.up_proj).after(second),
            down=affine(mlp.down_proj),
        )
    block = model.gpt_neox.layers[layer]
    first, second = affine(block.input_layernorm), affine(block.post_attention_layernorm)
    fused, heads = affine(block.attention.query_key_value), model.config.num_attention_heads
    weights = fused.weight.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(1, 2)
    biases: Any = (None, None, None)
    if fused.bias is not None:
        biases = fused.bias.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(1)
    return BlockWeights(
        *(Affine(weight, bias).after(first) for weight, bias in zip(weights, biases)),
        o=affine(block.attention.dense).centred(),
        gate=None,
        up=affine(block.mlp.dense_h_to_4h).after(second),
        down=affine(block.mlp.dense_4h_to_h).centred(),
    )

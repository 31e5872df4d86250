"""GPT-NeoX folders (the Pythia family): their names, shapes and `config.json` beside megamf's own.

Query, key and value of a head stand together in one projection, head by head, in both.
"""

import re
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from pydantic import ValidationError
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from megamf.config import ModelConfig
from megamf.errors import UserError

MODEL_TYPE = GPTNeoXConfig.model_type
ARCHITECTURE = GPTNeoXForCausalLM.__name__
# Constants that older files carry: causal masks and the angular frequencies.
BUFFER = re.compile(r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)")
# What transformers 5 calls the head in memory, and other tools in files.
OTHER_HEAD = "lm_head.weight"

_WHOLE = {
    "transformer.wte": "gpt_neox.embed_in",
    "transformer.ln_f": "gpt_neox.final_layer_norm",
    "lm_head": "embed_out",
}
_IN_LAYER = {
    "ln_1": "input_layernorm",
    "ln_2": "post_attention_layernorm",
    "attn.qkv_proj": "attention.query_key_value",
    "attn.o_proj": "attention.dense",
    "mlpf.fc1": "mlp.dense_h_to_4h",
    "mlpf.fc2": "mlp.dense_4h_to_h",
}
_LAYER = re.compile(r"transformer\.h\.(\d+)\.(.+)")


def public_name(name: str) -> str:
    """The name in a GPT-NeoX file of one of megamf's tensors."""
    module, _, kind = name.rpartition(".")
    if match := _LAYER.fullmatch(module):
        return f"gpt_neox.layers.{match[1]}.{_IN_LAYER[match[2]]}.{kind}"
    return f"{_WHOLE[module]}.{kind}"


def shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """megamf's name -> shape of every parameter, in the order of the layers."""
    D, F, V = model.n_embd, model.ffd_hidden, model.vocab_size
    layer = {
        "ln_1": (D,), "ln_2": (D,), "attn.qkv_proj": (3 * D, D), "attn.o_proj": (D, D),
        "mlpf.fc1": (F, D), "mlpf.fc2": (D, F),
    }  # fmt: skip
    found: dict[str, tuple[int, ...]] = {"transformer.wte.weight": (V, D)}
    for i in range(model.n_layer):
        for name, shape in layer.items():
            found[f"transformer.h.{i}.{name}.weight"] = shape
            found[f"transformer.h.{i}.{name}.bias"] = shape[:1]
    found |= {"transformer.ln_f.weight": (D,), "transformer.ln_f.bias": (D,)}
    found["lm_head.weight"] = (V, D)
    return found


def to_model_config(tree: dict[str, Any]) -> ModelConfig:
    """The architecture of a GPT-NeoX `config.json`. Raises UserError for values that megamf does not implement."""
    try:
        config = GPTNeoXConfig(**tree)
    except (StrictDataclassError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"config.json: {error}") from None
    rotary = config.rope_parameters
    fixed = {
        "attention_bias": (config.attention_bias, True),
        "attention_dropout": (config.attention_dropout, 0.0),
        "rope_type": (rotary["rope_type"], "default"),
        "tie_word_embeddings": (config.tie_word_embeddings, False),
    }
    for name, (given, expected) in fixed.items():
        if given != expected:
            raise UserError(f"config.json: {name}={given!r} is not supported, only {expected!r}")
    fields = {
        "kind": "gpt_neox",
        "vocab_size": config.vocab_size,
        "n_layer": config.num_hidden_layers,
        "n_embd": config.hidden_size,
        "n_head": config.num_attention_heads,
        "att_hidden": config.hidden_size,
        "ffd_hidden": config.intermediate_size,
        "activation_function": config.hidden_act,
        "layer_norm_epsilon": config.layer_norm_eps,
        "initializer_range": config.initializer_range,
        "embd_pdrop": config.hidden_dropout,
        "resid_pdrop": config.hidden_dropout,
        "block_size": config.max_position_embeddings,
        "history_length": 0,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "parallel_residual": config.use_parallel_residual,
        "rotary_fraction": rotary["partial_rotary_factor"],
        "rotary_base": rotary["rope_theta"],
    }
    try:
        return ModelConfig.model_validate(fields)
    except ValidationError as error:
        item = error.errors()[0]
        where = ".".join(str(part) for part in item["loc"])
        raise UserError(f"config.json: {where}: {item['msg']} (got {item['input']!r})") from None


def to_public(model: ModelConfig) -> dict[str, Any]:
    """The fields of a GPT-NeoX `config.json` (without dtype and architectures), sorted by name.

    Raises UserError for two dropout rates where GPT-NeoX has one.
    """
    if model.embd_pdrop != model.resid_pdrop:
        raise UserError(
            f"GPT-NeoX has one dropout rate, this model has embd_pdrop={model.embd_pdrop} and resid_pdrop="
            f"{model.resid_pdrop}: it cannot be written as one"
        )
    return {
        "attention_dropout": 0.0,
        "bos_token_id": model.bos_token_id,
        "eos_token_id": model.eos_token_id,
        "hidden_act": model.activation_function,
        "hidden_dropout": model.resid_pdrop,
        "hidden_size": model.n_embd,
        "initializer_range": model.initializer_range,
        "intermediate_size": model.ffd_hidden,
        "layer_norm_eps": model.layer_norm_epsilon,
        "max_position_embeddings": model.block_size,
        "model_type": MODEL_TYPE,
        "num_attention_heads": model.n_head,
        "num_hidden_layers": model.n_layer,
        "rotary_emb_base": model.rotary_base,
        "rotary_pct": model.rotary_fraction,
        "tie_word_embeddings": False,
        "use_cache": True,
        "use_parallel_residual": model.parallel_residual,
        "vocab_size": model.vocab_size,
    }

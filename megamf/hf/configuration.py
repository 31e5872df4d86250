"""Between megamf's ModelConfig and the public `config.json` of ModuleFormer checkpoints."""

from typing import Any

from pydantic import ValidationError

from megamf.config import ModelConfig
from megamf.config.model import NEOX_FIELDS
from megamf.errors import UserError
from megamf.hf.portable.configuration_moduleformer import ModuleFormerConfig

SHARED_FIELDS = tuple(name for name in ModelConfig.model_fields if name not in ("kind", *NEOX_FIELDS))
# Only in models whose layers differ.
PER_LAYER = ("n_att_experts_per_layer", "n_mlp_experts_per_layer")

# Fields of released configurations that the released code does not read, with the values it works by.
UNREAD_FIELDS: dict[str, Any] = {
    "att_func": "stickbreaking",
    "local_size": 1,
    "moe_type": "moe",
    "pre_norm": True,
    "universal": False,
    "world_size": None,
}
# Other values of these would mean another model than the one implemented.
FIXED_FIELDS = {name: UNREAD_FIELDS[name] for name in ("att_func", "moe_type", "pre_norm", "universal")} | {
    "tie_word_embeddings": False
}


def to_public(model: ModelConfig, *, aux_loss_type: str = "mi", aux_loss_weight: float = 0.0) -> dict[str, Any]:
    """The fields of a public `config.json` (without dtype and architectures), sorted by name.

    Raises UserError for a dense baseline, which the public layout cannot express.
    """
    if model.kind != "moduleformer":
        raise UserError(f"a model of kind={model.kind} is no ModuleFormer: the public layout cannot express it")
    fields = {name: getattr(model, name) for name in SHARED_FIELDS}
    fields = {name: value for name, value in fields.items() if not (name in PER_LAYER and value is None)}
    fields |= UNREAD_FIELDS
    fields |= {
        "attn_pdrop": 0.0,
        "aux_loss_type": aux_loss_type,
        "aux_loss_weight": aux_loss_weight,
        "model_type": ModuleFormerConfig.model_type,
        "n_ctx": model.history_length * model.n_layer,
        "tie_word_embeddings": False,
        "use_cache": True,
    }
    return dict(sorted(fields.items()))


def to_model_config(config: ModuleFormerConfig) -> ModelConfig:
    """The architecture of a public configuration. Raises UserError for values that megamf does not implement."""
    for name, expected in FIXED_FIELDS.items():
        if (given := getattr(config, name, expected)) != expected:
            raise UserError(f"config.json: {name}={given!r} is not supported, only {expected!r}")
    fields = {name: getattr(config, name) for name in SHARED_FIELDS if name not in PER_LAYER}
    fields |= {name: getattr(config, name) for name in PER_LAYER if hasattr(config, name)}
    try:
        return ModelConfig.model_validate(fields)
    except ValidationError as error:
        item = error.errors()[0]
        where = ".".join(str(part) for part in item["loc"])
        raise UserError(f"config.json: {where}: {item['msg']} (got {item['input']!r})") from None

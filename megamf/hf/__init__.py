"""Hugging Face both ways. Importing this registers `moduleformer` with transformers' Auto classes."""

try:
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
except ModuleNotFoundError as error:
    message = "megamf.hf needs transformers 5; install it with: pip install 'megamf[hf]'"
    raise ModuleNotFoundError(message, name=error.name) from None

from megamf.hf.modeling import (
    ModuleFormerForCausalLM,
    ModuleFormerForSequenceClassification,
    ModuleFormerModel,
)
from megamf.hf.portable.configuration_moduleformer import ModuleFormerConfig

AutoConfig.register(ModuleFormerConfig.model_type, ModuleFormerConfig, exist_ok=True)
AutoModel.register(ModuleFormerConfig, ModuleFormerModel, exist_ok=True)
AutoModelForCausalLM.register(ModuleFormerConfig, ModuleFormerForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(ModuleFormerConfig, ModuleFormerForSequenceClassification, exist_ok=True)

__all__ = [
    "ModuleFormerConfig",
    "ModuleFormerForCausalLM",
    "ModuleFormerForSequenceClassification",
    "ModuleFormerModel",
]

"""Tiny models of every supported family."""

import torch
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from megamf.hf import ModuleFormerConfig, ModuleFormerForCausalLM


def llama(kind: str = "llama", layers: int = 2):
    config, model = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "mistral": (MistralConfig, MistralForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    }[kind]
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": layers}
    return model(config(vocab_size=40, num_attention_heads=6, num_key_value_heads=2, **sizes)).eval()


def neox():
    torch.manual_seed(1)
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=40,
            hidden_size=24,
            intermediate_size=20,
            num_hidden_layers=2,
            num_attention_heads=3,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        )
    ).eval()


def molm():
    torch.manual_seed(2)
    config = ModuleFormerConfig(
        vocab_size=40, n_embd=16, n_layer=2, n_head=2, att_hidden=12, ffd_hidden=10, n_att_experts=3, n_mlp_experts=4,
        k_att=2, k_mlp=2, gating_size=8,
    )  # fmt: skip
    return ModuleFormerForCausalLM(config).eval()


MODELS = {
    "llama": llama,
    "mistral": lambda: llama("mistral"),
    "qwen2": lambda: llama("qwen2"),
    "neox": neox,
    "molm": molm,
}

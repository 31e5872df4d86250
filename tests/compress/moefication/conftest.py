"""Tiny random models of every form of feed-forward layer, and text for them."""

import pytest
import torch
import transformers as hf

from megamf.compress.moefication.models import DenseBaseline
from megamf.config import ModelConfig
from megamf.model import ModuleFormer

VOCAB = 61
SMALL = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LLAMA = {
    "hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64,
}  # fmt: skip
BERT = {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
T5 = {"d_model": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "d_kv": 8, "decoder_start_token_id": 0}


def megamf_dense(activation, seed=0):
    config = ModelConfig(
        kind="dense", vocab_size=VOCAB, n_layer=2, n_embd=16, n_head=2, att_hidden=16, ffd_hidden=64,
        activation_function=activation,
    )  # fmt: skip
    return DenseBaseline(ModuleFormer(config))


BUILD = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL, **LLAMA, hidden_act="silu", mlp_bias=True)),
    "llama-relu": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL, **LLAMA, hidden_act="relu")),
    "opt": lambda: hf.OPTForCausalLM(
        hf.OPTConfig(
            **SMALL, hidden_size=16, ffn_dim=64, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=16
        )
    ),
    "t5": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**SMALL, **T5, feed_forward_proj="relu")),
    "t5-gated": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**SMALL, **T5, feed_forward_proj="gated-gelu")),
    "bert-relu": lambda: hf.BertForMaskedLM(hf.BertConfig(**SMALL, **BERT, hidden_act="relu")),
    "bert": lambda: hf.BertModel(hf.BertConfig(**SMALL, **BERT, hidden_act="gelu")),
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(**SMALL, n_embd=16, n_layer=2, n_head=2, activation_function="gelu_new")
    ),
    "neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**SMALL, **BERT, hidden_act="relu")),
    "megamf": lambda: megamf_dense("relu"),
}


@pytest.fixture
def make_model():
    """make(name) -> a random model in float64 whose neurons differ clearly."""

    def make(name, dtype=torch.float64):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = BUILD[name]()
            for parameter in model.parameters():
                parameter.data = 0.4 * torch.randn(parameter.shape)
        return model.to(dtype).eval()

    return make


@pytest.fixture
def windows():
    """ids_WT [6, 16] of random tokens."""
    return torch.randint(3, VOCAB, (6, 16), generator=torch.Generator().manual_seed(0))

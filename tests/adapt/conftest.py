"""Tiny models and a tokenizer for adaptation, as Hugging Face folders."""

import json
import random

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from megamf.hf import ModuleFormerConfig, ModuleFormerForCausalLM

WORDS = ["<pad>", "<eos>", *(f"w{i}" for i in range(38))]
SMALL = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 32, "initializer_range": 0.3, "pad_token_id": 0,
}  # fmt: skip


def _write(folder):
    folder.mkdir()
    torch.manual_seed(0)
    generator = {"eos_token_id": 1, "bos_token_id": 1}
    BertModel(BertConfig(**SMALL)).save_pretrained(folder / "bert")
    LlamaForCausalLM(LlamaConfig(**SMALL, **generator)).save_pretrained(folder / "llama")
    sizes = {"vocab_size": 40, "n_layer": 2, "n_embd": 16, "ffd_hidden": 20, "n_att_experts": 3, "n_mlp_experts": 3}
    molm = ModuleFormerConfig(**sizes, n_head=2, att_hidden=12, gating_size=6, pad_token_id=0, **generator)
    model = ModuleFormerForCausalLM(molm)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder / "molm")
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
    for name in ("bert", "llama", "molm"):
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory):
    """A folder with the folders bert, llama and molm, each with a tokenizer of 40 words."""
    return _write(tmp_path_factory.mktemp("adapt") / "models")


@pytest.fixture(scope="session")
def example_rows():
    """example_rows(kind, number, seed): rows that can be learned from their first word."""

    def make(kind, number, seed=0):
        draw = random.Random(seed)
        rows = []
        for _ in range(number):
            words = [draw.randrange(38) for _ in range(draw.randrange(4, 9))]
            text = " ".join(f"w{i}" for i in words)
            if kind == "generation":
                rows.append({"prompt": text, "target": " ".join(f"w{i}" for i in words[:2])})
            else:
                rows.append({"text": text, "label": words[0] / 38 if kind == "regression" else f"c{words[0] % 3}"})
        return rows

    return make


@pytest.fixture
def jsonl(tmp_path):
    """jsonl(name, rows) writes a file and returns its path."""

    def write(name, rows):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write

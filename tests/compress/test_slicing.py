"""Sliced models against the models they come from, and against projections of the hidden states written out."""

import sys

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from megamf.compress.slicing import slice_model, sliced_config, sliced_parameters, width_for
from megamf.errors import UserError

LLAMA = {
    "vocab_size": 23, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
NEOX = {
    "vocab_size": 23, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2,
    "max_position_embeddings": 64,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 10000.0}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA)),
    "llama tied, biases, yarn": lambda: LlamaForCausalLM(
        LlamaConfig(**LLAMA, tie_word_embeddings=True, attention_bias=True, mlp_bias=True, rope_parameters=YARN)
    ),
    "qwen2, wide heads": lambda: Qwen2ForCausalLM(Qwen2Config(**LLAMA, head_dim=6)),
    "neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**NEOX)),
    "neox sequential, tied": lambda: GPTNeoXForCausalLM(
        GPTNeoXConfig(**NEOX, use_parallel_residual=False, tie_word_embeddings=True, attention_bias=False)
    ),
}
WINDOWS = torch.randint(23, (7, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def exact_norms(monkeypatch):
    """Norms that do not round float64 states to float32 on the way, as the library's own do."""

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon))

    for norm in (LlamaRMSNorm, Qwen2RMSNorm):
        monkeypatch.setattr(norm, "forward", forward)


def build(name):
    torch.manual_seed(0)
    model = MODELS[name]().double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.fixture(params=list(MODELS))
def model(request):
    return build(request.param)


@torch.no_grad()
def test_whole_width_is_the_same_model_and_any_width_has_the_counted_parameters(model):
    expected = model(input_ids=WINDOWS).logits
    for normalised in (True, False):
        same = slice_model(model, WINDOWS, 16, normalised=normalised, batch=3)
        torch.testing.assert_close(same(input_ids=WINDOWS).logits, expected, rtol=1e-9, atol=1e-9)
    for width in (1, 10, 16):
        small = slice_model(model, WINDOWS[:2], width)
        assert small.config.tie_word_embeddings == model.config.tie_word_embeddings
        assert sum(p.numel() for p in small.parameters()) == sliced_parameters(sliced_config(model, width), width)


def projector(states, width, normalised, eps):
    """Onto the principal components of states [N, D]."""
    if normalised:
        states = states / (states.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    basis = torch.linalg.svd(states, full_matrices=False)[2][:width]
    return basis.T @ basis


def projected(states, width, normalised, eps):
    return states @ projector(states.flatten(0, 1), width, normalised, eps)


@torch.no_grad()
def literal_llama(model, ids, width, normalised):
    """The model's own layers on hidden states of full width, projected before every norm but the last."""
    h, eps = model.model.embed_tokens(ids), model.config.rms_norm_eps
    position = torch.arange(ids.shape[1])[None]
    rotary = model.model.rotary_emb(h, position)
    for block in model.model.layers:
        h = projected(h, width, normalised, eps)
        h = h + block.self_attn(block.input_layernorm(h), position_embeddings=rotary, attention_mask=None)[0]
        h = projected(h, width, normalised, eps)
        h = h + block.mlp(block.post_attention_layernorm(h))
    return model.lm_head(model.model.norm(h))


@torch.no_grad()
def literal_neox(model, ids, width, normalised):
    body, eps = model.gpt_neox, model.config.layer_norm_eps

    def centred(x):
        return x - x.mean(-1, keepdim=True)

    def norm(h, layer):
        return layer.weight * h / (h.pow(2).mean(-1, keepdim=True) + eps).sqrt() + layer.bias

    h = centred(body.embed_in(ids))
    rotary = body.rotary_emb(h, torch.arange(ids.shape[1])[None])
    for block in body.layers:
        h = projected(h, width, normalised, eps)
        mixed = block.attention(norm(h, block.input_layernorm), attention_mask=None, position_embeddings=rotary)[0]
        if model.config.use_parallel_residual:
            h = h + centred(mixed) + centred(block.mlp(norm(h, block.post_attention_layernorm)))
        else:
            h = projected(h + centred(mixed), width, normalised, eps)
            h = h + centred(block.mlp(norm(h, block.post_attention_layernorm)))
    return model.lm_head(body.final_layer_norm(h))


@torch.no_grad()
@pytest.mark.parametrize("normalised", [True, False])
def test_sliced_is_the_model_with_projected_hidden_states(model, normalised):
    literal = literal_neox if model.config.model_type == "gpt_neox" else literal_llama
    small = slice_model(model, WINDOWS, 9, normalised=normalised, batch=4)
    expected = literal(model, WINDOWS, 9, normalised)
    torch.testing.assert_close(small(input_ids=WINDOWS).logits, expected, rtol=1e-8, atol=1e-8)
    assert (expected - model(input_ids=WINDOWS).logits).abs().max() > 0.01, "the width matters here"


@torch.no_grad()
def test_folder_loads_by_its_own_files_and_gives_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    small = slice_model(build("llama tied, biases, yarn").bfloat16(), WINDOWS, 9)
    assert small.dtype == torch.bfloat16
    folder = tmp_path / "small"
    small.save_pretrained(folder)
    assert not any("megamf" in file.read_text() for file in folder.glob("*.py"))
    loaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="auto")
    assert type(loaded).__module__.startswith("transformers_modules")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight and loaded.dtype == torch.bfloat16
    assert torch.equal(loaded(input_ids=WINDOWS).logits, small(input_ids=WINDOWS).logits)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "neox"])
def test_generation_with_cache_and_padding(name):
    small = slice_model(build(name), WINDOWS, 11)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    alone = small.generate(WINDOWS[:1, :5], use_cache=False, **options)
    assert torch.equal(small.generate(WINDOWS[:1, :5], use_cache=True, **options), alone)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), WINDOWS[:1, :5]], dim=1)
    both = torch.cat([padded, WINDOWS[1:2, :9]])
    mask = torch.ones_like(both)
    mask[0, :4] = 0
    out = small.generate(both, attention_mask=mask, **options)
    assert torch.equal(out[:1, 4:], alone)
    logits, loss = small(input_ids=WINDOWS).logits, small(input_ids=WINDOWS, labels=WINDOWS).loss
    expected = -logits[:, :-1].log_softmax(-1).gather(-1, WINDOWS[:, 1:, None]).mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(small(input_ids=WINDOWS, logits_to_keep=2).logits, logits[:, -2:])


def test_width_is_the_nearest_to_the_parameters_asked_for():
    config = sliced_config(build("llama"), 16)
    sizes = {width: sliced_parameters(config, width) for width in range(1, 17)}
    for wanted in (sizes[1], 1500, 3000, 4321, sizes[16], 10**6):
        assert width_for(config, wanted) == min(sizes, key=lambda width: abs(sizes[width] - wanted))
    assert width_for(config, sizes[9], multiple=4) in (8, 12)
    with pytest.raises(UserError, match=f"a stream of 1 dimensions has {sizes[1]:,} already"):
        width_for(config, sizes[1] - 1)
    with pytest.raises(UserError, match="multiple=32 is above the hidden size 16"):
        width_for(config, 1000, multiple=32)


def test_what_cannot_be_sliced_is_refused():
    for width in (0, 17):
        with pytest.raises(UserError, match=f"{width} dimensions is outside 1..16"):
            slice_model(build("neox"), WINDOWS, width)
    with pytest.raises(UserError, match="token id 23, the model knows 23"):
        slice_model(build("neox"), WINDOWS + 1, 4)
    other = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=2))
    with pytest.raises(UserError, match=r"model_type 'gpt2'\) cannot be sliced: .*llama"):
        slice_model(other, WINDOWS % 8, 4)
    dynamic = LlamaConfig(**LLAMA, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0})
    with pytest.raises(UserError, match="rope_type 'dynamic'"):
        slice_model(LlamaForCausalLM(dynamic), WINDOWS, 4)
    with pytest.raises(UserError, match="sliding window"):
        slice_model(MistralForCausalLM(MistralConfig(**LLAMA, sliding_window=8)), WINDOWS, 4)

"""Block influence against cosines written out, and models with fewer layers."""

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from megamf.compress.layers import block_influence, block_sizes, choose_layers, remove_layers
from megamf.compress.neurons import layers_of
from megamf.errors import UserError
from megamf.hf.modeling import ModuleFormerForCausalLM
from megamf.hf.portable.configuration_moduleformer import ModuleFormerConfig

TOKENS = [torch.arange(7) % 11, torch.tensor([3, 1, 1]), torch.tensor([5]), torch.tensor([1, 10, 2, 2])]


def llama():
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=11, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=32,
        )
    )  # fmt: skip


def neox():
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=11, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2,
            max_position_embeddings=32,
        )
    )  # fmt: skip


def molm():
    return ModuleFormerForCausalLM(
        ModuleFormerConfig(
            vocab_size=11, n_layer=4, n_embd=16, n_head=1, att_hidden=16, ffd_hidden=8, n_att_experts=3,
            n_mlp_experts=4, n_mlp_experts_per_layer=[4, 2, 3, 2], gating_size=8, block_size=16, history_length=16,
        )
    )  # fmt: skip


@pytest.fixture(params=[llama, neox, molm], ids=["llama", "neox", "molm"])
def model(request):
    torch.manual_seed(0)
    model = request.param().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))  # so that layers differ
    return model


def final_norm(model):
    names = {"llama": "model.norm", "gpt_neox": "gpt_neox.final_layer_norm", "moduleformer": "transformer.ln_f"}
    return names[model.config.model_type]


def test_influence_is_one_minus_the_mean_cosine_over_tokens(model):
    influence = block_influence(model, TOKENS, batch=3)
    assert model.training and not any(block._forward_hooks for block in layers_of(model))
    model.eval()
    model.set_submodule(final_norm(model), nn.Identity())  # the last hidden state is then that of the last block
    total, count = torch.zeros(4, dtype=torch.float64), 0
    with torch.no_grad():
        for row in TOKENS:
            states = model(input_ids=row[None], output_hidden_states=True).hidden_states
            for layer in range(4):
                for before, after in zip(states[layer][0], states[layer + 1][0]):
                    total[layer] += 1 - before @ after / (before @ before).sqrt() / (after @ after).sqrt()
            count += len(row)
    assert len(states) == 5
    torch.testing.assert_close(influence, total / count, rtol=1e-7, atol=1e-9)


def test_removing_nothing_changes_nothing(model):
    same = remove_layers(model, [])
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), same.state_dict().values(), strict=True))
    assert same is not model


def test_removed_layers_are_skipped_saved_and_generate(model, tmp_path):
    model.eval()
    small = remove_layers(model, [1, 2])
    # A block of which nothing is added to its input is as good as none.
    whole = {name: value.clone() for name, value in model.state_dict().items()}
    for index in (1, 2):
        block = layers_of(model)[index]
        for name, parameter in block.named_parameters():
            if any(part in name for part in ("o_proj", "down_proj", "dense", "output_experts")):
                parameter.data.zero_()
    ids = TOKENS[0][None]
    with torch.no_grad():
        expected, found = model(input_ids=ids).logits, small(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    model.load_state_dict(whole)
    assert sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in small.parameters()) == sum(
        block_sizes(model)[i] for i in (1, 2)
    )

    small.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert type(loaded) is type(model) and loaded.config.num_hidden_layers == 2
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, found)
        options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        cached = loaded.generate(ids, use_cache=True, **options)
        assert torch.equal(cached, loaded.generate(ids, use_cache=False, **options))


def test_choice_is_by_score_and_nearest_to_the_target():
    assert choose_layers([0.5, 0.1, 0.3, 0.2], [10, 10, 10, 10], 20) == [1, 3]
    assert choose_layers([0.5, 0.1, 0.3, 0.2], [10, 10, 10, 10], 24.9) == [1, 3]
    assert choose_layers([0.5, 0.1, 0.3, 0.2], [10, 10, 10, 10], 25.1) == [1, 2, 3]
    assert choose_layers([0.5, 0.1, 0.3, 0.2], [10, 10, 10, 10], 40) == [1, 2, 3], "one stays"
    assert choose_layers([1.0, 1.0, 1.0], [1, 4, 2], 2) == [2]
    assert choose_layers([1.0, 1.0], [1, 1], 0) == []


def test_bad_requests_are_refused(model):
    with pytest.raises(UserError, match="layer 4 does not exist: the model has layers 0 to 3"):
        remove_layers(model, [4])
    with pytest.raises(UserError, match="all 4 layers would go"):
        remove_layers(model, range(4))
    with pytest.raises(UserError, match="50 parameters are to go, all 2 layers have 20"):
        choose_layers([0.0, 1.0], [10, 10], 50)
    with pytest.raises(UserError, match="token id 12"):
        block_influence(model, [torch.tensor([12, 1])])


def test_other_models_are_refused_with_the_list_of_what_is_supported():
    config = T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    with pytest.raises(UserError, match=r"model_type 't5'.* llama, .*gpt_neox"):
        block_influence(T5ForConditionalGeneration(config), TOKENS)

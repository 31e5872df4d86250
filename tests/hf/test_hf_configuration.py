"""Between ModelConfig and the public config.json."""

import pytest

from megamf.config import ModelConfig, load_config
from megamf.errors import UserError
from megamf.hf.configuration import to_model_config, to_public
from megamf.hf.portable.configuration_moduleformer import ModuleFormerConfig


@pytest.mark.parametrize("preset", ["molm-350m-4b", "molm-700m-4b", "molm-700m-8b", "molm-8b-hd128"])
def test_there_and_back(preset):
    model = load_config(preset=preset).model
    assert to_model_config(ModuleFormerConfig(**to_public(model))) == model


def test_the_fields_of_the_released_8b():
    public = to_public(load_config(preset="molm-700m-8b").model)
    released = {
        "activation_function": "gelu_new", "att_func": "stickbreaking", "att_hidden": 1024, "attn_pdrop": 0.0,
        "aux_loss_type": "mi", "aux_loss_weight": 0.0, "block_size": 512, "bos_token_id": 50256, "embd_pdrop": 0.0,
        "eos_token_id": 50256, "ffd_hidden": 2048, "gate_type": "mlp", "gating_size": 256, "history_length": 512,
        "initializer_range": 0.02, "k_att": 2, "k_mlp": 2, "layer_norm_epsilon": 1e-5, "local_size": 1,
        "model_type": "moduleformer", "moe_pdrop": 0.0, "moe_type": "moe", "n_att_experts": 16, "n_ctx": 24576,
        "n_embd": 1024, "n_head": 1, "n_layer": 48, "n_mlp_experts": 32, "pre_norm": True, "resid_pdrop": 0.0,
        "sample_topk": 0, "tie_word_embeddings": False, "universal": False, "use_cache": True, "vocab_size": 50295,
        "world_size": None,
    }  # fmt: skip
    assert public == released
    assert list(public) == sorted(public)


def test_dense_baselines_have_no_public_form():
    with pytest.raises(UserError, match="kind=dense"):
        to_public(ModelConfig(kind="dense"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"universal": True}, "universal=True is not supported, only False"),
        ({"pre_norm": False}, "pre_norm=False"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings=True"),
        ({"activation_function": "mish"}, "activation_function.*'mish'"),
    ],
)
def test_unsupported_values(changes, message):
    with pytest.raises(UserError, match=message):
        to_model_config(ModuleFormerConfig(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"att_hidden": 10, "n_head": 3}, "att_hidden=10 is not divisible by n_head=3"),
        ({"k_mlp": 40}, r"k_mlp=40 is outside 1..n_mlp_experts=32"),
        ({"sample_topk": 3}, r"sample_topk=3 is outside 0..k_att=2"),
        ({"gate_type": "hash"}, "gate_type='hash'"),
    ],
)
def test_contradictions(changes, message):
    with pytest.raises(ValueError, match=message):
        ModuleFormerConfig(**changes)


def test_ids_that_are_not_there_stay_none():
    config = ModuleFormerConfig(bos_token_id=None, eos_token_id=None)
    again = ModuleFormerConfig(**config.to_dict())
    assert (again.bos_token_id, again.eos_token_id, again.pad_token_id) == (None, None, None)

"""The memory formula against bytes counted by hand and against what a run of the model saves."""

import pytest
import torch

from megamf.config import ModelConfig, load_config
from megamf.model import ModuleFormer, initialise
from megamf.plan import count_parameters, rank_memory
from megamf.plan.memory import layer_activations


def config(*overrides, preset="molm-350m-4b"):
    return load_config(preset=preset, overrides=list(overrides))


def test_states_of_one_rank_are_sixteen_bytes_a_parameter_in_bf16():
    # 2 weight + 2 gradient + 4 master + 8 moments + 4 step gradient
    memory = rank_memory(config(), 1, ep=1, zero_stage=1)
    total = 4_142_526_464
    assert (memory.weights, memory.gradients, memory.optimizer) == (2 * total, 2 * total, 16 * total)


def test_fp32_without_zero_keeps_no_second_copy_of_the_weights():
    memory = rank_memory(config(preset="nano"), 2, ep=1, zero_stage=0)
    total = count_parameters(config(preset="nano").model).total
    assert (memory.weights, memory.gradients, memory.optimizer) == (4 * total, 4 * total, 8 * total)


def test_zero_shards_experts_over_their_replicas_only():
    counts = count_parameters(config().model)
    for ep in (1, 2, 4, 8, 16):
        memory = rank_memory(config(), 16, ep=ep, zero_stage=2)
        assert memory.weights == 2 * (counts.shared + counts.experts // ep)
        # 16/ep replicas of 1/ep of the experts: every rank keeps a sixteenth, whatever ep is.
        shard = -(-counts.shared // 16) + counts.experts // 16
        assert memory.gradients == 2 * shard
        assert memory.optimizer == 16 * shard


def test_more_recomputation_and_smaller_batches_need_less():
    modes = ("none", "experts", "full")
    sizes = [rank_memory(config(f"train.activation_checkpointing={m}"), 8, ep=1, zero_stage=1) for m in modes]
    assert sizes[0].activations > sizes[1].activations > sizes[2].activations
    half = rank_memory(config("train.micro_batch=4", "train.activation_checkpointing=none"), 8, ep=1, zero_stage=1)
    assert 2 * half.activations == sizes[0].activations


def test_imbalance_matters_only_between_ranks():
    even, skewed = (rank_memory(config(), 8, ep=8, zero_stage=1, imbalance=i).activations for i in (1.0, 2.0))
    assert skewed > even
    alone = [rank_memory(config(), 8, ep=1, zero_stage=1, imbalance=i).activations for i in (1.0, 2.0)]
    assert alone[0] == alone[1]


def test_mistakes_are_refused_with_both_values():
    with pytest.raises(ValueError, match=r"world size 6 is not divisible by parallel\.ep=4"):
        rank_memory(config(), 6, ep=4, zero_stage=1)
    with pytest.raises(ValueError, match="zero_stage=3"):
        rank_memory(config(), 8, ep=1, zero_stage=3)
    with pytest.raises(ValueError, match=r"imbalance=0\.5"):
        rank_memory(config(), 8, ep=1, zero_stage=1, imbalance=0.5)


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("recompute", [False, True])
def test_layer_formula_agrees_with_what_autograd_keeps(heads, recompute):
    model = ModelConfig(
        vocab_size=64, n_layer=1, n_embd=64, n_head=heads, att_hidden=64, ffd_hidden=128, n_att_experts=4,
        n_mlp_experts=8, k_att=2, k_mlp=2, gating_size=32,
    )  # fmt: skip
    built = ModuleFormer(model).train()
    initialise(built, model, seed=0)
    built.set_activation_checkpointing("experts" if recompute else "none")
    own = {parameter.untyped_storage().data_ptr() for parameter in built.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and tensor.is_floating_point():
            kept[storage.data_ptr()] = storage  # held, so that no address comes back
        return tensor

    h_BTD = torch.randn(2, 128, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        h_BTD, *_ = built.transformer.h[0](h_BTD)
    found = sum(storage.nbytes() for storage in kept.values())
    outside, hidden = layer_activations(model, 256, 4)
    assert found == pytest.approx(outside + (0 if recompute else hidden), rel=0.1)

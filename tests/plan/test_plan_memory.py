"""The memory formula against bytes counted by hand and against what a run of the model saves."""

import pytest
import torch

from megamf.config import ConfigError, ModelConfig, load_config
from megamf.model import ModuleFormer, initialise
from megamf.plan import count_parameters
from megamf.plan.job import Job
from megamf.plan.memory import layer_activations, rank_memory

BUCKET = 500_000_000  # elements, of the packaged DeepSpeed configurations


def memory(num_ranks, *overrides, preset="molm-350m-4b", imbalance=1.0):
    config = load_config(preset=preset, overrides=["train.global_batch=1024", *overrides])
    return rank_memory(Job.of(config, num_ranks), imbalance)


def test_states_of_one_rank_are_sixteen_bytes_a_parameter_in_bf16():
    # 2 weight + 2 gradient + 4 master + 8 moments, and at the update 2 + 4 of the largest group.
    found = memory(1)
    counts = count_parameters(load_config(preset="molm-350m-4b").model)
    total = 4_142_526_464
    assert (found.weights, found.gradients, found.optimizer) == (2 * total, 2 * total, 12 * total)
    assert found.update == 6 * counts.experts
    assert found.bucket == 2 * BUCKET


def test_layers_that_cannot_be_shared_out_evenly():
    """Every rank has as many slots as the largest share of a layer has experts."""
    lists = ["model.n_layer=2", "model.n_att_experts=5", "model.n_att_experts_per_layer=[5,4]",
             "model.n_mlp_experts=9", "model.n_mlp_experts_per_layer=[8,9]"]  # fmt: skip
    config = load_config(preset="nano", overrides=["train.global_batch=16", "parallel.ep=4", *lists])
    model = config.model
    slots = 2 * model.n_embd * ((2 + 1) * model.att_hidden + (2 + 3) * model.ffd_hidden)
    assert Job.of(config, 4).local_experts == slots


def test_fp32_without_zero_keeps_no_second_copy_of_the_weights():
    found = memory(2, "deepspeed=zero0", preset="nano")
    total = count_parameters(load_config(preset="nano").model).total
    assert (found.weights, found.gradients, found.optimizer) == (4 * total, 4 * total, 8 * total)
    assert (found.bucket, found.update) == (0, 0)


def test_zero_shards_experts_over_their_replicas_only():
    counts = count_parameters(load_config(preset="molm-350m-4b").model)
    for ep in (1, 2, 4, 8, 16):
        found = memory(16, f"parallel.ep={ep}", "deepspeed=zero2")
        assert found.weights == 2 * (counts.shared + counts.experts // ep)
        # 16/ep replicas of 1/ep of the experts: every rank keeps a sixteenth, whatever ep is.
        shard = -(-counts.shared // 16) + counts.experts // 16
        assert found.gradients == 2 * shard
        assert found.optimizer == 12 * shard


def test_the_peak_is_the_worst_of_the_phases():
    once = memory(8, "train.global_batch=64")
    again = memory(8, "train.global_batch=128")
    resident = once.weights + once.optimizer
    # One micro batch: the reduction meets the gradients when the activations are gone.
    assert once.peak == resident + max(
        once.activations + once.loss, once.bucket + once.activations + once.layer,
        once.gradients + once.bucket + once.layer,
    )  # fmt: skip
    # Two: all that the first left, and the second's activations on top.
    assert again.peak == resident + again.gradients + again.bucket + again.activations + max(again.loss, again.layer)


def test_more_recomputation_and_smaller_batches_need_less():
    modes = ("none", "experts", "full")
    sizes = [memory(8, f"train.activation_checkpointing={m}") for m in modes]
    assert sizes[0].activations > sizes[1].activations > sizes[2].activations
    assert sizes[0].layer < sizes[1].layer < sizes[2].layer
    half = memory(8, "train.micro_batch=4", "train.activation_checkpointing=none")
    assert 2 * half.activations == sizes[0].activations


def test_imbalance_matters_only_between_ranks():
    even, skewed = (memory(8, "parallel.ep=8", imbalance=i).activations for i in (1.0, 2.0))
    assert skewed > even
    alone = [memory(8, imbalance=i).activations for i in (1.0, 2.0)]
    assert alone[0] == alone[1]


def test_mistakes_are_refused_with_both_values():
    with pytest.raises(ConfigError, match=r"world size 6 is not divisible by parallel\.ep=4"):
        memory(6, "parallel.ep=4")
    with pytest.raises(ConfigError, match=r"train\.global_batch=1024 is not divisible.*7 data-parallel ranks = 56"):
        memory(7)


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

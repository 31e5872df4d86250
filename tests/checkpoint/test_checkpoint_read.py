import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from checkpoint_samples import MODULES, NUM_MLP, logical_model, training_state

from megamf.checkpoint import GROUPS, Checkpoint, check_model, save
from megamf.errors import UserError

EXPERTS = "transformer.h.1.mlpf.experts.weight"


def test_the_logical_model_comes_back(write_step):
    with Checkpoint(write_step(5)) as checkpoint:
        assert checkpoint.step == 5
        assert checkpoint.state == {"step": 5, "tokens": 5000}
        assert checkpoint.model == {"n_layer": 2}
        assert checkpoint.modules == MODULES
        assert checkpoint.groups == GROUPS
        for offset, group in enumerate(GROUPS):
            model = logical_model(5 + offset, torch.float32 if offset else torch.bfloat16)
            assert checkpoint.logical_shapes(group) == {key: tuple(model[key].shape) for key in sorted(model)}
            for key, tensor in model.items():
                found = checkpoint.full(key, group)
                assert found.dtype == tensor.dtype
                assert torch.equal(found, tensor)


def test_names_shapes_and_dtypes_of_stored_tensors(write_step):
    with Checkpoint(write_step(5)) as checkpoint:
        for full, tensor in training_state(5).items():
            group, name = full.split("/")
            assert name in checkpoint.names(group)
            assert checkpoint.has(name, group)
            assert checkpoint.shape(name, group) == tensor.shape
            assert checkpoint.dtype(name, group) == tensor.dtype
        assert sum(len(checkpoint.names(group)) for group in GROUPS) == len(training_state())


@pytest.mark.parametrize("chosen", [[0], [2, 0], [1, 1], [], None, range(1, 3)])
def test_chosen_experts_are_stacked_in_their_order(write_step, chosen):
    whole = logical_model(6)[EXPERTS]
    with Checkpoint(write_step(5)) as checkpoint:
        found = checkpoint.stacked(EXPERTS, chosen, "master")
        expected = whole if chosen is None else whole[list(chosen)]
        assert found.shape == expected.shape
        assert torch.equal(found, expected)


def test_what_is_read_is_the_readers_own(write_step):
    with Checkpoint(write_step(5)) as checkpoint:
        first = checkpoint.tensor("lm_head.weight")
        good = first.clone()
        first.zero_()
        assert torch.equal(checkpoint.tensor("lm_head.weight"), good)
        kept = checkpoint.tensor("lm_head.weight")
    assert torch.equal(kept, good)


def test_what_is_not_there_is_told(write_step):
    with Checkpoint(write_step(5)) as checkpoint:
        with pytest.raises(UserError, match="stores no tensor weights/none"):
            checkpoint.tensor("none")
        with pytest.raises(UserError, match="an expert tensor: see `stacked`"):
            checkpoint.tensor(EXPERTS)
        with pytest.raises(UserError, match=r"no expert tensor weights/lm_head\.weight"):
            checkpoint.stacked("lm_head.weight")
        with pytest.raises(UserError, match=rf"modules 0\.\.{NUM_MLP - 1}, not \[3, -1\]"):
            checkpoint.stacked(EXPERTS, [3, 0, -1])
        with pytest.raises(UserError, match="stores no tensor wrong/lm_head"):
            checkpoint.shape("lm_head.weight", "wrong")


def test_groups_may_be_absent(tmp_path):
    with Checkpoint(save(tmp_path, 1, {"weights/a": torch.ones(2)}, {}, [], {}, run_id="r")) as checkpoint:
        assert checkpoint.groups == ("weights",)
        assert checkpoint.names("master") == []
        assert checkpoint.logical_shapes("master") == {}


def test_threads_share_one_checkpoint(write_step):
    with Checkpoint(write_step(5)) as checkpoint, ThreadPoolExecutor(8) as pool:
        expected = training_state(5)
        names = [full.split("/") for full in expected] * 3
        for (group, name), found in zip(names, pool.map(lambda item: checkpoint.tensor(item[1], item[0]), names)):
            assert torch.equal(found, expected[f"{group}/{name}"])


def test_close_lets_go_of_all_files(write_step):
    path = write_step(5)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with Checkpoint(path) as checkpoint:
            for name in checkpoint.names():
                checkpoint.tensor(name)
            assert len(os.listdir("/proc/self/fd")) > before
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_same_model_is_accepted(write_step):
    with Checkpoint(write_step(5)) as checkpoint:
        check_model(checkpoint, {key: tensor.shape for key, tensor in logical_model(0).items()})


def test_another_model_is_refused_with_both_shapes_and_counts(write_step):
    shapes = {key: tuple(tensor.shape) for key, tensor in logical_model(0).items()}
    shapes[EXPERTS] = (9, 4, 5)
    shapes["new.weight"] = shapes.pop("lm_head.weight")
    with Checkpoint(write_step(5)) as checkpoint, pytest.raises(UserError) as caught:
        check_model(checkpoint, shapes)
    message = str(caught.value)
    assert f"{EXPERTS}: [3, 4, 5] in the checkpoint, [9, 4, 5] in the model" in message
    assert "1 differ in shape, 1 are missing and 1 are unknown" in message
    assert "new.weight: only in the model" in message and "lm_head.weight: only in the checkpoint" in message

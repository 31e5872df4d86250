"""What is opened for which path, and which copy of the weights is read."""

import pytest
import torch

from megamf.checkpoint import save
from megamf.errors import UserError
from megamf.evaluate.weights import (
    CheckpointWeights,
    expected_shapes,
    is_public_folder,
    open_weights,
    trained_length,
)


def test_public_folders_are_told_by_their_configuration(tmp_path):
    assert not is_public_folder(tmp_path)
    cases = {'{"model_type": "moduleformer"}': True, '{"model_type": "gpt2"}': False, "nonsense": False}
    for text, public in cases.items():
        (tmp_path / "config.json").write_text(text)
        assert is_public_folder(tmp_path) == public


def test_tensors_by_name(checkpoint):
    step, model = checkpoint()
    with open_weights(step) as weights:
        assert isinstance(weights, CheckpointWeights)
        shapes = expected_shapes(weights.model)
        weights.check(shapes)
        name = "transformer.h.1.mlpf.experts.weight"
        assert shapes[name] == (3, 16, 20) and weights.dtype(name) == torch.float32
        assert torch.equal(weights.read(name), model.state_dict()[name])
        with pytest.raises(UserError, match=r"transformer\.more"):
            weights.check(shapes | {"transformer.more": (1,)})


def test_a_model_configuration_that_is_none(tmp_path):
    step = save(tmp_path, 0, {"weights/x": torch.ones(1)}, {}, [], {"vocab_size": -1}, run_id="r")
    with pytest.raises(UserError, match=r"model\.json is no model configuration"):
        CheckpointWeights(step)


def test_trained_length(checkpoint):
    assert trained_length(checkpoint()[0]) == 16
    assert trained_length(checkpoint({"config": {"train": {"seq_len": 21}}})[0]) == 21

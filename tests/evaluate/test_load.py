"""Models come back from checkpoints and public folders, in any dtype."""

import pytest
import torch

from megamf.errors import UserError
from megamf.evaluate import load_model
from megamf.evaluate.load import check_vocabulary
from megamf.hf.convert import export_hf


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_checkpoint(checkpoint, dtype):
    step, model = checkpoint()
    for path in (step, step.parent, step.parent.parent, step.parent / "latest"):
        loaded, config = load_model(path, dtype)
        assert config == model.config and not loaded.training
        expected = model.state_dict()
        for name, value in loaded.state_dict().items():
            assert value.dtype == dtype and torch.equal(value, expected[name].to(dtype)), name


def test_dense_checkpoint(checkpoint):
    step, model = checkpoint(kind="dense", vocab_size=20, n_layer=1, n_embd=8, att_hidden=8, ffd_hidden=8)
    loaded, config = load_model(step)
    assert config.kind == "dense"
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())


def test_public_folder(checkpoint, tmp_path):
    step, model = checkpoint()
    export_hf(step, tmp_path / "public")
    loaded, config = load_model(tmp_path / "public")
    assert config == model.config
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())


def test_nothing_there(tmp_path):
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UserError, match="checkpoint"):
            load_model(path)


def test_vocabulary():
    class Tokenizer:
        name, vocab_size = "words", 301

    check_vocabulary(Tokenizer(), 301)
    with pytest.raises(UserError, match="words has 301 ids, the model's vocabulary 300"):
        check_vocabulary(Tokenizer(), 300)

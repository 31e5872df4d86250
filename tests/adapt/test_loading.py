"""Base models: heads, labels, and folders that cannot serve."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from megamf.adapt.loading import load_base, load_tokenizer
from megamf.adapt.tasks import Task
from megamf.errors import UserError


@pytest.fixture
def copied(tiny_models, tmp_path):
    return lambda name: shutil.copytree(tiny_models / name, tmp_path / name)


def task_of(folder, kind):
    return Task(kind, load_tokenizer(folder), 12, labels=["x", "y"] if kind == "classification" else [])


def test_heads_and_labels(tiny_models):
    for name, head in (("bert", "classifier"), ("llama", "score"), ("molm", "score")):
        folder = tiny_models / name
        model = load_base(folder, task_of(folder, "classification"), torch.float64)
        assert getattr(model, head).weight.shape == (2, 16) and model.config.id2label == {0: "x", 1: "y"}
        assert model.dtype == torch.float64 and model.config.pad_token_id == 0
        assert getattr(load_base(folder, task_of(folder, "regression")), head).weight.shape == (1, 16)
    assert load_base(tiny_models / "molm", task_of(tiny_models / "molm", "generation")).lm_head.weight.shape == (40, 16)


def test_encoders_and_incomplete_folders_are_refused(copied):
    bert = copied("bert")
    with pytest.raises(UserError, match="'bert' is an encoder"):
        load_base(bert, task_of(bert, "generation"))
    tensors = load_file(bert / "model.safetensors")
    del tensors["encoder.layer.1.output.dense.weight"]
    save_file(tensors, bert / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"1 tensors are not in its files, first bert.encoder.layer.1.output.dense"):
        load_base(bert, task_of(bert, "regression"))
    llama = copied("llama")
    (llama / "model.safetensors").rename(llama / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot be loaded for generation"):
        load_base(llama, task_of(llama, "generation"))


def test_tokenizers_that_do_not_belong(copied, tmp_path):
    llama = copied("llama")
    task = task_of(llama, "generation")
    task.tokenizer.add_tokens(["new"])
    with pytest.raises(UserError, match="41 tokens, the model 40"):
        load_base(llama, task)
    for path in llama.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(UserError, match="no tokenizer"):
        load_tokenizer(llama)
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UserError, match="not a Hugging Face model folder"):
            load_tokenizer(folder)

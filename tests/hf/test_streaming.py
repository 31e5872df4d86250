"""Files against the safetensors library, and folders that must be refused."""

import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from megamf.errors import UserError
from megamf.hf.layout import Entry
from megamf.hf.streaming import INDEX, read_tensor, tensor_files, tensor_shape, write_file


def tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        "a": torch.randn(3, 5, generator=generator),
        "b": torch.ones(7, 7, dtype=torch.int8).tril(),
        "c": torch.randn(4, generator=generator, dtype=torch.float64),
        "d": torch.randn(5, 2, generator=generator).bfloat16().t(),
        "e": torch.zeros(0, 3),
    }


def test_the_library_reads_what_is_written(tmp_path):
    values = tensors()
    entries = [Entry(name, tuple(value.shape), value.dtype) for name, value in values.items()]
    write_file(tmp_path / "x.safetensors", entries, lambda entry: values[entry.name])
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == values.keys()
    for name, value in values.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name


def test_what_the_library_wrote_is_read(tmp_path):
    values = {name: value.contiguous() for name, value in tensors().items()}
    save_file(values, str(tmp_path / "model.safetensors"))
    files = tensor_files(tmp_path)
    assert files.keys() == values.keys()
    assert torch.equal(read_tensor(files["d"], "d"), values["d"]) and tensor_shape(files["a"], "a") == (3, 5)


def sharded(folder, index):
    save_file({"a": torch.ones(2)}, str(folder / "model-1.safetensors"))
    save_file({"b": torch.ones(2)}, str(folder / "model-2.safetensors"))
    (folder / INDEX).write_text(index if isinstance(index, str) else json.dumps({"weight_map": index}))


def test_shards(tmp_path):
    sharded(tmp_path, {"a": "model-1.safetensors", "b": "model-2.safetensors"})
    assert {name: path.name for name, path in tensor_files(tmp_path).items()} == {
        "a": "model-1.safetensors",
        "b": "model-2.safetensors",
    }


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"a": "model-1.safetensors", "b": "model-3.safetensors"}, "model-3.safetensors, which is missing"),
        ({"a": "model-1.safetensors", "c": "model-2.safetensors"}, "disagree, first about b"),
        ({"a": "../model-1.safetensors"}, "no .safetensors file of this folder"),
        ({"a": "/etc/passwd"}, "no .safetensors file of this folder"),
        ({"a": "model-1.bin"}, "no .safetensors file of this folder"),
        ("{", "is not the index"),
        ("[]", "is not the index"),
    ],
)
def test_damaged_indices(tmp_path, index, message):
    sharded(tmp_path, index)
    with pytest.raises(UserError, match=message):
        tensor_files(tmp_path)


def test_files_that_would_be_left_out_are_told(tmp_path):
    sharded(tmp_path, {"a": "model-1.safetensors", "b": "model-2.safetensors"})
    save_file({"c": torch.ones(2)}, str(tmp_path / "model-3.safetensors"))
    with pytest.raises(UserError, match=r"holds model-3\.safetensors, which neither is .* nor is named by"):
        tensor_files(tmp_path)
    (tmp_path / "model-3.safetensors").rename(tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"holds both model\.safetensors and model\.safetensors\.index\.json"):
        tensor_files(tmp_path)


def test_pickles_are_never_opened(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "exploded"), "w"))

    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UserError, match=r"pickled weights only.*--pickled-weights"):
        tensor_files(tmp_path)
    assert not (tmp_path / "exploded").exists()


def test_truncated_and_empty(tmp_path):
    with pytest.raises(UserError, match=r"holds no model\.safetensors"):
        tensor_files(tmp_path)
    save_file({"a": torch.ones(100)}, str(tmp_path / "model.safetensors"))
    content = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[:-10])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        tensor_files(tmp_path)

"""Pickled weights: left alone unless asked for, read as safetensors are, and never run."""

import json
import pickle
import zipfile

import pytest
import torch
from safetensors.torch import load_file

from megamf.checkpoint import Checkpoint
from megamf.cli import run
from megamf.errors import UserError
from megamf.hf.convert import import_hf
from megamf.hf.pickled import PICKLED, PICKLED_INDEX, load_tensors
from megamf.tools.import_hf import main


class Bomb:
    """Writes a file when it is unpickled without restrictions."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.fixture
def pickled(public_folder):
    """A folder with pytorch_model.bin in place of its safetensors, and the weights."""

    def make(zipped=True, **changes):
        folder = public_folder(**changes)
        weights = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        # As released: with the constant masks, and one tensor that is a transposed view.
        weights["transformer.h.0.attn.mask"] = torch.ones(13, 13, dtype=torch.int8).tril()
        name = "lm_head.weight"
        weights[name] = weights[name].t().contiguous().t()
        torch.save(weights, folder / PICKLED, _use_new_zipfile_serialization=zipped)
        return folder, weights

    return make


def same(step, weights):
    with Checkpoint(step) as checkpoint:
        names = checkpoint.logical_shapes("weights")
        assert names.keys() == weights.keys() - {"transformer.h.0.attn.mask"}
        return all(torch.equal(checkpoint.full(name), weights[name]) for name in names)


@pytest.mark.parametrize("zipped", [True, False])
def test_asked_for_by_name(pickled, tmp_path, capsys, zipped):
    folder, weights = pickled(zipped, dtype=torch.bfloat16)
    assert zipfile.is_zipfile(folder / PICKLED) == zipped
    before = (folder / PICKLED).read_bytes()
    assert run(main, [str(folder), str(tmp_path / "ck")]) == 2
    assert "--pickled-weights" in capsys.readouterr().err and not (tmp_path / "ck").exists()
    assert run(main, [str(folder), str(tmp_path / "ck"), "--pickled-weights"]) == 0
    assert same(tmp_path / "ck", weights) and (folder / PICKLED).read_bytes() == before


def test_shards(pickled, tmp_path):
    folder, weights = pickled()
    (folder / PICKLED).unlink()
    names = sorted(weights)
    of = {name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(names)}
    for file in set(of.values()):
        torch.save({name: weights[name] for name in names if of[name] == file}, folder / file)
    (folder / PICKLED_INDEX).write_text(json.dumps({"weight_map": of}))
    assert same(import_hf(folder, tmp_path / "ck", pickled=True), weights)
    for change, message in (
        ({names[0]: of[names[1]]}, "disagree, first about"),
        ({names[0]: "../pytorch_model.bin"}, "no .bin file of this folder"),
        ({names[0]: "pytorch_model-00000.bin"}, "which is missing"),
    ):
        (folder / PICKLED_INDEX).write_text(json.dumps({"weight_map": of | change}))
        with pytest.raises(UserError, match=message):
            import_hf(folder, tmp_path / "other", pickled=True)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("zipped", [True, False])
def test_hostile_pickles_are_not_run(pickled, tmp_path, capsys, zipped, protocol):
    folder, weights = pickled()
    mark = tmp_path / "exploded"
    # Beside good tensors, in either format of torch; and as a bare pickle.
    torch.save(
        weights | {"x": Bomb(mark)}, folder / PICKLED, _use_new_zipfile_serialization=zipped, pickle_protocol=protocol
    )
    assert run(main, [str(folder), str(tmp_path / "ck"), "--pickled-weights"]) == 2
    message = capsys.readouterr().err
    assert "pytorch_model.bin is refused" in message and "Traceback" not in message
    (folder / PICKLED).write_bytes(pickle.dumps(Bomb(mark), protocol=protocol))
    assert run(main, [str(folder), str(tmp_path / "ck"), "--pickled-weights"]) == 2
    assert not mark.exists() and not (tmp_path / "ck").exists()


def test_only_tensors_by_name(pickled, tmp_path):
    folder, weights = pickled()
    cases = {
        "holds list, expected tensors by name": [torch.ones(1)],
        "'epoch' is int, expected a tensor": weights | {"epoch": 3},
        "'s' is torch.float32 torch.sparse_coo": weights | {"s": torch.ones(2, 2).to_sparse()},
        "'m' is torch.complex64": weights | {"m": torch.ones(2, dtype=torch.complex64)},
        "first of no use: extra": weights | {"extra": torch.ones(2)},
    }
    for message, content in cases.items():
        torch.save(content, folder / PICKLED)
        with pytest.raises(UserError, match=message):
            import_hf(folder, tmp_path / "ck", pickled=True)
    whole = (folder / PICKLED).read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"PK\x03\x04 no archive"):
        (folder / PICKLED).write_bytes(damaged)
        with pytest.raises(UserError, match="is refused, it is no plain file of tensors"):
            load_tensors(folder / PICKLED)
    assert not (tmp_path / "ck").exists()


def test_pickles_that_are_not_needed_or_not_there(public_folder, pickled, tmp_path):
    folder = public_folder("whole")
    with pytest.raises(UserError, match="leave --pickled-weights out"):
        import_hf(folder, tmp_path / "ck", pickled=True)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"holds no pytorch_model\.bin and no"):
        import_hf(folder, tmp_path / "ck", pickled=True)

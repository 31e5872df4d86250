"""`megamf import-hf`: the checkpoint it writes, and mistakes."""

import json

import pytest
import torch
from safetensors.torch import save_file

from megamf.cli import run
from megamf.config import ModelConfig
from megamf.evaluate import load_model
from megamf.hf.configuration import to_public
from megamf.hf.layout import public_shapes
from megamf.tools.import_hf import main


@pytest.fixture
def folder(tmp_path):
    config = ModelConfig(
        vocab_size=20, n_layer=1, n_embd=16, att_hidden=16, ffd_hidden=16, n_att_experts=2, n_mlp_experts=2,
        k_att=1, k_mlp=1, gating_size=4,
    )  # fmt: skip
    place = tmp_path / "public"
    place.mkdir()
    (place / "config.json").write_text(json.dumps(to_public(config)))
    weights = {name: torch.randn(shape) for name, shape in public_shapes(config).items()}
    save_file(weights, str(place / "model.safetensors"))
    return place, weights


def test_import(folder, tmp_path, capsys):
    place, weights = folder
    assert main([str(place), str(tmp_path / "ck")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "ck" / "step-00000000")
    model, _ = load_model(tmp_path / "ck")
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_mistakes(folder, tmp_path, capsys):
    place, _ = folder
    assert run(main, [str(place), str(tmp_path / "ck")]) == 0
    assert run(main, [str(place), str(tmp_path / "ck")]) == 2
    assert "already holds checkpoints" in capsys.readouterr().err
    (place / "model.safetensors").rename(place / "pytorch_model.bin")
    assert run(main, [str(place), str(tmp_path / "other")]) == 2
    assert "pickled weights only" in capsys.readouterr().err
    assert run(main, [str(tmp_path / "none"), str(tmp_path / "other")]) == 2
    assert not (tmp_path / "other").exists()


def test_tensors_that_do_not_belong(folder, tmp_path, capsys):
    place, weights = folder
    first = next(iter(weights))
    for change, message in (
        ({first: None}, f"missing: {first}"),
        ({"lm_head.bias": torch.ones(20)}, "of no use: lm_head.bias"),
        ({first: torch.ones(3)}, f"{first} has shape [3]"),
    ):
        edited = {name: value for name, value in (weights | change).items() if value is not None}
        save_file(edited, str(place / "model.safetensors"))
        before = {path.name: path.read_bytes() for path in place.iterdir()}
        assert run(main, [str(place), str(tmp_path / "ck")]) == 2
        said = capsys.readouterr().err.replace("\n", " ")
        assert message in said and "Traceback" not in said
        assert {path.name for path in tmp_path.iterdir()} == {"public"}
        assert {path.name: path.read_bytes() for path in place.iterdir()} == before

"""Folders of pruned models: what is in them, and that they load without megamf and compute the same."""

import json
import subprocess
import sys

import pytest
import torch
from compress_models import MODELS, llama
from test_remove import logits, random_keep
from transformers import AutoModelForCausalLM

from megamf.compress.folder import load_causal_lm, save_folder
from megamf.compress.remove import remove_neurons
from megamf.errors import UserError

ALONE = """
import json, sys, torch
sys.modules["megamf"] = None
from transformers import AutoModelForCausalLM
found = {}
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, trust_remote_code=True)
    ids = torch.arange(11)[None]
    out = model(input_ids=ids).logits[0, -1].tolist()
    found[folder] = [out, type(model).__name__]
print(json.dumps(found))
"""


def test_saved_models_load_without_megamf_and_compute_the_same(tmp_path):
    models, plain = {}, {}
    for name, build in MODELS.items():
        if name in ("mistral", "qwen2"):
            continue
        model = build().double()
        cases = {"own": random_keep(model, 0.4), "plain": random_keep(model, 0.3, budget="layer", kinds=("ffn",))}
        if name == "molm":
            cases["modules"] = random_keep(model, 0.3, experts="modules")
        for case, keep in cases.items():
            out = tmp_path / f"{name}-{case}"
            models[str(out)] = remove_neurons(model, keep)
            plain[str(out)] = save_folder(models[str(out)], out, source=None, card="# x\n", report={"ratio": 0.4})
            assert json.loads((out / "pruning.json").read_text()) == {"ratio": 0.4}
    assert [folder for folder, is_plain in plain.items() if is_plain] == [
        str(tmp_path / f"{name}-plain") for name in ("llama", "neox")
    ]
    environment = {"HF_MODULES_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", ALONE, *models],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for folder, model in models.items():
        last, name = found[folder]
        ids = torch.arange(11)[None]
        with torch.no_grad():
            expected = model(input_ids=ids).logits[0, -1]
        assert (torch.tensor(last, dtype=torch.float64) - expected).abs().max().item() < 1e-12
        assert name == type(model).__name__
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_plain_folder_is_one_of_its_architecture(tmp_path):
    model = llama()
    small = remove_neurons(model, random_keep(model, 0.25, budget="layer", kinds=("ffn",)))
    assert save_folder(small, tmp_path / "out", source=None, card="", report={})
    tree = json.loads((tmp_path / "out" / "config.json").read_text())
    assert tree["model_type"] == "llama" and tree["intermediate_size"] == 15 and "auto_map" not in tree
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(loaded) is type(model)
    assert torch.equal(logits(loaded), logits(small))


def test_what_exists_is_not_touched_and_nothing_is_half_written(tmp_path, monkeypatch):
    model = llama()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("here")
    with pytest.raises(UserError, match="out exists already"):
        save_folder(model, tmp_path / "out", source=None, card="", report={})
    with pytest.raises(UserError, match="does not exist"):
        save_folder(model, tmp_path / "none" / "out", source=None, card="", report={})
    monkeypatch.setattr(type(model), "save_pretrained", lambda *_: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        save_folder(model, tmp_path / "new", source=None, card="", report={})
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "mine").read_text() == "here"


def test_folders_that_cannot_be_used_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"no config\.json.*megamf export-hf"):
        load_causal_lm(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"')
    with pytest.raises(UserError, match="cannot be loaded as a causal language model"):
        load_causal_lm(tmp_path)
    llama().save_pretrained(tmp_path / "bare")
    with pytest.raises(UserError, match="has no tokenizer"):
        load_causal_lm(tmp_path / "bare")

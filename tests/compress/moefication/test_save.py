"""Converted models on disk: the same outputs without megamf, and as an ordinary ModuleFormer."""

import os
import subprocess
import sys

import pytest
import torch
import transformers

from megamf.checkpoint import Checkpoint
from megamf.compress.moefication import (
    Choices,
    capture_inputs,
    convert,
    dense_layers,
    open_model,
    save_checkpoint,
    save_hf,
)
from megamf.compress.moefication.models import auto_class, outputs
from megamf.errors import UserError
from megamf.evaluate.load import load_model
from megamf.hf.convert import export_hf, max_logit_difference
from megamf.modularity.places import Place

FORMS = ["llama", "opt", "t5", "t5-gated", "bert-relu", "bert", "gpt2", "neox"]


def converted(model, windows, router="mlp", **choices):
    layers = dense_layers(model)
    inputs = capture_inputs(model, layers, windows, 60)
    given = {"expert_size": 16, "share": 0.5, "split": "random", "by_magnitude": True, "epochs": 1} | choices
    return convert(model, layers, inputs, Choices(router=router, **given))[0]


@pytest.fixture
def code_here(tmp_path, monkeypatch):
    """Modelling files that transformers copies go to a place of this test, and are forgotten after it."""

    def forget():
        for name in [name for name in sys.modules if name.split(".")[0] == "transformers_modules"]:
            del sys.modules[name]

    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    forget()
    yield
    forget()


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_a_folder_loads_by_its_own_code(make_model, windows, tmp_path, code_here, form):
    model = make_model(form)
    router = {"opt": "similarity", "t5": "truth"}.get(form, "mlp")
    about = converted(model, windows, router)
    folder = save_hf(model, about, tmp_path / f"out-{form}")
    loader = getattr(transformers, auto_class(model))
    again = loader.from_pretrained(folder, trust_remote_code=True, dtype=torch.float64).eval()
    assert torch.equal(outputs(again, windows), outputs(model, windows))
    assert again.config.model_type.startswith("moefied_") and again.config.moefication == about
    with pytest.raises(ValueError, match="custom code"):
        loader.from_pretrained(folder, trust_remote_code=False)


def test_a_folder_needs_no_megamf_and_generates(make_model, windows, tmp_path):
    model = make_model("llama")
    about = converted(model, windows)
    folder = save_hf(model, about, tmp_path / "out")
    script = (
        "import sys, torch\n"
        "from transformers import AutoModel, AutoModelForCausalLM\n"
        f"given = dict(trust_remote_code=True, dtype=torch.float64)\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(folder)!r}, **given)\n"
        "assert not any(name.split('.')[0] == 'megamf' for name in sys.modules)\n"
        f"x = torch.tensor({windows.tolist()})\n"
        f"torch.save(model(x).logits, {str(tmp_path / 'logits.pt')!r})\n"
        "assert model.generate(x, max_new_tokens=3, do_sample=False, eos_token_id=None).shape == (6, 19)\n"
        f"base = AutoModel.from_pretrained({str(folder)!r}, **given)\n"
        "assert torch.equal(model.lm_head(base(x).last_hidden_state), model(x).logits)\n"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path, env=environment, timeout=200)
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "logits.pt", weights_only=True), outputs(model, windows))


@torch.no_grad()
def test_a_dense_baseline_becomes_a_moduleformer(make_model, windows, tmp_path):
    model = make_model("megamf")
    about = converted(model, windows)
    step = save_checkpoint(model, about, tmp_path / "out", "dense")
    again, config = load_model(step, torch.float64)
    expected = outputs(model, windows)
    assert torch.allclose(again.logits(again(windows).hidden_BTD), expected, rtol=1e-11, atol=1e-11)
    assert (config.n_mlp_experts, config.k_mlp, config.ffd_hidden, config.n_att_experts) == (4, 2, 16, 1)
    with Checkpoint(step) as checkpoint:
        assert len(checkpoint.modules) == 2 * (4 + 1)
        assert checkpoint.has(f"{Place(0, 'mlp').rows_key(config)}")
    # Training steps see the same model, and leave no gate to learn.
    folder = export_hf(step, tmp_path / "hf").folder
    assert max_logit_difference(step, folder) < 1e-5  # in float32
    routing = again.transformer.h[0].mlpf.gate(torch.randn(5, 16, dtype=torch.float64))
    assert torch.equal(routing.gate_NK, torch.ones(5, 2, dtype=torch.float64))


@torch.no_grad()
def test_all_experts_of_the_checkpoint_are_the_dense_model(make_model, windows, tmp_path):
    model = make_model("megamf")
    expected = outputs(model, windows)
    about = converted(model, windows, share=1.0)
    again, _ = load_model(save_checkpoint(model, about, tmp_path / "out", "dense"), torch.float64)
    assert torch.allclose(again.logits(again(windows).hidden_BTD), expected, rtol=1e-11, atol=1e-11)


def test_what_is_refused(make_model, windows, tmp_path, save_model):
    model = make_model("llama")
    about = converted(model, windows)
    with pytest.raises(UserError, match="only megamf's dense baselines"):
        save_checkpoint(model, about, tmp_path / "out", "x")
    dense = make_model("megamf")
    about = converted(dense, windows, router="similarity")
    with pytest.raises(UserError, match="router=similarity"):
        save_checkpoint(dense, about, tmp_path / "out", "x")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    with pytest.raises(UserError, match="exists already"):
        save_hf(model, about, tmp_path / "taken")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["taken"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"architectures": ["Elsewhere"]}')
    for path, message in (
        (tmp_path / "none", "no model at"),
        (tmp_path / "other", "'Elsewhere'; expected a model class"),
    ):
        with pytest.raises(UserError, match=message):
            open_model(path)


def test_nothing_half_written(make_model, windows, tmp_path, monkeypatch):
    model = make_model("llama")
    about = converted(model, windows)
    monkeypatch.setattr("megamf.compress.moefication.save._describe", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_hf(model, about, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []

"""`attention.backend` by name: what it means on each device, and what is said where it cannot be."""

from types import SimpleNamespace

import pytest
import torch

from megamf.config import ConfigError, ModelConfig, validate
from megamf.errors import UserError
from megamf.model import ModuleFormer
from megamf.model.backends import Backends
from megamf.model.dispatch import LocalDispatcher
from megamf.ops import backend
from megamf.ops import stickbreaking as public
from megamf.ops.stickbreaking import stickbreaking_attention, stickbreaking_decode

MODEL = ModelConfig(
    vocab_size=40, n_layer=1, n_embd=16, att_hidden=16, ffd_hidden=16, n_att_experts=2, n_mlp_experts=2, k_att=1,
    k_mlp=1, gating_size=8,
)  # fmt: skip


def on_a_gpu(C=1024, dtype=torch.bfloat16):
    return SimpleNamespace(device=torch.device("cuda"), shape=(2, 2, 8, C), dtype=dtype)


@pytest.mark.parametrize("name", ["auto", "csrc", "triton", "naive"])
def test_the_names_of_the_configuration(name):
    assert validate({"attention": {"backend": name}}).attention.backend == name


def test_another_name_is_refused_with_the_choice():
    with pytest.raises(ConfigError, match=r"attention.backend.*'auto', 'csrc', 'triton' or 'naive'.*flash"):
        validate({"attention": {"backend": "flash"}})


@pytest.mark.parametrize("C", [64, 1024])
def test_csrc_on_a_gpu_is_the_cuda_extension(monkeypatch, C):
    monkeypatch.setattr(backend, "has_cuda", lambda: True)
    assert public._choose("attention", "csrc", on_a_gpu(C)) == "cuda"
    with pytest.raises(ValueError, match=r"backend cuda got torch\.float64"):
        public._choose("attention", "csrc", on_a_gpu(C, torch.float64))


def test_csrc_on_a_gpu_without_the_extension_says_how_to_build_it(monkeypatch):
    monkeypatch.setattr(backend, "has_cuda", lambda: False)
    message = r"attention: backend 'csrc' needs the compiled CUDA kernels.*MEGAMF_CUDA=1 pip install"
    with pytest.raises(UserError, match=message):
        public._choose("attention", "csrc", on_a_gpu())


def test_csrc_on_a_cpu_is_the_cpu_extension():
    q = torch.randn(1, 1, 3, 4)
    assert public._choose("attention", "csrc", q) == "csrc"
    torch.testing.assert_close(
        stickbreaking_attention(q, q, q, backend="csrc"), stickbreaking_attention(q, q, q, backend="naive")
    )


def test_triton_on_a_cpu_is_refused():
    pytest.importorskip("triton")
    q, message = torch.zeros(1, 1, 2, 4), "backend 'triton' runs on cuda, the tensors are on cpu"
    with pytest.raises(UserError, match=message):
        stickbreaking_attention(q, q, q, backend="triton")
    with pytest.raises(UserError, match=message):
        stickbreaking_decode(q[:, :, 0], q, q, backend="triton")
    model = ModuleFormer(MODEL, dispatcher=LocalDispatcher(), backends=Backends(attention="triton"))
    with pytest.raises(UserError, match=message):
        model(torch.zeros(1, 3, dtype=torch.int64))


def test_triton_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"attention\.backend=triton needs the package triton"):
        Backends(attention="triton")
    with pytest.raises(UserError, match="backend 'triton' needs the package triton"):
        public._choose("attention", "triton", on_a_gpu(64))

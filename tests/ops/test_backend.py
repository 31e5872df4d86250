"""Which implementation is chosen, and what is said when it cannot be."""

import logging
import subprocess
import sys

import pytest
import torch

from megamf.errors import UserError
from megamf.ops import backend

CPU = torch.device("cpu")
IMPLEMENTATIONS = {"csrc": frozenset({"cpu"}), "naive": frozenset[str]()}


def choose(name: str, device: torch.device = CPU) -> str:
    return backend.choose("op", name, device, IMPLEMENTATIONS, "csrc")


def test_the_extension_is_built() -> None:
    assert backend.has_extension(), backend.EXTENSION_ERROR


def test_automatic_choice_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    backend._logged.clear()
    with caplog.at_level(logging.INFO, logger="megamf.ops.backend"):
        assert choose("auto") == choose("auto") == "csrc"
        assert choose("naive") == "naive"
    assert [r.getMessage() for r in caplog.records] == ["op on cpu: backend csrc"]


def test_unknown_backend() -> None:
    with pytest.raises(UserError, match=r"op: backend 'triton' does not exist; expected auto, csrc, naive"):
        choose("triton")


@pytest.mark.parametrize("name", ["auto", "csrc"])
def test_wrong_device(name: str) -> None:
    with pytest.raises(UserError, match="runs on cpu, the tensors are on cuda"):
        choose(name, torch.device("cuda"))


def test_csrc_means_the_kernels_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "has_cuda", lambda: True)
    both = IMPLEMENTATIONS | {"cuda": frozenset({"cuda"})}
    assert backend.choose("op", "csrc", torch.device("cuda"), both, "cuda") == "cuda"
    assert backend.choose("op", "csrc", CPU, both, "csrc") == "csrc"


@pytest.mark.parametrize("name", ["auto", "csrc"])
def test_missing_extension_is_an_error_that_says_how_to_build(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "EXTENSION_ERROR", "No module named 'megamf._C'")
    monkeypatch.delenv("MEGAMF_ALLOW_NAIVE", raising=False)
    with pytest.raises(
        UserError, match=r"No module named 'megamf._C'; build it with `pip install --no-build-isolation"
    ):
        choose(name)


def test_naive_only_when_allowed_and_logged(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(backend, "EXTENSION_ERROR", "gone")
    monkeypatch.setenv("MEGAMF_ALLOW_NAIVE", "1")
    backend._logged.clear()
    with caplog.at_level(logging.INFO, logger="megamf.ops.backend"):
        assert choose("auto") == "naive"
    assert "backend naive" in caplog.text
    with pytest.raises(UserError, match="gone"):
        choose("csrc")


def test_the_package_imports_and_runs_without_the_extension() -> None:
    code = """
import sys
sys.modules["megamf._C"] = None  # importing it raises ImportError
import torch
from megamf.ops.grouped_linear import grouped_linear
from megamf.ops.permutation import sort_by_expert
from megamf.ops.stickbreaking import stickbreaking_attention
q = torch.zeros(1, 1, 2, 4)
try:
    stickbreaking_attention(q, q, q)
except ValueError as error:
    assert "pip install" in str(error)
else:
    raise SystemExit("no error")
import os
os.environ["MEGAMF_ALLOW_NAIVE"] = "1"
assert stickbreaking_attention(q, q, q).shape == q.shape
assert sort_by_expert(torch.tensor([[1], [0]]), 2).order_R.tolist() == [1, 0]
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)

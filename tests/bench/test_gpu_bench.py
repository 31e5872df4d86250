"""The functions of the GPU suite on small CPU tensors: every figure comes out; the suite itself asks for a device."""

import math
from importlib.util import find_spec

import pytest
import torch

from megamf.bench import gpu
from megamf.bench.device import device_seconds
from megamf.cli import run
from megamf.config import ModelConfig
from megamf.errors import UserError
from megamf.tools.bench import main

PLACE = gpu.Place(device="cpu", dtype=torch.float32, repeats=1)
MODEL = ModelConfig(
    vocab_size=40, n_layer=3, n_embd=16, att_hidden=16, ffd_hidden=16, n_att_experts=2, n_mlp_experts=4, k_att=1,
    k_mlp=2, gating_size=8,
)  # fmt: skip


def tick() -> None:
    pass


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_without_a_device_the_suite_says_so(capsys):
    with pytest.raises(UserError, match="needs a CUDA device"):
        gpu.run(lambda what: tick)
    with pytest.raises(SystemExit) as ended:
        raise SystemExit(run(lambda argv=None: main(["--suite", "gpu"])))
    assert ended.value.code == 2
    assert "needs a CUDA device" in capsys.readouterr().err


def test_every_figure_with_its_limit():
    figures = [
        *gpu.attention(PLACE, 1, 2, 32, 16, tick),
        *gpu.short_sticks(PLACE, 1, 1, 64, 16, 4, tick),
        *gpu.large_heads(PLACE, 1, 2, 16, 32, tick),
        *gpu.permutation(PLACE, 16, 8, 4, 2, tick),
        *gpu.expert_layer(PLACE, MODEL, 2, 8, tick, names=("auto", "torch")),
        *gpu.step_figures(PLACE, MODEL, 2, 16, tick),
    ]
    unmeasured = {figure.name: figure.meaning for figure in figures if figure.value is None}
    if find_spec("sonicmoe") is None:
        assert unmeasured.keys() == {"expert_layer_sonicmoe_ms"}
        assert "sonicmoe, which is missing" in unmeasured["expert_layer_sonicmoe_ms"]
    assert all(math.isfinite(figure.value) and figure.value > 0 for figure in figures if figure.value is not None)
    limits = {figure.name: figure.at_least for figure in figures if figure.kept is not None}
    assert limits == {
        "stickbreaking_vs_flash_c16": 0.6,
        "short_sticks_vs_flash_c16": 1.5,
        "stickbreaking_vs_gemm_c32": 0.6,
        "permute_vs_copy": 0.8,
        "unpermute_vs_copy": 0.8,
        "experts_vs_dense": 0.7,
        "experts_vs_grouped_gemm": 1.0,
        "train_mfu": 0.35,
    }
    assert len({figure.name for figure in figures}) == len(figures)


def test_as_many_layers_as_fit():
    one, two = (gpu.count_parameters(MODEL.model_copy(update={"n_layer": n})).total for n in (1, 2))
    assert gpu.shrink(MODEL, 1e12).n_layer == 3
    assert gpu.shrink(MODEL, two * gpu.BYTES_PER_PARAMETER).n_layer == 2
    with pytest.raises(UserError, match="GiB"):
        gpu.shrink(MODEL, (one - 1) * gpu.BYTES_PER_PARAMETER)


def test_the_clock_of_a_cpu_is_the_wall():
    assert device_seconds("cpu")(lambda: None) >= 0

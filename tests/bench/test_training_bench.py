"""The timed training step trains, in float32 and on float32 master weights."""

import pytest
import torch

from megamf.bench.training import every_key, training_step
from megamf.config import ModelConfig
from megamf.ops.stickbreaking import DEFAULT_STOP

MODEL = ModelConfig(
    vocab_size=40, n_layer=1, n_embd=16, att_hidden=16, ffd_hidden=16, n_att_experts=2, n_mlp_experts=2, k_att=1,
    k_mlp=1, gating_size=8,
)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_training_step_updates_every_parameter(dtype):
    torch.manual_seed(0)
    step = training_step(MODEL, 2, 32, dtype=dtype, recompute=True)
    cells = dict(zip(step.__code__.co_freevars, (cell.cell_contents for cell in step.__closure__), strict=True))
    parameters, masters = cells["parameters"], cells["masters"]
    before = [master.detach().clone() for master in masters]
    step()
    assert all(not torch.equal(old, new) for old, new in zip(before, masters, strict=True))
    assert all(torch.equal(p, m.to(dtype)) and p.dtype == dtype for p, m in zip(parameters, masters, strict=True))
    assert all(p.grad is None for p in parameters)


def test_no_key_is_passed_over_where_figures_have_limits():
    usual = dict(DEFAULT_STOP)
    with every_key():
        assert set(DEFAULT_STOP.values()) == {0.0}
    assert usual == DEFAULT_STOP

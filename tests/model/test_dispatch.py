"""The one-process dispatcher against indexing by hand."""

import torch

from megamf.model.dispatch import LocalDispatcher

EXPERT_NK = torch.tensor([[2, 0], [1, 2], [2, 1], [0, 2]])


def test_rows_arrive_grouped_by_expert():
    plan = LocalDispatcher().plan(EXPERT_NK, 4)
    assert plan.count_L.tolist() == [2, 2, 4, 0]
    x_ND = torch.arange(4.0)[:, None].expand(4, 3)
    assert LocalDispatcher().dispatch(x_ND, plan)[:, 0].tolist() == [0, 3, 1, 2, 0, 1, 2, 3]
    x_NKD = torch.arange(8.0).view(4, 2, 1)
    assert LocalDispatcher().dispatch(x_NKD, plan)[:, 0].tolist() == [1, 6, 2, 5, 0, 3, 4, 7]


def test_combine_undoes_dispatch():
    dispatcher = LocalDispatcher()
    plan = dispatcher.plan(EXPERT_NK, 4)
    generator = torch.Generator().manual_seed(0)
    x_NKD = torch.randn(4, 2, 3, dtype=torch.float64, generator=generator)
    gate_NK = torch.rand(4, 2, dtype=torch.float64, generator=generator)
    rows = dispatcher.dispatch(x_NKD, plan)
    assert torch.equal(dispatcher.combine(rows, plan, None), x_NKD)
    expected = (x_NKD * gate_NK[..., None]).sum(1)
    assert torch.allclose(dispatcher.combine(rows, plan, gate_NK), expected, rtol=1e-14)


def test_no_tokens():
    dispatcher = LocalDispatcher()
    plan = dispatcher.plan(EXPERT_NK[:0], 4)
    assert plan.count_L.tolist() == [0] * 4
    rows = dispatcher.dispatch(torch.zeros(0, 3), plan)
    assert dispatcher.combine(rows, plan, torch.zeros(0, 2)).shape == (0, 3)

import math

import pytest
import torch

from megamf.callbacks.module_load import load_summary, module_load
from megamf.model.losses import Packed


def packed(counts: list[list[float]], sizes: list[int]) -> Packed:
    count = torch.tensor(counts)
    zeros = torch.zeros(len(counts))
    return Packed(torch.zeros_like(count), count, zeros, zeros, torch.tensor(8.0), torch.tensor(sizes))


def test_load_of_uneven_and_even_routers():
    even, uneven = [2.0, 2.0, 0.0, 0.0], [6.0, 2.0, 0.0, 0.0]
    attention, mlp = module_load(packed([even, uneven], [2, 4]))
    assert (attention["layer"], attention["kind"]) == (0, "attention")
    assert attention["entropy"] == pytest.approx(1.0)
    assert attention["max_over_mean"] == pytest.approx(1.0)
    assert attention["dead_fraction"] == 0.0
    assert attention["load"] == [0.5, 0.5]
    assert mlp["kind"] == "mlp"
    assert mlp["entropy"] == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(4))
    assert mlp["max_over_mean"] == pytest.approx(3.0)
    assert mlp["dead_fraction"] == 0.5


def test_summary_takes_the_worst_peak_and_the_mean_of_the_rest():
    records = module_load(packed([[1.0, 1.0], [1.0, 1.0], [2.0, 0.0], [1.0, 3.0]], [2, 2, 2, 2]))
    summary = load_summary(records)
    assert [record["layer"] for record in records] == [0, 0, 1, 1]
    assert summary["attention_max_over_mean"] == 2.0
    assert summary["attention_dead_fraction"] == 0.25
    assert summary["attention_entropy"] == pytest.approx(0.5)


def test_no_tokens_is_no_division_by_zero():
    [record] = module_load(packed([[0.0, 0.0]], [2]))
    assert record["dead_fraction"] == 1.0 and record["entropy"] == 0.0

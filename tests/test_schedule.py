import math
from itertools import pairwise

import pytest

from megamf.config.run import Optim
from megamf.schedule import learning_rate


def rates(num_steps: int = 100, **settings) -> list[float]:
    optim = Optim(lr=1.0, min_lr=0.1, warmup_steps=10, **settings)
    return [learning_rate(optim, step, num_steps) for step in range(num_steps)]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
def test_warm_up_is_linear_and_reaches_lr(schedule):
    settings = {"decay_steps": 20} if schedule == "wsd" else {}
    assert rates(schedule=schedule, **settings)[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_last_update_runs_at_min_lr_and_never_rises_after_warm_up(schedule):
    found = rates(schedule=schedule, **({"decay_steps": 20} if schedule == "wsd" else {}))
    assert found[-1] == pytest.approx(0.1)
    assert all(later <= earlier for earlier, later in pairwise(found[9:]))


def test_constant_stays():
    assert rates(schedule="constant")[10:] == [1.0] * 90


def test_wsd_is_stable_until_the_decay():
    found = rates(schedule="wsd", decay_steps=20)
    assert found[10:80] == [1.0] * 70
    assert found[84] == pytest.approx(0.1 + 0.9 * (1 - math.sqrt(5 / 20)))


def test_cosine_and_linear_are_half_way_down_in_the_middle():
    assert rates(schedule="cosine")[54] == pytest.approx(0.55)
    assert rates(schedule="linear")[54] == pytest.approx(0.55)


def test_no_warm_up():
    assert learning_rate(Optim(lr=1.0, min_lr=0.0, warmup_steps=0, schedule="linear"), 0, 4) == pytest.approx(0.75)

"""The verdict on an update: by hand-counted medians, and the same after a checkpoint."""

import json
import math

import numpy as np
import pytest

from megamf.config import ConfigError, load_config
from megamf.config.run import Guards
from megamf.guards import UpdateGuard, robust_zscore


def test_the_score_is_the_textbooks():
    rng = np.random.default_rng(0)
    window = rng.normal(3.0, 0.2, 101).tolist()
    deviation = np.median(np.abs(np.array(window) - np.median(window)))
    for value in (2.0, 3.0, 5.0):
        assert robust_zscore(value, window) == pytest.approx((value - np.median(window)) / (1.4826 * deviation))
    assert robust_zscore(3.6, window) == pytest.approx(3.0, abs=0.6)


def test_losses_that_do_not_differ_make_no_spike_of_noise():
    assert robust_zscore(2.0001, [2.0] * 9) == pytest.approx(0.05)


def test_outliers_in_the_window_do_not_hide_a_spike():
    window = [2.0, 2.1, 1.9, 2.0, 2.1, 1.9, 2.0, 50.0]
    assert robust_zscore(6.0, window) > 20


@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nothing_that_is_not_finite_passes(position, value):
    figures = [2.0, 0.1, 1.0]
    figures[position] = value
    guard = UpdateGuard(Guards())
    assert guard.judge(2.0, 0.1, 1.0) is None
    assert guard.judge(*figures).startswith("not finite")
    assert list(guard.losses) == [2.0]


def test_spikes_are_seen_once_the_window_is_full_and_do_not_enter_it():
    guard = UpdateGuard(Guards(spike_zscore=6, spike_window=4))
    for loss in (2.0, 9.0, 2.1, 1.9):
        assert guard.judge(loss, 0.0, 1.0) is None
    assert "loss spike: 5.0000" in guard.judge(5.0, 0.0, 1.0)
    assert list(guard.losses) == [2.0, 9.0, 2.1, 1.9]
    assert guard.judge(2.2, 0.0, 1.0) is None and guard.judge(0.1, 0.0, 1.0) is None


def test_by_default_a_large_loss_is_no_reason():
    guard = UpdateGuard(Guards(spike_window=3))
    assert all(guard.judge(loss, 0.0, 1.0) is None for loss in (2.0, 2.0, 2.0, 900.0))


def test_too_many_counts_within_the_window():
    guard = UpdateGuard(Guards(max_skips=1, skip_window=4))
    verdicts = []
    for loss in (math.nan, 1.0, 1.0, 1.0, math.nan, 1.0, math.nan):
        guard.judge(loss, 0.0, 1.0)
        verdicts.append(guard.too_many)
    assert verdicts == [False] * 6 + [True]


def test_the_state_goes_through_a_checkpoint():
    guard = UpdateGuard(Guards(spike_zscore=6, spike_window=3, max_skips=2, skip_window=5))
    for loss in (2.0, math.nan, 2.1, 1.9, 2.0):
        guard.judge(loss, 0.0, 1.0)
    guard.rollbacks = 1
    again = UpdateGuard(guard.settings)
    again.restore(json.loads(json.dumps(guard.state())))
    assert (again.losses, again.skips, again.rollbacks) == (guard.losses, guard.skips, 1)
    again.restore({})
    assert not again.losses and not again.skips and again.rollbacks == 0


def test_a_rollback_remembers_how_often():
    guard = UpdateGuard(Guards())
    state = guard.state()
    guard.judge(math.nan, 0.0, 0.0)
    guard.rolled_back(state)
    assert guard.rollbacks == 1 and not guard.skips


def test_limits_that_are_never_met_are_refused():
    with pytest.raises(ConfigError, match=r"max_skips=8 is never exceeded within guards\.skip_window=8"):
        load_config(overrides=["guards.skip_window=8"])

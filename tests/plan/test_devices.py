"""The measured matrix-product rate."""

import torch

from megamf.plan import devices, measure_peak, peak_flops


def test_the_rate_is_that_of_the_fastest_product(monkeypatch):
    # The clock is read for the deadline, then for every round: the check, the start, the end.
    readings = iter([0.0, 0.0, 1.0, 1.5, 1.5, 2.0, 2.25, 2.25, 3.0, 4.0, 10.0])
    monkeypatch.setattr(devices.time, "perf_counter", lambda: next(readings))
    assert measure_peak(torch.float32, size=8, seconds=5.0) == 2 * 8**3 / 0.25


def test_a_cpu_is_measured():
    assert peak_flops(torch.device("cpu"), torch.float32) > 1e8


def test_a_machine_that_was_held_up_is_measured_once(monkeypatch):
    readings = iter([0.0, 9.0, 9.0, 9.5, 9.5])
    monkeypatch.setattr(devices.time, "perf_counter", lambda: next(readings))
    assert measure_peak(torch.float32, size=8, seconds=5.0) == 2 * 8**3 / 0.5

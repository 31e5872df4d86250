"""Memory, FLOPs, traffic and time by formula, before anything runs."""

from megamf.plan.devices import DEVICES, measure_peak, peak_flops
from megamf.plan.flops import ParameterCounts, count_parameters, mfu, train_flops_per_token

__all__ = [
    "DEVICES",
    "ParameterCounts",
    "count_parameters",
    "measure_peak",
    "mfu",
    "peak_flops",
    "train_flops_per_token",
]

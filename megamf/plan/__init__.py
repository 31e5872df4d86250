"""Memory, FLOPs and layouts by formula, before anything runs."""

from megamf.plan.devices import DEVICES, measure_peak, peak_flops
from megamf.plan.flops import ParameterCounts, count_parameters, mfu, train_flops_per_token
from megamf.plan.layout import Layout, layouts, recommend
from megamf.plan.memory import RankMemory, rank_memory

__all__ = [
    "DEVICES",
    "Layout",
    "ParameterCounts",
    "RankMemory",
    "count_parameters",
    "layouts",
    "measure_peak",
    "mfu",
    "peak_flops",
    "rank_memory",
    "recommend",
    "train_flops_per_token",
]

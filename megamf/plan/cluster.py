"""A cluster as the plan sees it: devices, links, storage, and every number that is assumed rather than known.

Rates are bytes a second and one direction of one rank, unless a name says otherwise.
"""

import math
from dataclasses import dataclass, fields, replace
from typing import Any

from megamf.errors import UserError
from megamf.plan.devices import DEVICES, GB, GIB


@dataclass(frozen=True)
class Cluster:
    """Everything about the machines and every assumption; `assumptions` lists them with their options.

    Where an entry of the table `DEVICES` says nothing (all of `cpu`), the figure must be given.
    """

    gpu: str
    nodes: int
    gpus_per_node: int
    memory: int
    peak_flops: float
    memory_bandwidth: float
    intra_node: float
    inter_node: float
    host_link: float
    latency: float = 20e-6
    storage: float = 10 * GB
    efficiency: float = 0.45
    memory_efficiency: float = 0.7
    network_efficiency: float = 0.75
    overlap: float = 0.5
    imbalance: float = 1.25
    fill: float = 0.9

    @classmethod
    def of(cls, gpu: str, nodes: int, gpus_per_node: int, **given: float | None) -> "Cluster":
        """The table's entry for `gpu` with the figures in `given` (None: not given) instead of its own.

        Raises UserError for a device that is not in the table, a figure out of range, or one that is missing.
        """
        if gpu not in DEVICES:
            raise UserError(f"gpu {gpu!r} is not one of {', '.join(DEVICES)}")
        entry = DEVICES[gpu]
        values = {
            "memory": entry.memory,
            "peak_flops": entry.peak_bf16,
            "memory_bandwidth": entry.memory_bandwidth,
            "intra_node": entry.intra_node,
            "inter_node": entry.inter_node,
            "host_link": entry.host_link,
        }
        if entry.latency:
            values["latency"] = entry.latency
        values |= {name: value for name, value in given.items() if value is not None}
        for name, value in values.items():
            if not value:
                raise UserError(f"--gpu {gpu} needs {OPTIONS[name][0]}: {OPTIONS[name][2]}")
        cluster = cls(gpu, nodes, gpus_per_node, **values)
        cluster._check()
        return cluster

    @property
    def num_ranks(self) -> int:
        """One process a device."""
        return self.nodes * self.gpus_per_node

    @property
    def usable_memory(self) -> int:
        """Bytes of a device that a plan may fill."""
        return int(self.fill * self.memory)

    def assumptions(self) -> list[tuple[str, float, str, str]]:
        """(option, value in the option's unit, unit, what it is) of every figure."""
        return [
            (option, getattr(self, name) / unit_bytes, unit, meaning)
            for name, (option, (unit, unit_bytes), meaning) in OPTIONS.items()
        ]

    def with_(self, **changes: Any) -> "Cluster":
        """A copy with some figures changed."""
        return replace(self, **changes)

    def _check(self) -> None:
        for name in ("nodes", "gpus_per_node"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: at least 1")
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in SHARES and not SHARES[field.name] <= value <= 1:
                raise UserError(f"{OPTIONS[field.name][0]} {value}: from {SHARES[field.name]} to 1")
            if field.name in OPTIONS and value < 0:
                raise UserError(f"{OPTIONS[field.name][0]} {value}: not negative")
        if self.imbalance < 1:
            raise UserError(f"--imbalance {self.imbalance}: at least 1, the even share")


# Smallest value of the figures that are shares of something.
SHARES = {"efficiency": 1e-6, "memory_efficiency": 1e-6, "network_efficiency": 1e-6, "overlap": 0.0, "fill": 1e-6}
# Figure -> option of `megamf plan`, (unit of the option, that unit in the figure's own), meaning.
OPTIONS: dict[str, tuple[str, tuple[str, float], str]] = {
    "memory": ("--memory-gib", ("GiB", GIB), "memory of one device"),
    "peak_flops": ("--peak-tflops", ("TFLOP/s", 1e12), "peak of one device's matrix products in the run's precision"),
    "memory_bandwidth": ("--memory-gbs", ("GB/s", GB), "bandwidth of one device's memory"),
    "intra_node": ("--intra-node-gbs", ("GB/s", GB), "link of one device to the others of its node, one direction"),
    "inter_node": ("--inter-node-gbs", ("GB/s", GB), "one device's share of its node's network, one direction"),
    "host_link": ("--host-gbs", ("GB/s", GB), "link of one device to its host's memory (offload)"),
    "latency": ("--latency-us", ("us", 1e-6), "of one hop of a collective; a collective of n ranks makes log2(n) hops"),
    "storage": ("--storage-gbs", ("GB/s", GB), "of all nodes together, writing a checkpoint"),
    "efficiency": ("--efficiency", ("", 1), "share of the peak that matrix products reach"),
    "memory_efficiency": ("--memory-efficiency", ("", 1), "share of the memory bandwidth that other operations reach"),
    "network_efficiency": ("--network-efficiency", ("", 1), "share of the links' rates that collectives reach"),
    "overlap": ("--overlap", ("", 1), "share of the computing time that hides ZeRO's traffic where overlap_comm is on"),
    "imbalance": ("--imbalance", ("", 1), "routed rows of the busiest expert-parallel rank over the even share"),
    "fill": (
        "--fill",
        ("", 1),
        "share of a device's memory to plan with; the rest is for fragmentation, workspaces",
    ),
}


@dataclass(frozen=True)
class Group:
    """`size` ranks, `stride` apart in the order of ranks; nodes hold consecutive ranks."""

    size: int
    stride: int = 1

    def per_node(self, cluster: Cluster) -> int:
        """How many of its members share a node."""
        return max(1, min(self.size, cluster.gpus_per_node // self.stride))

    def crosses(self, cluster: Cluster) -> bool:
        """Whether it reaches over nodes."""
        return self.per_node(cluster) < self.size


def ring_rate(group: Group, cluster: Cluster) -> float:
    """Bytes a second that a rank sends in an all-gather, reduce-scatter or all-reduce.

    Over nodes the rings of a node's members use all of their network links, each of them in every ring.
    """
    rate = cluster.intra_node if group.per_node(cluster) > 1 or not group.crosses(cluster) else math.inf
    if group.crosses(cluster):
        rate = min(rate, cluster.inter_node * group.per_node(cluster))
    return rate * cluster.network_efficiency


def hops(group: Group) -> int:
    """Rounds of latency of one collective."""
    return math.ceil(math.log2(group.size)) if group.size > 1 else 0


def all_to_all_seconds(sent: float, group: Group, cluster: Cluster) -> float:
    """Time to send `sent` bytes in equal parts to the other ranks; the links inside and between nodes work at once."""
    others = group.size - 1
    if not others:
        return 0.0
    inside = group.per_node(cluster) - 1
    slowest = max(sent * inside / others / cluster.intra_node, sent * (others - inside) / others / cluster.inter_node)
    return slowest / cluster.network_efficiency

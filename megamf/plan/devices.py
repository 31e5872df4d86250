"""What a device can do: vendor peaks for accelerators, a measured matrix-product rate for everything else."""

import time
from dataclasses import dataclass

import torch

GIB = 2**30
GB = 10**9


@dataclass(frozen=True)
class Device:
    """What the vendor's data sheet says; 0 where nothing can be said without measuring.

    Dense (not structured-sparse) bf16 peak in FLOP/s, memory in bytes; bytes a second of the memory, and one direction
    of the links of one device: to the others of its node, its share of the node's network (one 200 or 400 Gbit/s
    adapter a device, the usual build), to its host. Seconds of latency of one hop of a collective (0: the default).
    """

    peak_bf16: float
    memory: int
    memory_bandwidth: float
    intra_node: float
    inter_node: float
    host_link: float
    latency: float = 0.0


DEVICES = {
    "a100-40g": Device(312e12, 40 * GIB, 1555 * GB, 300 * GB, 25 * GB, 32 * GB),
    "a100-80g": Device(312e12, 80 * GIB, 2039 * GB, 300 * GB, 25 * GB, 32 * GB),
    "h100": Device(989.4e12, 80 * GIB, 3350 * GB, 450 * GB, 50 * GB, 64 * GB),
    "h200": Device(989.4e12, 141 * GB, 4800 * GB, 450 * GB, 50 * GB, 64 * GB),
    "b200": Device(2250e12, 180 * GB, 8000 * GB, 900 * GB, 50 * GB, 64 * GB),
    # A process on a CPU talks to others, on its node or not, through gloo's sockets; its memory is its host's.
    "cpu": Device(0.0, 0, 10 * GB, 0.4 * GB, 0.4 * GB, 10 * GB, 1e-3),
}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of one device: the table's value for a known accelerator in bf16, else measured now (0.3 s)."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device).lower()
        for key, entry in DEVICES.items():
            if key != "cpu" and key.split("-")[0] in name and "pcie" not in name:
                return entry.peak_bf16
    return measure_peak(dtype, device)


def measure_peak(
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    *,
    size: int = 1024,
    seconds: float = 0.3,
) -> float:
    """The best rate, in FLOP/s, of square matrix products of `size` with the threads now set, over `seconds`.

    The best of many, because whatever else runs on the machine can only slow a product down.
    """
    place = torch.device(device)
    a_NN = torch.randn(size, size, dtype=dtype, device=place)
    b_NN = torch.randn(size, size, dtype=dtype, device=place)
    out_NN = torch.empty_like(a_NN)
    torch.mm(a_NN, b_NN, out=out_NN)
    best, end = float("inf"), time.perf_counter() + seconds
    # At least once, also on a machine that was held up until the end.
    while time.perf_counter() < end or best == float("inf"):
        _wait(place)
        start = time.perf_counter()
        torch.mm(a_NN, b_NN, out=out_NN)
        _wait(place)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

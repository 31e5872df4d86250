"""What a device can do: vendor peaks for accelerators, a measured matrix-product rate for everything else."""

import time
from dataclasses import dataclass

import torch

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """Dense (not structured-sparse) bf16 peak in FLOP/s and memory in bytes, from the vendor's data sheet."""

    peak_bf16: float
    memory: int


DEVICES = {
    "a100-40g": Device(312e12, 40 * GIB),
    "a100-80g": Device(312e12, 80 * GIB),
    "h100": Device(989.4e12, 80 * GIB),
    "h200": Device(989.4e12, 141 * 10**9),
    "b200": Device(2250e12, 180 * 10**9),
}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of one device: the table's value for a known accelerator in bf16, else measured now (0.3 s)."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device).lower()
        for key, entry in DEVICES.items():
            if key.split("-")[0] in name and "pcie" not in name:
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

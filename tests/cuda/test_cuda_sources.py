"""The CUDA sources compile for every GPU they are meant for, within their registers; so does the binding to torch."""

import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths

SOURCES = Path(__file__).parents[2] / "csrc" / "cuda"
ARCHITECTURES = (80, 90)
# Registers a thread, and bytes of spilled registers, of any kernel of the file.
LIMITS = {"scan": (80, 0), "decode": (128, 64), "sort": (40, 0), "permute": (72, 16)}


def compile_kernels(nvcc: str, name: str, architecture: int, out: Path) -> str:
    target = f"arch=compute_{architecture},code=sm_{architecture}"
    flags = ["-std=c++17", "-O3", "-Werror", "all-warnings", "-Xptxas", "-v", "-gencode", target]
    source, result = SOURCES / f"{name}.cu", out / f"{name}_{architecture}.o"
    command = [nvcc, "-c", *flags, str(source), "-o", str(result)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.slow
def test_nvcc_compiles_without_spilling(nvcc: str, tmp_path: Path) -> None:
    jobs = [(name, architecture) for name in LIMITS for architecture in ARCHITECTURES]
    with ThreadPoolExecutor(2) as pool:
        reports = pool.map(lambda job: compile_kernels(nvcc, *job, tmp_path), jobs)
        for (name, architecture), report in zip(jobs, reports, strict=True):
            registers = [int(n) for n in re.findall(r"Used (\d+) registers", report)]
            spills = [int(n) for n in re.findall(r"(\d+) bytes spill stores", report)]
            assert registers and len(registers) == len(spills)
            most, most_spilled = LIMITS[name]
            assert max(registers) <= most and max(spills) <= most_spilled, (name, architecture, registers, spills)


@pytest.mark.parametrize("standard", ["c++17", "c++20"])
def test_binding_compiles_against_torch(nvcc: str, standard: str, tmp_path: Path) -> None:
    """Also where torch has no CUDA: the stable ABI needs nothing but headers."""
    flags = [f"-std={standard}", "-Xcompiler", "-Wall,-Werror,-fPIC", *(f"-I{folder}" for folder in include_paths())]
    command = [nvcc, "-c", *flags, str(SOURCES / "binding.cpp")]  # for C++, nvcc calls the host compiler
    done = subprocess.run([*command, "-o", str(tmp_path / "binding.o")], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_every_operation_of_the_binding_has_a_schema() -> None:
    names = re.findall(r'm\.impl\("(\w+)"', (SOURCES / "binding.cpp").read_text(encoding="utf-8"))
    assert len(names) == 9 and all(hasattr(torch.ops.megamf, name) for name in names)

"""The CUDA sources compile for every GPU they are meant for, within their registers; so does the binding to torch."""

import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths

from megamf.bench import compile

SOURCES = Path(__file__).parents[2] / "csrc" / "cuda"


@pytest.mark.slow
def test_nvcc_compiles_without_spilling(nvcc: str) -> None:
    files = sorted(SOURCES.glob("*.cu"))
    assert {file.stem for file in files} == compile.CUDA_LIMITS.keys()
    jobs = [(file, architecture) for file in files for architecture in (80, 90)]
    with ThreadPoolExecutor(2) as pool:
        rows = list(pool.map(lambda job: compile.compile_source(nvcc, *job), jobs))
    assert not [row for row in rows if row.problem]
    assert all(row.registers and row.seconds for row in rows)


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

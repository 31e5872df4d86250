"""How Triton kernels are tested without a GPU: compiled for a target, and run by the interpreter in another process."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest


class Compiled(NamedTuple):
    """registers a thread, bytes of spill stores a thread, bytes of shared memory, and the PTX text."""

    registers: int
    spills: int
    shared: int
    ptx: str


@pytest.fixture
def compile_for(tmp_path):
    """compile_for(kernel, types, constants, capability, num_warps=, num_stages=) -> Compiled; needs no GPU.

    types: argument name -> "*bf16", "i32" ...; pointers are taken to be aligned to 16 bytes, as torch allocates them.
    """

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    def run(kernel, types, constants, capability, **options):
        arguments = kernel.arg_names
        signature = {name: types.get(name, "constexpr") for name in arguments}
        aligned = {
            (i,): [["tt.divisibility", 16]] for i, name in enumerate(arguments) if types.get(name, "").startswith("*")
        }
        source = ASTSource(kernel, signature, {(arguments.index(k),): v for k, v in constants.items()}, aligned)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        (tmp_path / "kernel.ptx").write_text(compiled.asm["ptx"])
        architecture = {90: "sm_90a"}.get(capability, f"sm_{capability}")
        ptxas = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
        report = subprocess.run(
            [ptxas, "-v", f"--gpu-name={architecture}", tmp_path / "kernel.ptx", "-o", os.devnull],
            capture_output=True, text=True, check=True, timeout=120,
        ).stderr  # fmt: skip
        registers = int(re.search(r"Used (\d+) registers", report)[1])
        spills = int(re.search(r"(\d+) bytes spill stores", report)[1])
        return Compiled(registers, spills, compiled.metadata.shared, compiled.asm["ptx"])

    return run


@pytest.fixture
def run_interpreted():
    """Runs the tests of worker files (no `test_` in their names: collected only here) under Triton's interpreter."""

    def run(*names, seconds=400):
        environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        files = [Path(__file__).parent / name for name in names]
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files]
        found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds)
        assert found.returncode == 0, found.stdout[-4000:] + found.stderr[-2000:]

    return run

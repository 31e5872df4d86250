"""The `compile` suite: what the compilers make of every GPU kernel, for GPUs that are not there.

Every Triton kernel is compiled for sm_80 and sm_90 for the shapes that the presets use (`megamf.kernels.cases`), every
CUDA source by nvcc where there is one. One row each: registers and spilled bytes a thread, shared memory a block,
tensor-core instructions, the seconds that compiling took, and what misses the limits of its case.
"""

import re
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from megamf.bench.suite import Figure, Result, machine
from megamf.errors import UserError
from megamf.kernels.ptxas import usage
from megamf.ops.backend import package_problem

CUDA_SOURCES = Path(__file__).parents[2] / "csrc" / "cuda"
# Most registers a thread, and most bytes of spilled registers, of any kernel of the source.
CUDA_LIMITS = {"scan": (80, 0), "decode": (128, 64), "sort": (40, 0), "permute": (72, 16)}


@dataclass(frozen=True)
class Row:
    """One compiled kernel (of a CUDA source: its worst one). problem: what misses a limit, or why it is missing."""

    kernel: str
    shape: str
    architecture: str
    registers: int | None = None
    spills: int | None = None
    shared: int | None = None
    instructions: str = ""
    seconds: float | None = None
    problem: str = ""

    def tree(self) -> dict[str, Any]:
        """Plain JSON: what is known of the row."""
        known = {name: value for name, value in vars(self).items() if value not in (None, "")}
        return known | ({"seconds": round(self.seconds, 2)} if self.seconds is not None else {})


def run(progress: Callable[[str], Callable[[], None]], *, repeats: int = 1) -> Result:
    """Compile everything once (`repeats` has nothing to repeat here). Raises UserError without Triton."""
    del repeats
    if problem := package_problem("triton"):
        raise UserError(f"the suite compile {problem}")
    where = machine() | versions()
    triton_rows = compile_triton(progress("Triton kernels"))
    cuda_rows = compile_cuda(find_nvcc(), progress("CUDA sources"))
    return Result("compile", figures(triton_rows, cuda_rows), where, rows=[r.tree() for r in triton_rows + cuda_rows])


def figures(triton_rows: list[Row], cuda_rows: list[Row]) -> list[Figure]:
    """What the rows amount to."""
    compiled = [row for row in cuda_rows if row.registers is not None]
    rows = triton_rows + compiled
    beyond = [row for row in rows if row.problem]
    spilling = [row for row in triton_rows if row.spills]
    missing = "" if compiled else f"; {cuda_rows[0].problem}"
    return [
        Figure("triton_kernels", len(triton_rows), "Triton kernels compiled, one for each shape and architecture"),
        Figure("cuda_sources", len(compiled), f"CUDA sources compiled, one for each architecture{missing}"),
        Figure("beyond_limits", len(beyond), "kernels that miss a limit of their case", at_most=0),
        Figure("max_registers", max(row.registers or 0 for row in rows), "most registers a thread of any of them"),
        Figure("triton_spilling", len(spilling), "Triton kernels that spill registers at all"),
        Figure("max_triton_spills", max(row.spills or 0 for row in triton_rows), "most bytes a Triton kernel spills"),
        Figure("max_cuda_spills", max((row.spills or 0 for row in compiled), default=0), "most bytes a CUDA one does"),
        Figure("compile_seconds", sum(row.seconds or 0.0 for row in rows), "to compile all of them, one by one"),
    ]


def compile_triton(tick: Callable[[], None]) -> list[Row]:
    """A row for every case of `megamf.kernels.cases`."""
    from megamf.kernels.cases import compile_cases
    from megamf.kernels.launch import compiled

    rows = []
    for case in compile_cases():
        found = compiled(case.launch, case.architecture)
        counts = ", ".join(f"{count} {name}" for name, count in found.instructions.items())
        measured = found.registers, found.spills, found.shared, counts, found.seconds
        rows.append(Row(case.kernel, case.shape, f"sm_{case.architecture}", *measured, case.problem(found)))
        tick()
    return rows


def compile_cuda(nvcc: str | None, tick: Callable[[], None], sources: Path = CUDA_SOURCES) -> list[Row]:
    """A row for every source and architecture; one that says why, where they cannot be compiled."""
    from megamf.kernels.cases import ARCHITECTURES

    files = sorted(sources.glob("*.cu"))
    if nvcc is None or not files:
        why = "nvcc was not found" if nvcc is None else f"there are no sources in {sources} (they are not installed)"
        return [Row("csrc/cuda", "all", "", problem=f"not compiled: {why}")]
    rows = []
    for file in files:
        for architecture in ARCHITECTURES:
            rows.append(compile_source(nvcc, file, architecture))
            tick()
    return rows


def compile_source(nvcc: str, file: Path, architecture: int) -> Row:
    """The worst of the kernels of one source. Raises UserError with nvcc's words where it does not compile."""
    target = f"arch=compute_{architecture},code=sm_{architecture}"
    flags = ["-std=c++17", "-O3", "-Werror", "all-warnings", "-Xptxas", "-v", "-gencode", target]
    begin = time.perf_counter()
    with TemporaryDirectory() as folder:
        command = [nvcc, "-c", *flags, str(file), "-o", str(Path(folder, "kernels.o"))]
        done = subprocess.run(command, capture_output=True, text=True)
    seconds = time.perf_counter() - begin
    if done.returncode:
        raise UserError(f"nvcc does not compile {file} for sm_{architecture}:\n{done.stderr}")
    kernels = usage(done.stderr)
    registers, spills = max(kernel[0] for kernel in kernels), max(kernel[1] for kernel in kernels)
    shared = max(map(int, re.findall(r"(\d+) bytes smem", done.stderr)), default=0)
    most, most_spilled = CUDA_LIMITS[file.stem]
    over = registers > most or spills > most_spilled
    limits = f"{registers} registers and {spills} bytes spilled, the limits are {most} and {most_spilled}"
    name, shape = f"csrc/cuda/{file.name}", f"the worst of {len(kernels)}"
    return Row(name, shape, f"sm_{architecture}", registers, spills, shared, "", seconds, limits if over else "")


def find_nvcc() -> str | None:
    """The CUDA compiler, on PATH or in /usr/local/cuda."""
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def versions() -> dict[str, Any]:
    """Of the compilers."""
    import triton

    nvcc = find_nvcc()
    if nvcc is None:
        return {"triton": triton.__version__, "nvcc": "not found"}
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release ([\d.]+)", text)
    return {"triton": triton.__version__, "nvcc": release[1] if release else text.strip().splitlines()[-1]}

"""Launches as values: run on a GPU, or recorded from tensors without memory and compiled for one that is not there."""

import contextlib
import io
import re
import time
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megamf.kernels.ptxas import usage

POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}
# What shows that a kernel uses the tensor cores (wgmma: Hopper's) and loads ahead of them.
INSTRUCTIONS = {"wgmma": r"wgmma\.mma_async", "mma": r"\bmma\.sync", "cp.async": r"cp\.async\.c[ag]"}


@dataclass(frozen=True)
class Launch:
    """One kernel with all its arguments."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, int] = field(default_factory=dict)

    def run(self) -> None:
        """Launches the kernel, or notes the launch inside `recorded`."""
        if 0 in self.grid:
            return
        launches = _recording.get()
        if launches is None:
            self.kernel[self.grid](**self.arguments, **self.options)
        else:
            launches.append(self)


_recording: ContextVar[list[Launch] | None] = ContextVar("recording", default=None)


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Inside, nothing is launched: the launches are added to the list, also those of tensors of the meta device."""
    launches: list[Launch] = []
    token = _recording.set(launches)
    try:
        yield launches
    finally:
        _recording.reset(token)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, options: dict[str, int], **constants: Any) -> None:
    """Runs a kernel; the first arguments are given by position."""
    Launch(kernel, grid, dict(zip(kernel.arg_names, arguments, strict=False)) | constants, options).run()


@dataclass(frozen=True)
class Compiled:
    """registers and spilled bytes a thread; bytes of shared memory a block; instructions by name; seconds it took."""

    registers: int
    spills: int
    shared: int
    instructions: dict[str, int]
    seconds: float


def compiled(job: Launch, architecture: int) -> Compiled:
    """Compiles what the launch would run on a GPU of this architecture (90: sm_90). Needs no GPU; uses no cache."""
    report = io.StringIO()
    begin = time.perf_counter()
    with triton.knobs.nvidia.scope(), triton.knobs.compilation.scope(), contextlib.redirect_stdout(report):
        triton.knobs.nvidia.dump_ptxas_log = True
        triton.knobs.compilation.always_compile = True
        kernel = triton.compile(source(job), target=GPUTarget("cuda", architecture, 32), options=job.options)
    seconds = time.perf_counter() - begin
    registers, spills = usage(report.getvalue())[0]
    counts = {name: len(re.findall(pattern, kernel.asm["ptx"])) for name, pattern in INSTRUCTIONS.items()}
    counts = {name: count for name, count in counts.items() if count}
    return Compiled(registers, spills, kernel.metadata.shared, counts, seconds)


def source(job: Launch) -> ASTSource:
    """What Triton would compile for the launch: the same types, constants and alignments as on a GPU."""
    signature, constants, aligned = {}, {}, {}
    for i, parameter in enumerate(job.kernel.params):
        name, fixed = parameter.name, parameter.do_not_specialize
        value = job.arguments[name]
        one = isinstance(value, int) and value == 1 and not fixed
        if parameter.is_constexpr or value is None or one:
            signature[name], constants[(i,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name], aligned[(i,)] = POINTERS[value.dtype], [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if value < 2**31 else "i64"
            if value % 16 == 0 and not fixed:
                aligned[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(job.kernel, signature, constants, aligned)

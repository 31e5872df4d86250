"""Every Triton kernel compiles for GPUs that are not here, within the limits of its case."""

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from megamf.kernels.cases import SHARED_LIMIT, Case, compile_cases
from megamf.kernels.launch import Compiled, Launch, compiled, launch, recorded
from megamf.kernels.ptxas import usage


@pytest.mark.parametrize("case", compile_cases(), ids=lambda case: case.name)
def test_compiles_within_its_limits(case):
    assert case.problem(compiled(case.launch, case.architecture)) == ""


def test_the_list_covers_every_kernel_and_architecture():
    compiled_here = {(case.launch.kernel.fn.__name__, case.architecture) for case in compile_cases()}
    names = {
        "attention_forward", "attention_backward_queries", "attention_backward_keys", "decode_split", "decode_combine",
        "_rows_kernel", "_weights_kernel", "_forward_kernel", "_logits_kernel", "_matrix_kernel",
    }  # fmt: skip
    assert compiled_here == {(name, architecture) for name in names for architecture in (80, 90)}
    assert len({case.name for case in compile_cases()}) == len(compile_cases())


def test_what_misses_a_limit_is_said():
    case = Case("a kernel", "a shape", 80, Launch(None, (1,), {}), spill_limit=8, needs=frozenset({"wgmma"}))
    fine = Compiled(registers=9, spills=8, shared=SHARED_LIMIT[80], instructions={"wgmma": 1}, seconds=1.0)
    assert case.problem(fine) == ""
    found = case.problem(Compiled(9, 9, SHARED_LIMIT[80] + 1, {"mma": 2}, 1.0))
    assert "spills 9 bytes, the limit is 8" in found and "shared memory" in found and "has no wgmma" in found
    assert Case("", "", 80, case.launch, 8, frozenset({"mma"})).problem(fine) == ""  # wgmma is one


def test_the_report_of_ptxas_is_read_kernel_by_kernel():
    report = """ptxas info    : Compiling entry function 'a' for 'sm_80'
    8 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 7 registers, 512 bytes smem"""
    assert usage(report) == [(40, 12), (7, 0)]


@triton.jit
def _twice(x_ptr, n, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    tl.store(x_ptr + lane, 2 * tl.load(x_ptr + lane, mask=lane < n), mask=lane < n)


def test_a_launch_is_recorded_instead_of_run():
    x = torch.empty(8, device="meta")
    with recorded() as launches:
        launch(_twice, (1,), x, 8, BLOCK=8, options={"num_warps": 1})
        launch(_twice, (0,), x, 0, BLOCK=8, options={"num_warps": 1})
    assert launches == [Launch(_twice, (1,), {"x_ptr": x, "n": 8, "BLOCK": 8}, {"num_warps": 1})]
    found = compiled(launches[0], 80)
    assert found.registers > 0 and found.spills == 0 and found.instructions == {}

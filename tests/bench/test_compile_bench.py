"""What the suite makes of compiled kernels; the kernels themselves are compiled in tests/kernels and tests/cuda."""

import json
from pathlib import Path

import pytest

from megamf.bench import Result, compile
from megamf.errors import UserError

ROWS = [
    compile.Row("a", "C 64", "sm_80", 200, 0, 1024, "64 mma", 1.5),
    compile.Row("b", "C 64", "sm_90", 255, 36, 2048, "4 wgmma", 2.5, "spills 36 bytes, the limit is 0"),
]
MISSING = compile.Row("csrc/cuda", "all", "", problem="not compiled: nvcc was not found")


def test_figures_sum_up_the_rows():
    figures = {figure.name: figure for figure in compile.figures(ROWS, [MISSING])}
    values = {name: figure.value for name, figure in figures.items()}
    assert values == {
        "triton_kernels": 2, "cuda_sources": 0, "beyond_limits": 1, "max_registers": 255, "triton_spilling": 1,
        "max_triton_spills": 36, "max_cuda_spills": 0, "compile_seconds": 4.0,
    }  # fmt: skip
    assert figures["beyond_limits"].kept is False
    assert "nvcc was not found" in figures["cuda_sources"].meaning
    assert compile.figures(ROWS[:1], [MISSING])[2].kept is True


def test_rows_are_plain_json():
    tree = Result("compile", [], {}, rows=[row.tree() for row in (*ROWS, MISSING)]).tree()
    rows = json.loads(json.dumps(tree))["rows"]
    assert rows[0] == {
        "kernel": "a", "shape": "C 64", "architecture": "sm_80", "registers": 200, "spills": 0, "shared": 1024,
        "instructions": "64 mma", "seconds": 1.5,
    }  # fmt: skip
    assert rows[2] == {"kernel": "csrc/cuda", "shape": "all", "problem": "not compiled: nvcc was not found"}


def test_without_a_compiler_or_sources_a_row_says_so(tmp_path: Path):
    pytest.importorskip("triton")
    assert "nvcc was not found" in compile.compile_cuda(None, lambda: None)[0].problem
    assert str(tmp_path) in compile.compile_cuda("nvcc", lambda: None, tmp_path)[0].problem


def test_a_source_that_does_not_compile_is_an_error(tmp_path: Path):
    nvcc = compile.find_nvcc()
    if nvcc is None:
        pytest.skip("nvcc was not found")
    file = tmp_path / "sort.cu"
    file.write_text("__global__ void broken() { nothing }")
    with pytest.raises(UserError, match=r"nvcc does not compile .*sort.cu for sm_90"):
        compile.compile_source(nvcc, file, 90)
    file.write_text("__global__ void fine(int* x) { *x = 1; }")
    row = compile.compile_source(nvcc, file, 90)
    assert row.registers and row.spills == 0 and row.problem == "" and row.shape == "the worst of 1"


def test_without_triton_the_suite_says_so(monkeypatch):
    monkeypatch.setattr(compile, "package_problem", lambda name: f"needs the package {name}")
    with pytest.raises(UserError, match="the suite compile needs the package triton"):
        compile.run(lambda what: lambda: None)

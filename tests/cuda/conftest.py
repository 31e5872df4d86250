"""Compilers, and the CUDA kernels built for the host (emulator.h), called with CPU tensors."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from megamf.ops.stickbreaking.cuda import Rows, Scan

SOURCES = Path(__file__).parents[2] / "csrc" / "cuda"
KERNELS = ("scan", "decode", "sort", "permute")
TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}

Long, Int, Float, Pointer = ctypes.c_int64, ctypes.c_int32, ctypes.c_float, ctypes.c_void_p


class ScanArguments(ctypes.Structure):
    """MegamfScan of kernels.h."""

    _fields_ = (
        *((name, Pointer) for name in ("logits", "start", "mask")),
        *((name, Long) for name in ("start_stride", "mask_stride", "rows", "rows_a_batch", "heads", "T", "S")),
        *((name, Float) for name in ("scale", "log_stop")),
        *((name, Int) for name in ("causal", "start_is_long", "type", "out_type")),
    )


class DecodeArguments(ctypes.Structure):
    """MegamfDecode of kernels.h."""

    _fields_ = (
        *((name, Pointer) for name in ("q", "k", "v", "start", "mask")),
        *(("q_strides", Long * 2), ("k_strides", Long * 3), ("v_strides", Long * 3)),
        *((name, Long) for name in ("start_stride", "mask_stride", "B", "H", "G", "S", "C", "parts")),
        *((name, Float) for name in ("scale", "log_stop")),
        *((name, Int) for name in ("start_is_long", "type")),
    )


def pointer(x: torch.Tensor | None) -> Pointer:
    return Pointer(None if x is None else x.data_ptr())


def poisoned(*shape: int, dtype: torch.dtype, shift: int = 0) -> torch.Tensor:
    """NaN (or -1), between margins that `untouched` looks at; `shift` elements behind an aligned address."""
    numel, fill = torch.Size(shape).numel(), torch.nan if dtype.is_floating_point else -1
    memory = torch.full((numel + 64,), fill, dtype=dtype)
    return memory[32 + shift : 32 + shift + numel].view(shape)


def untouched(x: torch.Tensor) -> bool:
    base, at = x._base, x.storage_offset()
    margins = torch.cat([base[:at], base[at + x.numel() :]])
    return bool(margins.isnan().all() if x.is_floating_point() else (margins == -1).all())


class Emulated:
    """The functions of kernels.h on CPU tensors."""

    def __init__(self, library: Path) -> None:
        self.path = library
        self.library = ctypes.CDLL(str(library))
        self.library.megamf_decode_parts.restype = self.library.megamf_sort_blocks.restype = Long

    def call(self, name: str, *arguments) -> None:
        assert getattr(self.library, name)(*arguments, Pointer(None)) == 0

    def scan_arguments(self, logits: torch.Tensor, rows: Rows, dtype: torch.dtype) -> ScanArguments:
        start, mask, S = rows.start_BT, rows.key_mask_BS, logits.shape[-1]
        count = logits.numel() // S
        return ScanArguments(
            logits=logits.data_ptr(),
            start=None if start is None else start.data_ptr(),
            mask=None if mask is None else mask.data_ptr(),
            start_stride=0 if start is None else start.stride(0),
            mask_stride=0 if mask is None else mask.stride(0),
            rows=count,
            rows_a_batch=count // rows.batch,
            heads=rows.heads,
            T=rows.queries,
            S=S,
            scale=rows.scale,
            log_stop=rows.log_stop,
            causal=rows.causal,
            start_is_long=start is not None and start.dtype == torch.int64,
            type=TYPES[logits.dtype],
            out_type=TYPES[dtype],
        )

    def forward(self, logits: torch.Tensor, rows: Rows, dtype: torch.dtype, shift: int = 0):
        weights = poisoned(*logits.shape, dtype=dtype, shift=shift)
        rest = poisoned(*logits.shape[:-1], dtype=torch.float32)
        arguments = self.scan_arguments(logits, rows, dtype)
        self.call("megamf_scan_forward", ctypes.byref(arguments), pointer(weights), pointer(rest))
        assert untouched(weights) and untouched(rest)
        return weights, rest

    def backward(self, grad, grad_rest, logits, rows: Rows, dtype: torch.dtype, shift: int = 0):
        weights, out = (poisoned(*logits.shape, dtype=dtype, shift=shift) for _ in range(2))
        arguments = self.scan_arguments(logits, rows, dtype)
        self.call(
            "megamf_scan_backward",
            *(ctypes.byref(arguments), pointer(grad), pointer(grad_rest), pointer(weights), pointer(out)),
        )
        assert untouched(weights) and untouched(out)
        return weights, out

    def backward_in_place(self, grad: torch.Tensor, logits: torch.Tensor, rows: Rows) -> None:
        arguments = self.scan_arguments(logits, rows, logits.dtype)
        data = [pointer(x) for x in (grad, None, logits, grad)]
        self.call("megamf_scan_backward", ctypes.byref(arguments), *data)

    @property
    def scan(self) -> Scan:
        return Scan(self.forward, self.backward)

    def decode(self, q, k, v, start, mask, scale: float, log_stop: float = -120.0, parts: int | None = None):
        (B, H, C), (G, S) = q.shape, k.shape[1:3]
        parts = self.library.megamf_decode_parts(*map(Long, (B, H, G, S, 8))) if parts is None else parts
        arguments = DecodeArguments(
            *(q.data_ptr(), k.data_ptr(), v.data_ptr(), None if start is None else start.data_ptr()),
            *(None if mask is None else mask.data_ptr(), (Long * 2)(*q.stride()[:2])),
            *((Long * 3)(*k.stride()[:3]), (Long * 3)(*v.stride()[:3]), 0 if start is None else start.stride(0)),
            *(0 if mask is None else mask.stride(0), B, H, G, S, C, parts, scale, log_stop),
            *(start is not None and start.dtype == torch.int64, TYPES[q.dtype]),
        )
        o, partial_o, partial_log = (
            poisoned(*shape, dtype=dtype)
            for shape, dtype in (
                ((B, H, C), q.dtype),
                ((B, H, parts, C), torch.float32),
                ((B, H, parts), torch.float32),
            )
        )
        scratch = (pointer(partial_o), pointer(partial_log), pointer(o))
        self.call("megamf_decode", ctypes.byref(arguments), *scratch)
        assert untouched(o) and untouched(partial_o) and untouched(partial_log)
        return o

    def sort(self, expert: torch.Tensor, E: int):
        R = expert.numel()
        blocks = self.library.megamf_sort_blocks(Long(R))
        scratch = poisoned(max(blocks, 1) * E, dtype=torch.int32)
        order, inverse, count = (poisoned(n, dtype=torch.int64) for n in (R, R, E))
        outputs = [pointer(x) for x in (scratch, order, inverse, count)]
        self.call("megamf_sort", pointer(expert), Long(R), Long(E), *outputs)
        assert all(untouched(x) for x in (scratch, order, inverse, count))
        return order, inverse, count

    def permute(self, x: torch.Tensor, inverse: torch.Tensor, K: int):
        out = poisoned(x.shape[0] * K, x.shape[1], dtype=x.dtype)
        sizes = (Long(n) for n in (x.shape[0], K, x.shape[1] * x.element_size()))
        self.call("megamf_permute", pointer(x), pointer(inverse), *sizes, pointer(out))
        assert untouched(out)
        return out

    def unpermute(self, y: torch.Tensor, inverse: torch.Tensor, gate: torch.Tensor | None, K: int):
        out = poisoned(y.shape[0] // K, y.shape[1], dtype=y.dtype)
        sizes = (Long(n) for n in (y.shape[0] // K, K, y.shape[1]))
        types = (Int(TYPES[y.dtype]), Int(0 if gate is None else TYPES[gate.dtype]))
        self.call("megamf_unpermute", pointer(y), pointer(inverse), pointer(gate), *sizes, *types, pointer(out))
        assert untouched(out)
        return out

    def unpermute_backward(self, grad: torch.Tensor, y: torch.Tensor, order: torch.Tensor, gate: torch.Tensor):
        grad_y, grad_gate = poisoned(*y.shape, dtype=y.dtype), poisoned(*gate.shape, dtype=gate.dtype)
        sizes = (Long(n) for n in (y.shape[0], gate.shape[1], y.shape[1]))
        types = (Int(TYPES[y.dtype]), Int(TYPES[gate.dtype]))
        inputs = (pointer(x) for x in (grad, y, order, gate))
        self.call("megamf_unpermute_backward", *inputs, *sizes, *types, pointer(grad_y), pointer(grad_gate))
        assert untouched(grad_y) and untouched(grad_gate)
        return grad_y, grad_gate


@pytest.fixture(scope="session")
def emulated_library(tmp_path_factory) -> Emulated:
    library = tmp_path_factory.mktemp("emulated") / "libkernels.so"
    flags = [
        "-std=c++17",
        "-O1",
        "-Wall",
        "-Werror",
        "-Wno-unknown-pragmas",
        "-fno-strict-aliasing",
        "-shared",
        "-fPIC",
    ]
    folders = [f"-I{Path(__file__).parent}", f"-I{SOURCES}", "-DMEGAMF_EMULATE"]
    sources = [str(SOURCES / f"{name}.cu") for name in KERNELS]
    subprocess.run(["g++", *flags, *folders, "-x", "c++", *sources, "-o", str(library)], check=True, timeout=300)
    return Emulated(library)


@pytest.fixture(params=["0", "1"], ids=["threads up", "threads down"])
def kernels(emulated_library: Emulated, request, monkeypatch: pytest.MonkeyPatch) -> Emulated:
    """The kernels, with the threads of a block taking turns in either order."""
    monkeypatch.setenv("MEGAMF_EMULATE_REVERSE", request.param)
    return emulated_library


@pytest.fixture(scope="session")
def nvcc() -> str:
    found = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if found is None:
        pytest.skip("nvcc was not found: the CUDA sources are not compiled here")
    return found

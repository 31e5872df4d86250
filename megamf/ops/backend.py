"""Which implementation an operation runs on: chosen explicitly, logged once, never replaced silently."""

import importlib
import importlib.util
import logging
import os
from collections.abc import Mapping

import torch

from megamf.errors import UserError

logger = logging.getLogger(__name__)

HOW_TO_BUILD_CUDA = (
    "build them with `MEGAMF_CUDA=1 pip install --no-build-isolation -e .` (needs a CUDA build of torch, and nvcc)"
)
HOW_TO_BUILD = "build it with `pip install --no-build-isolation -e .` (torch must be installed first)"

# Where Triton kernels run: without a GPU only in Triton's interpreter, which is for tests.
TRITON_DEVICES = frozenset({"cuda", "cpu"} if os.environ.get("TRITON_INTERPRET") == "1" else {"cuda"})
# Backends that need a package: the modules that show it is there, and how to get it.
PACKAGES = {
    "triton": (("triton",), "install it with `pip install triton` (CUDA builds of torch bring their own)"),
    "megablocks": (
        ("megablocks", "grouped_gemm"),
        "install both with `pip install --no-deps --no-build-isolation megablocks grouped_gemm` (they compile on a "
        "machine with nvcc and a GPU)",
    ),
}

_logged: set[tuple[str, str, str]] = set()


def _load_extension() -> str | None:
    """Registers `torch.ops.megamf.*` by importing `megamf._C`; returns what went wrong, or None."""
    try:
        importlib.import_module("megamf._C")
    except ImportError as error:
        return str(error)
    return None


EXTENSION_ERROR = _load_extension()


def has_extension() -> bool:
    """Whether the compiled operations of `megamf._C` are registered."""
    return EXTENSION_ERROR is None


def has_cuda() -> bool:
    """Whether `megamf._C` holds the CUDA kernels too."""
    return has_extension() and torch._C._dispatch_has_kernel_for_dispatch_key("megamf::stickbreaking_scan", "CUDA")


def compiled(device: torch.device) -> str:
    """The compiled backend of a device: "cuda" there, else "csrc"."""
    return "cuda" if device.type == "cuda" else "csrc"


def package_problem(backend: str) -> str:
    """Which package of a backend is missing and how to get it; empty when none is. Imports nothing."""
    modules, how = PACKAGES.get(backend, ((), ""))
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    return f"needs the package {missing[0]}, which is missing: {how}" if missing else ""


def choose(
    op: str, backend: str, device: torch.device, implementations: Mapping[str, frozenset[str]], preferred: str
) -> str:
    """Names the implementation of `op` to run on `device`.

    implementations: backend name -> device types it runs on. preferred: what "auto" means on the CPU.
    "auto" never means `naive` unless the environment says MEGAMF_ALLOW_NAIVE=1 and nothing else can run.

    Raises UserError for an unknown backend, one that does not run on the device, or one that is not built.
    """
    if backend == "auto":
        return _automatic(op, device, implementations, preferred)
    asked = backend
    if backend == "csrc" and device.type == "cuda" and "cuda" in implementations:
        # The kernels of csrc/ for this device.
        backend = "cuda"
    if backend not in implementations:
        raise UserError(f"{op}: backend {backend!r} does not exist; expected auto, {', '.join(implementations)}")
    if problem := _problem(backend, device, implementations):
        raise UserError(f"{op}: backend {asked!r} {problem}")
    return backend


def _problem(backend: str, device: torch.device, implementations: Mapping[str, frozenset[str]]) -> str:
    """Why the backend cannot run on the device; empty when it can."""
    if problem := package_problem(backend):
        return problem
    devices = implementations[backend]
    if device.type != "meta" and devices and device.type not in devices:
        return f"runs on {', '.join(sorted(devices))}, the tensors are on {device.type}"
    if backend == "cuda" and not has_cuda():
        what = "megamf._C was built without them" if has_extension() else f"megamf._C is missing: {EXTENSION_ERROR}"
        return f"needs the compiled CUDA kernels, but {what}; {HOW_TO_BUILD_CUDA}"
    if backend == "csrc" and EXTENSION_ERROR is not None:
        return f"needs the compiled extension megamf._C, which is missing: {EXTENSION_ERROR}; {HOW_TO_BUILD}"
    return ""


def _automatic(op: str, device: torch.device, implementations: Mapping[str, frozenset[str]], preferred: str) -> str:
    problem = _problem(preferred, device, implementations)
    if not problem:
        log_once(op, preferred, device)
        return preferred
    if os.environ.get("MEGAMF_ALLOW_NAIVE") == "1":
        log_once(op, "naive", device)
        return "naive"
    raise UserError(
        f"{op}: backend {preferred!r} {problem}. MEGAMF_ALLOW_NAIVE=1 allows the slow plain-torch specification instead"
    )


def log_once(op: str, name: str, device: torch.device) -> None:
    """Logs, the first time only, what `op` runs on. Silent while torch.compile traces (a log call breaks the graph)."""
    if torch.compiler.is_compiling() or (op, name, device.type) in _logged:
        return
    _logged.add((op, name, device.type))
    logger.info("%s on %s: backend %s", op, device.type, name)

"""Builds `megamf`: the Python package, the top-level rooms mapped into it, and the extension `megamf._C`.

The C++ sources of csrc/cpu are always built, for the CPU of this machine; the CUDA sources of csrc/cuda when there are
any, torch has CUDA and nvcc is found. Environment variables:

MEGAMF_CUDA   0: never build the CUDA sources; 1: it is an error if they cannot be built
TORCH_CUDA_ARCH_LIST  the GPUs they are built for (default `8.0;9.0`)
MEGAMF_MARCH  the `-march=` of the C++ sources (default `native`; `x86-64-v3` runs on any CPU with AVX2)
MAX_JOBS      how many compilers run at the same time
"""

import os
from pathlib import Path

from setuptools import Command, Extension, find_packages, setup

# Rooms that stand at the top level of the checkout but are installed inside the package.
MAPPED = {"megamf.kernels": "kernels", "megamf.tools": "tools", "megamf.ds_configs": "ds_configs"}

NO_TORCH = (
    "megamf builds against the installed torch, and torch cannot be imported here ({error}). Install torch >= 2.11 "
    "first, then run `pip install --no-build-isolation .` (without that option pip hides the installed torch)."
)


def packages() -> list[str]:
    """Every package below megamf/, then the mapped rooms."""
    return find_packages(include=["megamf", "megamf.*"]) + list(MAPPED)


def sources(folder: str, *patterns: str) -> list[str]:
    """Paths below csrc/, relative to this file, in a fixed order."""
    root = Path(__file__).parent
    return sorted(str(p.relative_to(root)) for pattern in patterns for p in (root / "csrc" / folder).glob(pattern))


def cuda_sources() -> list[str]:
    """The CUDA sources to build: none when there are none, no toolchain, or MEGAMF_CUDA=0."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    wish = os.environ.get("MEGAMF_CUDA", "")
    if wish not in ("", "0", "1"):
        raise SystemExit(f"MEGAMF_CUDA={wish!r}: expected 0, 1 or nothing")
    nvcc = Path(CUDA_HOME or "", "bin", "nvcc")
    problem = ""
    if torch.version.cuda is None:
        problem = f"the installed torch {torch.__version__} has no CUDA"
    elif CUDA_HOME is None or not nvcc.exists():
        problem = "nvcc was not found (set CUDA_HOME)"
    found = sources("cuda", "*.cu", "*.cpp")
    if wish == "1" and (problem or not found):
        raise SystemExit(f"MEGAMF_CUDA=1, but {problem or 'csrc/cuda holds no sources'}")
    return [] if wish == "0" or problem else found


def extension() -> tuple[list[Extension], dict[str, type[Command]]]:
    """The extension module and the command that builds it."""
    from setuptools.command.build_ext import build_ext

    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension
    except ImportError as error:
        message = NO_TORCH.format(error=error)

        class WithoutTorch(build_ext):
            def run(self) -> None:
                raise SystemExit(message)

        return [Extension("megamf._C", sources("cpu", "*.cpp"))], {"build_ext": WithoutTorch}

    march = os.environ.get("MEGAMF_MARCH", "native")
    cxx = ["-O3", f"-march={march}", "-fopenmp", "-g0", "-fno-math-errno", "-fvisibility=hidden"]
    cxx += ["-Wno-maybe-uninitialized"]  # gcc 12 on its own AVX-512 headers
    cuda = cuda_sources()
    if cuda:
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0")
    make = CUDAExtension if cuda else CppExtension
    module = make(
        "megamf._C",
        sources=["csrc/bindings.cpp", *sources("cpu", "*.cpp"), *cuda],
        depends=[*sources("cpu", "*.h"), *sources("cuda", "*.h")],
        extra_compile_args={"cxx": cxx, "nvcc": ["-O3"]} if cuda else cxx,
        extra_link_args=["-fopenmp"],
    )
    return [module], {"build_ext": BuildExtension}


ext_modules, cmdclass = extension()
setup(
    packages=packages(),
    package_dir={"megamf": "megamf", **MAPPED},
    package_data={"megamf.config": ["presets/*.yaml"], "megamf.ds_configs": ["*.json"]},
    ext_modules=ext_modules,
    cmdclass=cmdclass,
)

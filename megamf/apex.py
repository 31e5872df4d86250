"""NVIDIA apex where it is installed: fused layer norm and Adam. Never required.

The package named `apex` on PyPI is another thing (a toolkit for web applications), so apex is recognised by its modules
and their compiled halves, not by its name.
"""

import importlib
from typing import Any

from megamf.errors import UserError

HOW_TO_GET = (
    "build NVIDIA apex from https://github.com/NVIDIA/apex with its C++ and CUDA extensions (the package named `apex` "
    "on PyPI is another thing: do not install that one)"
)


def fused_layer_norm() -> Any:
    """The class apex.normalization.FusedLayerNorm. Raises UserError when NVIDIA apex is not installed."""
    return _find("norm.backend=apex", "apex.normalization", "FusedLayerNorm", "fused_layer_norm_cuda")


def fused_adam() -> Any:
    """The class apex.optimizers.FusedAdam. Raises UserError when NVIDIA apex is not installed."""
    return _find("optim.implementation=apex", "apex.optimizers", "FusedAdam", "amp_C")


def _find(key: str, module: str, name: str, extension: str) -> Any:
    try:
        found = getattr(importlib.import_module(module), name)
        importlib.import_module(extension)
    # The other package named apex may fail in any way when it is imported.
    except Exception as error:
        raise UserError(
            f"{key} needs NVIDIA apex ({module}.{name} and {extension}), which is missing: {error}; {HOW_TO_GET}"
        ) from None
    return found

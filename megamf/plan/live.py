"""How many bytes of tensors are alive, exactly, operation by operation: for real tensors and for fake ones alike.

Every operation that runs while a `LiveBytes` is entered, backward passes and optimizers included, reports the storages
of its results; a storage counts until it is freed. What an operation allocates and frees inside itself is not seen.
"""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Bytes alive now and at most, of the storages that `watch` was given and of those made since it was entered."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._known: dict[int, tuple[weakref.ref, int]] = {}

    def watch(self, tensors: Iterable[torch.Tensor]) -> int:
        """Count the storages of these tensors, each once; returns how many bytes were new."""
        before = self.now
        for tensor in tensors:
            self._add(tensor)
        return self.now - before

    def reset_peak(self) -> None:
        """The peak from now on."""
        self.peak = self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf)
        return result

    def _add(self, tensor: torch.Tensor) -> None:
        if tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        size = storage.nbytes()
        if key in self._known:
            reference, counted = self._known[key]
        else:
            reference, counted = weakref.ref(storage, lambda _: self._drop(key)), 0
        self._known[key] = (reference, size)
        self.now += size - counted
        self.peak = max(self.peak, self.now)

    def _drop(self, key: int) -> None:
        _, size = self._known.pop(key)
        self.now -= size

"""Keys and values of earlier tokens, for decoding and for segments with history.

Shapes: B batch, S keys, G key/value heads, C head channels.
Where K = V (all released models) one tensor is stored for both.
"""

import torch


class LayerCache:
    """Keys and values of one layer, [B, G, S, C] each; grows by doubling, so that a step costs no copy of the past."""

    def __init__(self) -> None:
        self._buffers: list[torch.Tensor] = []
        self._writable = False
        self.length = 0

    def append(self, k_BGTC: torch.Tensor, v_BGTC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Add T positions and return all keys and values seen so far; the stored past carries no gradient."""
        shared = k_BGTC is v_BGTC
        news = [k_BGTC] if shared else [k_BGTC, v_BGTC]
        if torch.is_grad_enabled():
            # A graph may hold on to what is returned: it is never written into.
            joined = [self._joined(i, new) for i, new in enumerate(news)]
            self._buffers, self._writable = [whole.detach() for whole in joined], False
            self.length = joined[0].shape[2]
            return joined[0], joined[-1]
        self._reserve(news)
        for buffer, new in zip(self._buffers, news):
            buffer[:, :, self.length : self.length + new.shape[2]] = new.detach()
        self.length += k_BGTC.shape[2]
        views = [buffer[:, :, : self.length] for buffer in self._buffers]
        return views[0], views[-1]

    def keep_last(self, length: int) -> None:
        """Forget all but the newest `length` positions."""
        if self.length > length:
            self._buffers = [b[:, :, self.length - length : self.length].clone() for b in self._buffers]
            self.length = length

    def crop(self, length: int) -> None:
        """Forget all but the oldest `length` positions (negative: forget the newest -length)."""
        self.length = max(0, self.length + length) if length < 0 else min(self.length, length)

    def select(self, index: torch.Tensor) -> None:
        """Reorder or repeat the batch: row b becomes what row index[b] was."""
        self._buffers = [buffer.index_select(0, index.to(buffer.device)) for buffer in self._buffers]

    def _joined(self, i: int, new: torch.Tensor) -> torch.Tensor:
        return torch.cat([self._buffers[i][:, :, : self.length], new], dim=2) if self._buffers else new

    def _reserve(self, news: list[torch.Tensor]) -> None:
        needed = self.length + news[0].shape[2]
        if self._writable and self._buffers[0].shape[2] >= needed:
            return
        grown = []
        for i, new in enumerate(news):
            B, G, _, C = new.shape
            buffer = new.new_empty(B, G, max(needed, 2 * self.length), C)
            if self._buffers:
                buffer[:, :, : self.length] = self._buffers[i][:, :, : self.length]
            grown.append(buffer)
        self._buffers, self._writable = grown, True


class Cache:
    """One LayerCache a layer. Pass the same object to every forward call of one sequence."""

    def __init__(self, num_layers: int) -> None:
        self.layers = [LayerCache() for _ in range(num_layers)]

    @property
    def length(self) -> int:
        """Positions held, the same in every layer."""
        return self.layers[0].length

    def keep_last(self, length: int) -> None:
        """Segment history: forget all but the newest `length` positions, in every layer."""
        for layer in self.layers:
            layer.keep_last(length)

    def crop(self, length: int) -> None:
        """Forget all but the oldest `length` positions (negative: forget the newest -length)."""
        for layer in self.layers:
            layer.crop(length)

    def select(self, index_B: torch.Tensor) -> None:
        """Reorder or repeat the batch rows, as beam search does."""
        for layer in self.layers:
            layer.select(index_B)

"""A cache as captured steps see it: buffers at fixed addresses, and a length that only the device knows."""

from __future__ import annotations

import torch

from specextend.kernels.elementwise import KeyValue
from specextend.modeling.cache import KVCache


class StaticCache:
    """The buffers of a `KVCache`, its length on the device."""

    def __init__(self, cache: KVCache):
        self._cache = cache
        self.length = torch.tensor(cache.length, device=cache.buffer.device)
        self.rebind()
        cache.followers.add(self)

    @property
    def is_current(self) -> bool:
        """False once the cache has moved to a larger buffer."""
        return self._cache.buffer.data_ptr() == self.keys.data_ptr()

    @property
    def capacity(self) -> int:
        return self.keys.shape[2]

    def rebind(self) -> None:
        """Point at the cache's buffer as it is now, [L, H_kv, S, D] each."""
        self.keys, self.values = self._cache.buffer[0, :, 0], self._cache.buffer[1, :, 0]

    def release(self) -> None:
        """Let go of the buffer, which is replaced."""
        self.keys = self.values = self.keys.new_empty(0)

    def begin(self) -> None:
        """Go on from what the host's side put there."""
        self.length.fill_(self._cache.length)

    def tell_host(self) -> None:
        """Let the cache know its length; the host waits."""
        self._cache.length = int(self.length)

    def layer(self, index: int) -> KeyValue:
        return KeyValue(self.keys[index], self.values[index], self.length)

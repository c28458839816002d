"""Key/value caches: buffers allocated once, written in place, forgotten with the prompt.

`KVCache` is the static cache of one model. `DraftCache` is what a draft attends to: all of the context, or a working
cache gathered from it ("Cross-model Retrieval").
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from weakref import WeakSet

import torch
from torch import Tensor
from transformers import PretrainedConfig

from specextend.errors import CapacityError
from specextend.modeling.prefixes import Prefixes
from specextend.modeling.rope import Rope

CAPTURED_STEP = 4096  # tokens


def cache_shape(config: PretrainedConfig) -> tuple[int, int, int]:
    """(layers, KV heads, head dim) of a Llama-like model's cache."""
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return config.num_hidden_layers, getattr(config, "num_key_value_heads", None) or heads, head_dim


class KVCache:
    """Static keys and values, [2, L, 1, H_kv, S, D]; `length` counts committed tokens.

    Tokens beyond `length` (a draft tree under verification) are scratch until `commit` keeps some of them.
    """

    def __init__(self, config: PretrainedConfig, dtype: torch.dtype, device: torch.device):
        self._shape = cache_shape(config)
        self._options = {"dtype": dtype, "device": device}
        self._buffer = torch.empty(2, *self._shape[:1], 1, self._shape[1], 0, self._shape[2], **self._options)
        self.length = 0
        self.prefixes = Prefixes()
        self.followers: WeakSet = WeakSet()  # those that point at the buffer; told by `release()` when it moves

    @property
    def capacity(self) -> int:
        return self._buffer.shape[4]

    @property
    def buffer(self) -> Tensor:
        """Keys and values [2, L, 1, H_kv, S, D]; another one after a `reset` that needed more room."""
        return self._buffer

    @property
    def nbytes(self) -> int:
        return self._buffer.nbytes

    def reset(self, capacity: int, keep: int = 0) -> None:
        """Forget all but the first `keep` tokens and make room for `capacity`, in the buffer if it is large enough."""
        self.length = keep
        self.prefixes.forget()
        if capacity <= self.capacity:
            return
        if keep:
            return self.require(max(capacity, self.capacity * 9 // 8))  # not anew for every turn of a conversation
        for follower in self.followers:  # free first: two caches at once may not fit
            follower.release()
        self._buffer = self._empty(0)
        self._buffer = self._empty(capacity)

    def require(self, capacity: int) -> None:
        """Make room for `capacity` tokens and keep what is there."""
        if capacity <= self.capacity:
            return
        larger = self._empty(capacity)
        larger[..., : self.capacity, :] = self._buffer
        for follower in self.followers:
            follower.release()
        self._buffer = larger

    def _empty(self, capacity: int) -> Tensor:
        layers, heads, dim = self._shape
        if self._options["device"].type == "cuda":  # captured graphs point at the buffer: let it move rarely
            capacity = -(-capacity // CAPTURED_STEP) * CAPTURED_STEP
        try:
            # zeros: dense attention reads masked slots too, and a weight of 0 does not undo a NaN
            return torch.zeros(2, layers, 1, heads, capacity, dim, **self._options)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            gigabytes = 2 * layers * heads * capacity * dim * self._options["dtype"].itemsize / 1e9
            raise CapacityError(
                f"a KV cache of {capacity} tokens needs {gigabytes:.1f} GB, which {self._options['device']} cannot "
                "give; use a shorter prompt or fewer new tokens",
                setting="prompt_tokens",
            ) from error

    def write(self, layer: int, key: Tensor, value: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Put `key` and `value` [1, H_kv, T, D] at positions start..start+T-1; views of everything up to there."""
        end = start + key.shape[2]
        assert end <= self.capacity, f"token {end} does not fit a cache of {self.capacity}"
        keys, values = self._buffer[0, layer], self._buffer[1, layer]
        keys[:, :, start:end] = key
        values[:, :, start:end] = value
        return keys[:, :, :end], values[:, :, :end]

    def keys(self, layer: int) -> Tensor:
        """Committed keys of a layer, [1, H_kv, N, D]."""
        return self._buffer[0, layer, :, :, : self.length]

    def commit(self, path: Tensor) -> None:
        """Keep the scratch rows `path` [A] (offsets from `length`, ascending) and drop the rest."""
        if int(path[-1]) >= len(path):  # otherwise the rows 0..A-1 are in place already
            kept = self._buffer[..., self.length + path, :]
            self._buffer[..., self.length : self.length + len(path), :] = kept
        self.length += len(path)

    @contextmanager
    def provisional(self) -> Iterator[None]:
        """What is committed inside is forgotten at the end."""
        length = self.length
        try:
            yield
        finally:
            self.length = length

    def gather(self, positions: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Copies of the keys and values at `positions` [m], each [L, 1, H_kv, m, D]."""
        return self._buffer[0][..., positions, :], self._buffer[1][..., positions, :]

    def fill(self, keys: Tensor, values: Tensor) -> None:
        """Replace all contents by `keys` and `values` [L, 1, H_kv, m, D]."""
        self.length = 0
        self.extend(keys, values)

    def extend(self, keys: Tensor, values: Tensor) -> None:
        """Commit `keys` and `values` [L, 1, H_kv, m, D] behind the contents."""
        start, self.length = self.length, self.length + keys.shape[3]
        assert self.length <= self.capacity, f"{self.length} tokens do not fit a cache of {self.capacity}"
        self._buffer[0][..., start : self.length, :] = keys
        self._buffer[1][..., start : self.length, :] = values


class DraftCache:
    """What a draft attends to, rotated, and, where it is only a part of the context, the whole of it un-rotated.

    The draft model runs without rotation; its keys are rotated here once, when they enter the working cache. So a
    gathered chunk gets its new place 0..m-1 without undoing an old rotation.

    Args:
        working_capacity: tokens the working cache holds; None keeps the full context and no second copy.
    """

    def __init__(self, config: PretrainedConfig, rope: Rope, dtype, device, working_capacity: int | None):
        self.rope = rope
        self.working = KVCache(config, dtype, device)
        self.full = KVCache(config, dtype, device) if working_capacity is not None else None
        self._working_capacity = working_capacity

    @property
    def whole(self) -> KVCache:
        """The cache that holds the whole context."""
        return self.working if self.full is None else self.full

    @property
    def context(self) -> int:
        """Committed tokens of the context, in the working cache or not."""
        return self.whole.length

    def reset(self, capacity: int, tree_slots: int, keep: int = 0) -> None:
        """Start a prompt whose context may grow to `capacity` tokens, of which the first `keep` are there."""
        if self.full is None:
            self.working.reset(capacity + tree_slots, keep)
        else:
            self.full.reset(capacity, keep)
            self.working.reset(self._working_capacity + tree_slots)  # always the same: captured steps point at it

    def require(self, tokens: int, tree_slots: int) -> None:
        """Make room for a context of `tokens` and a tree behind it."""
        if self.full is not None:
            self.full.require(tokens)
        else:
            self.working.require(tokens + tree_slots)

    def append(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Store un-rotated `key` and `value` [1, H_kv, T, D] of the next T tokens of the context.

        Returns:
            The query rotated, and the working cache's keys and values up to the new tokens.
        """
        if self.full is not None:
            self.full.write(layer, key, value, self.full.length)
        query, key = self.rope.rotate_pair(query, key, self.working.length)
        return query, *self.working.write(layer, key, value, self.working.length)

    def append_prompt(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, window: int | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `append`, for a prompt whose working cache is not chosen yet: the new tokens see all before them.

        Args:
            window: keys and values returned begin window - 1 tokens before the block; None returns all.
        """
        start = self.context
        first = max(start - window + 1, 0) if window else 0
        if self.full is None:
            query, keys, values = self.append(layer, query, key, value)
            return query, keys[:, :, first:], values[:, :, first:]
        keys, values = self.full.write(layer, key, value, start)
        keys = self.rope.rotate(keys[:, :, first:], first)
        return self.rope.rotate(query, start), keys, values[:, :, first:]

    def store_prompt(self, layer: int, key: Tensor, value: Tensor) -> None:
        """As `append_prompt`, for a prompt that nothing has to attend to."""
        if self.full is not None:
            self.full.write(layer, key, value, self.full.length)
        else:
            self.working.write(layer, self.rope.rotate(key, self.working.length), value, self.working.length)

    def commit_prompt(self, tokens: int) -> None:
        """Commit `tokens` of the prompt; the working cache waits for its first refresh."""
        self.whole.length += tokens

    def commit(self, tokens: int) -> None:
        """Commit `tokens` put there by `append`."""
        self.working.length += tokens
        if self.full is not None:
            self.full.length += tokens

    @contextmanager
    def provisional(self) -> Iterator[None]:
        """What is committed inside is forgotten at the end."""
        with ExitStack() as stack:
            for cache in (self.working, self.full):
                if cache is not None:
                    stack.enter_context(cache.provisional())
            yield

    def refresh(self, positions: Tensor) -> None:
        """Fill the working cache with the tokens at `positions` [m], ascending, renumbered 0..m-1."""
        assert self.full is not None, "a draft cache that holds the whole context is never refreshed"
        keys, values = self.full.gather(positions)
        self.working.fill(self.rope.rotate(keys, 0), values)

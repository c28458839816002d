"""What a cache holds, and copies of what it held before: keys and values depend on nothing behind them.

So what two prompts have in common at their beginning need be read only once. A copy is put back into the buffer that
the cache has, not swapped for it: captured graphs point there, and copying is far cheaper than capturing them anew.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from specextend.errors import ConfigError


@dataclass(frozen=True)
class PrefixLimits:
    """How much is kept beside what the caches hold anyway; each cache, the target's and the draft's, by itself.

    Args:
        copies: of earlier contents, those used last.
        nbytes: all copies together.
        worth: tokens; what is shorter is read again, which costs less than a copy.
    """

    copies: int = 4
    nbytes: int = 4 << 30
    worth: int = 256

    def __post_init__(self) -> None:
        for name, least in (("copies", 0), ("nbytes", 0), ("worth", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigError(f"{name} is {value!r} in PrefixLimits; give a whole number of at least {least}")


@dataclass
class Contents:
    """What the entries of a cache were computed from.

    Args:
        scope: prompts of other scopes must not find it.
        tokens: [n] on the host.
        entries: those that a prefill of `tokens` would also have made, from the first on.
        lookahead: entry i depends on the tokens 0 .. i + lookahead.
        copy: [2, L, 1, H_kv, entries, D] where they are no longer in the cache.
    """

    scope: str | None
    tokens: Tensor
    entries: int
    lookahead: int = 0
    copy: Tensor | None = None

    def shared(self, tokens: Tensor, scope: str | None) -> int:
        """Entries that are right for a context that begins with `tokens`, too."""
        if scope != self.scope:
            return 0
        count = min(len(tokens), len(self.tokens))
        differ = (tokens[:count] != self.tokens[:count]).nonzero()
        same = int(differ[0]) if len(differ) else count
        return max(0, min(self.entries, same - self.lookahead))

    def is_within(self, other: Contents) -> bool:
        """Whether `other` has all of these entries."""
        return self.entries <= min(self.shared(other.tokens, other.scope), other.entries)


class Buffered(Protocol):
    """What is asked of a cache."""

    @property
    def buffer(self) -> Tensor: ...

    def reset(self, capacity: int, keep: int = 0) -> None: ...


class Prefixes:
    """The ledger of one cache. `forget` voids what it says of the cache now, but no copy."""

    def __init__(self) -> None:
        self._now: Callable[[], Contents] | None = None
        self._copies: list[Contents] = []  # used last comes last

    @property
    def nbytes(self) -> int:
        """Of all copies."""
        return sum(one.copy.nbytes for one in self._copies)

    def hold(self, contents: Callable[[], Contents]) -> None:
        """From now on `contents` says what is in the cache; it is asked when the next prompt comes."""
        self._now = contents

    def forget(self) -> None:
        self._now = None

    def drop_copies(self) -> bool:
        """Free all copies; whether there were any."""
        had, self._copies = bool(self._copies), []
        return had

    def enter(self, cache: Buffered, tokens: Tensor, scope: str | None, limits: PrefixLimits) -> int:
        """Have `cache` begin with as much of `tokens` [n] as was kept; how many entries are right.

        What the prompt is going to write over is copied first, if it is worth that.
        """
        now, self._now = self._now and self._now(), None
        here = now.shared(tokens, scope) if now else 0
        shares = [one.shared(tokens, scope) for one in self._copies]
        found = max(shares, default=0)
        if found - here < limits.worth:
            if now:
                self._save(cache, now, now.entries - here, limits)
            return here
        best = self._copies.pop(shares.index(found))
        if now:
            self._save(cache, now, now.entries, limits)
        if cache.buffer.shape[4] < found:
            cache.reset(found)
        cache.buffer[..., :found, :] = best.copy[..., :found, :]
        if best.entries - found >= limits.worth:
            self._make_room(best.copy.nbytes, limits)
            self._copies.append(best)
        return found

    def leave(self, cache: Buffered, limits: PrefixLimits) -> None:
        """The next prompt writes over everything."""
        now, self._now = self._now and self._now(), None
        if now:
            self._save(cache, now, now.entries, limits)

    def _save(self, cache: Buffered, now: Contents, lost: int, limits: PrefixLimits) -> None:
        """Copy what is in the cache, if so many entries as are `lost` are worth it."""
        size = cache.buffer[..., : now.entries, :].nbytes
        if lost < limits.worth or size > limits.nbytes or not limits.copies:
            return
        if any(now.is_within(one) for one in self._copies):
            return
        self._copies = [one for one in self._copies if not one.is_within(now)]
        self._make_room(size, limits)
        try:
            now.copy = cache.buffer[..., : now.entries, :].clone()
        except RuntimeError:  # out of memory; a CPU has no error of its own for it
            return
        self._copies.append(now)

    def _make_room(self, size: int, limits: PrefixLimits) -> None:
        """Drop the copies used longest ago until one more of `size` bytes is within the limits."""
        while self._copies and (len(self._copies) >= limits.copies or self.nbytes + size > limits.nbytes):
            del self._copies[0]

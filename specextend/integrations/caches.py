"""transformers' caches in and out: keys and values that the user brings are not computed again, and come back longer.

Both sides keep the same numbers, keys rotated, so they are copied. A given cache is trusted, as plain `generate` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from specextend.decoding.output import Output, Round
from specextend.engine import SpecExtend
from specextend.errors import ConfigError
from specextend.integrations.rows import Row

TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-9}  # relative, of a whole cache; else LOOSE
LOOSE = 0.1


class CacheDoor:
    """The cache of one call of `generate`, if there is one that anybody will see.

    Args:
        cache: `past_key_values` as transformers hands it over.
        returned: whether the output object has it.
    """

    def __init__(self, cache: Cache | None, *, returned: bool):
        self.is_given = bool(getattr(cache, "_is_user_defined", False))
        self.cache = cache if self.is_given or returned else None
        self.length = cache.get_seq_length() if self.is_given else 0
        self._rows: list[Tensor] = []  # [2, L, 1, H_kv, n, D] of each row, without its padding

    def fault(self, input_ids: Tensor, config: PreTrainedConfig) -> str | None:
        """Why the given cache cannot be gone on with, None if it can."""
        if not self.is_given:
            return None
        layers = self.cache.layers
        if type(self.cache) is not DynamicCache or any(not isinstance(one, DynamicLayer) for one in layers):
            return f"a {type(self.cache).__name__} as past_key_values: give a DynamicCache, empty or filled"
        if not self.length:
            return None
        batch = layers[0].keys.shape[0]
        if batch != len(input_ids):
            return f"past_key_values of {batch} rows beside input_ids of {len(input_ids)}: give equal numbers"
        if self.length >= input_ids.shape[1]:
            return (
                f"past_key_values of {self.length} tokens with input_ids of {input_ids.shape[1]}: give the whole text, "
                "at least a token more than is cached"
            )
        rope = getattr(config, "rope_parameters", None) or {}
        return "past_key_values with dynamic rope: leave it away" if rope.get("rope_type") == "dynamic" else None

    def known(self, row: Row) -> Tensor | None:
        """Keys and values [2, L, 1, H_kv, n, D] of the row's first tokens, None where there are none."""
        count = self.length - row.padding
        if count <= 0:
            return None
        layers, part = self.cache.layers, slice(row.padding, self.length)
        pairs = [(one.keys[row.index, None, :, part], one.values[row.index, None, :, part]) for one in layers]
        return torch.stack([torch.stack(kind) for kind in zip(*pairs, strict=True)])

    def listen(self, engine: SpecExtend, output: Output, round_: Round | None) -> None:
        """At the end of a row, copy what the target knows of it."""
        if self.cache is not None and output.finished:
            self._rows.append(engine.key_values(output.context))

    def check(self, known: Tensor) -> None:
        """ConfigError where the last row's own keys and values are not those that were given, `known`."""
        own = self._rows[-1][..., : known.shape[-2], :].to(known)
        error = (own - known).float().norm() / known.float().norm()
        if float(error) > TOLERANCE.get(known.dtype, LOOSE):
            raise ConfigError(
                "specextend.custom_generate does not take past_key_values of another text than input_ids begins with, "
                "where an EAGLE head drafts: leave it away"
            )

    def fill(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Append what is new to the cache, zeros where a row has padding; the output object's field."""
        if self.cache is None:
            return {}
        most = max(row.padding + keys.shape[-2] for row, keys in zip(rows, self._rows, strict=True))
        shape = self._rows[0].shape
        whole = self._rows[0].new_zeros(*shape[:2], len(rows), shape[3], most, shape[5])
        for row, keys in zip(rows, self._rows, strict=True):
            whole[:, :, row.index, :, row.padding : row.padding + keys.shape[-2]] = keys[:, :, 0]
        for layer in range(shape[1]):
            self.cache.update(whole[0, layer, :, :, self.length :], whole[1, layer, :, :, self.length :], layer)
        return {"past_key_values": self.cache}

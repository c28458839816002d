"""The target model: prefill, tree verification, commit, and the attention row that retrieval asks for."""

from __future__ import annotations

from contextlib import nullcontext
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specextend.modeling.attention import Attention, attention_row
from specextend.modeling.blocks import OnBlock, blocks
from specextend.modeling.cache import KVCache
from specextend.modeling.features import FeatureTap
from specextend.modeling.rope import DynamicRope
from specextend.trees.tree import DraftTree


class ShortReader(Protocol):
    """Reads a prompt's few new tokens faster than a prefill block does."""

    def reads(self, tokens: int) -> int | None:
        """How many of so few `tokens` it reads at once, None if it does not."""

    def read(self, block: Tensor) -> tuple[Tensor, LastLayer, Tensor]:
        """Logits [1, V] after the prompt's next tokens `block` [T], the last layer, features [T, F] for the draft."""


class Target:
    """An unmodified Hugging Face causal LM over our static cache.

    Args:
        cache: of the model's shape; its contents belong to one prompt.
        prefill_attention, tree_attention: how a prefill block and a draft tree attend.
        prefill_block: tokens per prefill block; None runs the whole prompt at once.
        tap: collects the hidden states a draft reads, if it reads any.
    Attributes:
        short_reader: asked first where the cache holds a prompt's beginning.
    """

    short_reader: ShortReader | None = None

    def __init__(
        self,
        model: PreTrainedModel,
        cache: KVCache,
        prefill_attention: Attention,
        tree_attention: Attention,
        prefill_block: int | None,
        tap: FeatureTap | None = None,
    ):
        self.model = model
        self.cache = cache
        self._prefill_attention = prefill_attention
        self._tree_attention = tree_attention
        self._prefill_block = prefill_block
        self._tap = tap
        self._last_layer: LastLayer | None = None
        self._newest = 0

    @property
    def position(self) -> int:
        """Position of the next token, the root of the next tree."""
        return self.cache.length

    def prefill(self, prompt: Tensor, extra_slots: int, known: int = 0, on_block: OnBlock | None = None) -> Tensor:
        """Read `prompt` [N], whose first `known` tokens the cache holds, allocate `extra_slots` more; logits [1, V].

        Args:
            on_block: see `blocks`.
        """
        self.cache.reset(len(prompt) + extra_slots, known)
        if self._tap:
            self._tap.clear()
        rotary = self.model.get_decoder().rotary_emb
        if isinstance(rotary, DynamicRope):
            rotary.prompt_length = len(prompt)
        at_once = self.short_reader.reads(len(prompt) - known) if known and self.short_reader else None
        read, size = (self._read_short, at_once) if at_once else (self._read, self._prefill_block)
        for block in blocks(known, len(prompt), size, on_block):
            logits = read(prompt[block])
            self.cache.length = block.stop
        self._newest = 0
        return logits

    def _read_short(self, block: Tensor) -> Tensor:
        logits, self._last_layer, features = self.short_reader.read(block)
        if self._tap:
            self._tap.collect([features])
        return logits

    def _read(self, block: Tensor) -> Tensor:
        """Logits [1, V] after the last of the prompt's next tokens `block` [T]."""
        positions = torch.arange(self.cache.length, self.cache.length + len(block), device=block.device)
        return self._run(block, positions, _CachedAttend(self.cache, self._prefill_attention, None, 1))

    def verify(self, tree: DraftTree) -> Tensor:
        """Logits [T, V] after every node of `tree`; the nodes stay scratch until `commit`."""
        attend = _CachedAttend(self.cache, self._tree_attention, tree.ancestors, len(tree))
        return self._run(tree.tokens, self.position + tree.depth, attend)

    def commit(self, path: Tensor) -> None:
        """Keep the nodes `path` [A] of the tree just verified."""
        self.cache.commit(path)
        self._newest = int(path[-1])

    def attention_row(self) -> Tensor:
        """Last-layer attention [N] of the newest committed token over the committed context, head mean, float32."""
        query, lse, scaling = self.last_queries()
        keys = self.cache.keys(self.model.config.num_hidden_layers - 1)[0]
        return attention_row(query[0, :, self._newest], lse[0, :, self._newest], keys, scaling)

    def last_queries(self) -> LastLayer:
        """The last layer of what ran last."""
        return self._last_layer

    def _run(self, tokens: Tensor, positions: Tensor, attend: _CachedAttend) -> Tensor:
        with self._tap or nullcontext():
            logits = self.model(
                input_ids=tokens[None],
                position_ids=positions[None],
                use_cache=False,
                logits_to_keep=attend.keep,
                attend=attend,
            ).logits[0]
        self._last_layer = attend.last_layer
        return logits


class LastLayer(NamedTuple):
    """What a run keeps of its last layer: queries [1, H, T, D], their log-sum-exp [1, H, T], factor on the scores."""

    query: Tensor
    lse: Tensor
    scaling: float

    @classmethod
    def newest(cls, query: Tensor, lse: Tensor, scaling: float, keep: int) -> LastLayer:
        """Of the newest `keep` tokens; the clones let go of a whole prefill block's queries."""
        return cls(query[:, :, -keep:].clone(), lse[:, :, -keep:].clone(), scaling)


class _CachedAttend:
    """Writes a layer's keys and values behind the committed ones and attends to both.

    After the run `last_layer` is what it keeps of the last `keep` tokens.

    Args:
        mask: [T, T] who sees whom among the new tokens; None is causal.
    """

    def __init__(self, cache: KVCache, attention: Attention, mask: Tensor | None, keep: int):
        self.keep = keep
        self._cache, self._attention, self._mask = cache, attention, mask

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        keys, values = self._cache.write(layer, key, value, self._cache.length)
        output, lse = self._attention(query, keys, values, scaling, query.shape[2], self._mask)
        self.last_layer = LastLayer.newest(query, lse, scaling, self.keep)  # overwritten layer by layer
        return output

"""A draft's caches and passes on the device, for captured rounds."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from specextend.config import RetrievalConfig
from specextend.drafting.drafter import TreeDrafter
from specextend.drafting.small_lm import ClassicDrafter
from specextend.kernels import linear
from specextend.kernels.elementwise import KeyValue, rms_norm
from specextend.kernels.tree import TreeBuffers
from specextend.modeling.fused_target import StaticCache
from specextend.modeling.llama_blocks import FusedBlock, Slots, Workspaces, as_norm


class FusedDraft:
    """A draft's caches on the device: appended to, drafted behind, refilled. What runs over them is a subclass's.

    Args:
        drafter: whose prefill fills the caches; its working cache is at least as large as any round needs.
    """

    target_ids: Tensor | None = None  # [V_draft] target id of every draft id, where the vocabularies differ

    def __init__(self, drafter: TreeDrafter, tree: TreeBuffers):
        cache = drafter.cache
        self.working = StaticCache(cache.working)
        self.full = StaticCache(cache.full) if cache.full is not None else None
        self._tree, device = tree, self.working.keys.device
        self._tables = cache.rope.tables(self.working.keys.shape[2])  # a captured graph must not find them too short
        self._rope = cache.rope
        self._newest = Slots.causal(len(tree.emitted), device)

    @property
    def is_current(self) -> bool:
        return self.working.is_current and (self.full is None or self.full.is_current)

    def take_over(self) -> None:
        for cache in self._caches:
            cache.take_over()

    def catch_up(self) -> Tensor:
        """Read the tokens of the last verdict; logits [1, V] after the newest."""
        logits = self._read_newest(self._tree.emitted, self._tree.count)
        for cache in self._caches:
            cache.length += self._tree.count
        return logits

    def expand(self, level: int) -> Tensor:
        """Logits [W, V] after the nodes of `level`, of which the root's children are 0."""
        tree = self._tree
        first = level * tree.width
        slots = Slots(tree.all_ancestor_bits[first : first + tree.width], first + tree.width)
        # the root is committed; where the stop rule has spoken, a level's launches end at once
        where = {"shift": level, "step": 0, "offset": first, "active": tree.state}
        return self._read_level(tree.level_tokens, tree.below, slots, **where)

    def take(self, features: Tensor) -> None:
        """Notice what the target's `features` [T, F] of the tree say about the accepted path; most drafts need none."""

    def refresh(self, row: Tensor | None, config: RetrievalConfig) -> None:
        """Fill the working cache with the first and newest chunks of `config`, and those `row` asks for.

        Args:
            row: [S] attention over the context; None asks for nothing.
        """
        assert self.full is not None, "a draft cache that holds the whole context is never refreshed"
        length, size, capacity = self.full.length, config.chunk_size, self.full.keys.shape[2]
        device, chunks = self.full.keys.device, -(-capacity // config.chunk_size)
        index, newest = torch.arange(chunks, device=device), (length - 1) // size
        asked = torch.full((chunks,), float("-inf"), device=device)
        if row is not None:
            row = nn.functional.pad(row, (0, max(0, chunks * size - len(row))))[: chunks * size]
            row = torch.where(torch.arange(len(row), device=device) < length, row, 0.0)
            counts = (length - index * size).clamp(1, size)
            asked = torch.where(index <= newest, row.view(chunks, size).sum(-1) / counts, asked)
        always = ((index < config.sink) | (index > newest - config.recent)) & (index <= newest)
        asked = torch.where(always, float("inf"), asked)
        kept = asked.topk(min(config.top_k, chunks)).indices.sort().values
        positions = (kept[:, None] * size + torch.arange(size, device=device)).flatten()
        # kept chunks stand in order: those that do not exist come last, and only the newest may be short
        there = (positions < length) & (asked[kept] > float("-inf")).repeat_interleave(size)
        at = positions.clamp(max=capacity - 1)
        self.working.keys[:, :, : len(at)] = self._rope.rotate(self.full.keys.index_select(2, at), 0)
        self.working.values[:, :, : len(at)] = self.full.values.index_select(2, at)
        self.working.length.copy_(there.sum())

    @property
    def _caches(self) -> list[StaticCache]:
        return [self.working] if self.full is None else [self.working, self.full]

    def _full_layer(self, index: int) -> KeyValue | None:
        return None if self.full is None else self.full.layer(index)

    def _read_newest(self, tokens: Tensor, count: Tensor) -> Tensor:
        raise NotImplementedError

    def _read_level(self, tokens: Tensor, below: Tensor, slots: Slots, **where) -> Tensor:
        raise NotImplementedError


class FusedClassicDraft(FusedDraft):
    """A small language model."""

    def __init__(self, drafter: ClassicDrafter, tree: TreeBuffers, workspaces: Workspaces):
        model = drafter.model
        decoder = model.get_decoder()
        super().__init__(drafter, tree)
        self._embedding, self._workspaces = decoder.embed_tokens, workspaces
        self._blocks = [FusedBlock(layer, *self._tables, workspaces) for layer in decoder.layers]
        self._norm, self._readout = as_norm(decoder.norm), model.get_output_embeddings().weight

    def _read_newest(self, tokens, count):
        hidden = self._embedding(tokens)
        for index, block in enumerate(self._blocks):
            hidden = block.run(hidden, self._newest, self.working.layer(index), full=self._full_layer(index))
        return self._logits(hidden.index_select(0, (count - 1).reshape(1)))

    def _read_level(self, tokens, below, slots, **where):
        hidden = self._embedding(tokens)
        for index, block in enumerate(self._blocks):
            hidden = block.run(hidden, slots, self.working.layer(index), **where)
        return self._logits(hidden, where["active"])

    def _logits(self, hidden, active=None):
        final = rms_norm(hidden, self._norm, active)
        return linear.linear(final, self._readout, self._workspaces.linear, active=active)

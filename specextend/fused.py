"""A round of SpecExtend on a GPU, without a look at any value from the host.

The algorithm is that of `generate.speculative`, in a form that CUDA graphs can hold for every length: lengths are
tensors on the device, a tree always has all its levels and slots, and what does not count is masked. The host reads the
accepted tokens once, at the end of a round. What the models compute is `blocks.py`'s; models that do not fit go the way
of `target.py` and `drafter.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from specextend.blocks import FusedBlock, Slots, Workspaces, as_norm
from specextend.cache import KVCache
from specextend.config import RetrievalConfig
from specextend.drafter import ClassicDrafter, TreeDrafter
from specextend.features import FeatureTap
from specextend.kernels import linear, scores
from specextend.kernels.elementwise import KeyValue, rms_norm
from specextend.kernels.tree import TreeBuffers
from specextend.retrieval import Retriever
from specextend.rope import Rope
from specextend.target import Target

Choose = Callable[[Tensor, Tensor], Tensor]  # the target's rule: logits [T, V] and depth [T] to tokens [T]


class StaticCache:
    """The buffers of a `KVCache`, its length on the device."""

    def __init__(self, cache: KVCache):
        self._cache = cache
        self.keys, self.values = cache.buffer[0, :, 0], cache.buffer[1, :, 0]  # [L, H_kv, S, D]
        self.length = torch.tensor(cache.length, device=self.keys.device)
        cache.followers.add(self)

    @property
    def is_current(self) -> bool:
        """False once a longer prompt has made the cache move to a larger buffer."""
        return self._cache.buffer.data_ptr() == self.keys.data_ptr()

    def release(self) -> None:
        """Let go of the buffer, which is about to be replaced."""
        self.keys = self.values = self.keys.new_empty(0)

    def take_over(self) -> None:
        """Go on from what was put there by the host's side."""
        self.length.fill_(self._cache.length)

    def layer(self, index: int) -> KeyValue:
        return KeyValue(self.keys[index], self.values[index], self.length)


class Nodes(Protocol):
    """What is verified: a draft tree (`TreeBuffers`), or a root alone.

    Attributes:
        tokens: [T] int64; depth: [T] int32; words: [T, ceil(T / 32)] int32 ancestor bits; slots: T.
    """

    tokens: Tensor
    depth: Tensor
    words: Tensor
    slots: int


class Root:
    """A lone token, autoregressive decoding's tree."""

    slots = 1

    def __init__(self, device: torch.device):
        self.tokens = torch.zeros(1, dtype=torch.int64, device=device)
        self.depth = torch.zeros(1, dtype=torch.int32, device=device)
        self.words = torch.ones(1, 1, dtype=torch.int32, device=device)


class FusedTarget:
    """Verification of up to `MAX_SLOTS` nodes behind the tokens that `Target` committed.

    Args:
        tap: what the draft reads of the hidden states, if it reads any.
    """

    def __init__(self, target: Target, workspaces: Workspaces, slots: int, tap: FeatureTap | None = None):
        model = target.model
        decoder, weight = model.get_decoder(), model.get_output_embeddings().weight
        self._target, self.cache = target, StaticCache(target.cache)
        self._embedding, self._norm = decoder.embed_tokens, as_norm(decoder.norm)
        tables = Rope(decoder.rotary_emb, model.dtype, model.device).tables(self.cache.keys.shape[2])
        self._blocks = [FusedBlock(layer, *tables, workspaces) for layer in decoder.layers]
        self._readout = weight
        heads, dim = len(decoder.layers[-1].self_attn.q_proj.weight), decoder.layers[-1].self_attn.head_dim
        self.query = torch.zeros(heads // dim, slots, dim, dtype=model.dtype, device=model.device)
        self.lse = torch.zeros(heads // dim, slots, device=model.device)
        self._scaling = decoder.layers[-1].self_attn.scaling
        self._entering = tap and tap.entering
        parts = 0 if tap is None else 1 if tap.entering is None else len(tap.entering)
        self.features = weight.new_zeros(slots, parts * weight.shape[1])

    def take_over(self) -> None:
        """Go on from the prefill: its length, and the newest token's query."""
        query, lse, _ = self._target.last_queries()
        self.query[:, 0], self.lse[:, 0] = query[0, :, -1], lse[0, :, -1]
        self.cache.take_over()

    def verify(self, tree: Nodes) -> Tensor:
        """Logits [T, V] after every node; keeps what the attention row and the draft will ask for."""
        slots = Slots(tree.words, tree.slots)
        hidden = self._embedding(tree.tokens)
        for index, block in enumerate(self._blocks):
            self._keep(hidden, index)
            hidden = block.run(hidden, slots, self.cache.layer(index), depth=tree.depth)
        self._keep(hidden, len(self._blocks))
        self.query[:, : tree.slots] = self._blocks[-1].query
        self.lse[:, : tree.slots] = self._blocks[-1].lse
        final = rms_norm(hidden, self._norm)
        if self._entering is None and self.features.shape[1]:
            self.features[: tree.slots] = final
        return final @ self._readout.T

    def _keep(self, hidden: Tensor, layer: int) -> None:
        """Put what enters `layer` among the features, if the draft reads it."""
        for part, entered in enumerate(self._entering or ()):
            if entered == layer:
                width = hidden.shape[1]
                self.features[: len(hidden), part * width : (part + 1) * width] = hidden

    def attention_row(self, newest: Tensor) -> Tensor:
        """[S] attention of node `newest` [] of the tree just verified over the committed context, 0 beyond."""
        return scores.attention_row(self.query, self.lse, newest, self.cache.keys[-1], self.cache.length, self._scaling)


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
        slots = Slots(tree.all_words[first : first + tree.width], first + tree.width)
        # the root is committed; where the stop rule has spoken, a level's launches end at once
        where = {"shift": level, "step": 0, "offset": first, "alive": tree.state}
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
        return self._logits(hidden, where["alive"])

    def _logits(self, hidden, alive=None):
        final = rms_norm(hidden, self._norm, alive)
        return linear.linear(final, self._readout, self._workspaces.linear, alive=alive)


class FusedRound:
    """Target and draft with the verdict of the last round between them.

    `begin`, then every round `refresh` if it is due, `draft`, `verify`, `accept`, `read`.
    """

    def __init__(self, target: FusedTarget, draft: FusedDraft, tree: TreeBuffers, max_depth: int):
        self.target, self.drafter, self.tree = target, draft, tree
        self._max_depth = max_depth
        self._chosen = torch.zeros(tree.slots, dtype=torch.int64, device=tree.tokens.device)
        self._report = torch.zeros(2 + len(tree.emitted), dtype=torch.int64, device=tree.tokens.device)

    @property
    def is_current(self) -> bool:
        return self.target.cache.is_current and self.drafter.is_current

    def begin(self, first: Tensor) -> None:
        """Go on from a prefill of both models whose token was `first` []."""
        self.target.take_over()
        self.drafter.take_over()
        self.tree.emitted[0] = first
        self.tree.count.fill_(1)
        self.tree.newest.zero_()

    def refresh(self, retriever: Retriever) -> None:
        """Refill the draft's working cache with what the target attends to, or with the window."""
        row = self.target.attention_row(self.tree.newest) if retriever.reads_attention else None
        self.drafter.refresh(row, retriever.config)

    def draft(self) -> None:
        """Grow a tree below the newest token."""
        tree = self.tree
        root = tree.emitted.index_select(0, (tree.count - 1).reshape(1))
        logits = self.drafter.catch_up()
        tree.begin()
        for level in range(self._max_depth):
            if level:
                logits = self.drafter.expand(level - 1)
            tree.add_level(logits, level, self.drafter.target_ids)
        tree.finish(root)

    def verify(self, choose: Choose) -> None:
        """Let the target choose a token after every node."""
        self._chosen.copy_(choose(self.target.verify(self.tree), self.tree.depth))

    def accept(self) -> None:
        """Keep what the target agrees to."""
        tree, cache = self.tree, self.target.cache
        tree.accept(self._chosen, cache.length)
        tree.compact(cache.keys, cache.values)
        self.drafter.take(self.target.features)
        self._report[0] = tree.used.sum() - 1
        self._report[1] = tree.count
        self._report[2:] = tree.emitted

    def read(self) -> tuple[int, list[int]]:
        """Drafted tokens and the round's tokens, the bonus token last; the one time that the host waits."""
        drafted, count, *emitted = self._report.tolist()
        return drafted, emitted[:count]


class FusedDecoder:
    """Autoregressive decoding by the same launches: the baseline that speedups are measured against."""

    def __init__(self, target: FusedTarget):
        self.target, self.root = target, Root(target.cache.length.device)

    @property
    def is_current(self) -> bool:
        return self.target.cache.is_current

    def begin(self, first: Tensor) -> None:
        self.target.take_over()
        self.root.tokens[0] = first

    def step(self, choose: Choose) -> None:
        """One token."""
        self.root.tokens.copy_(choose(self.target.verify(self.root), self.root.depth))
        self.target.cache.length += 1

    def read(self) -> int:
        return int(self.root.tokens)

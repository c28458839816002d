"""Drafts whose steps run on a GPU without host synchronisation, so that they can be captured and replayed.

Each is the counterpart of a drafter, over the caches which that drafter's prefill fills; the definitions are the
drafters' own `propose`, `commit` and `refresh`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specextend.drafting.ngrams import continuation
from specextend.kernels import linear
from specextend.kernels.elementwise import KeyValue, rms_norm
from specextend.kernels.tree import TreeBuffers, TreeNodes
from specextend.modeling.cache import DraftCache, KVCache
from specextend.modeling.fused_target import FusedTarget
from specextend.modeling.llama_blocks import FusedBlock, Slots, Workspaces, as_norm
from specextend.modeling.static_cache import StaticCache

LEVELS_AT_ONCE = 4  # of a tree that the host looks at anyway: a level that is not wanted takes a fifth of one that is
SPAN = 512  # contexts of dense attention, and buffers of token ids, are multiples of it
Step = Callable[[], None]
Run = Callable[[str, Step], None]  # runs, captures or replays a step, which it knows by its name


class CapturedDraft:
    """What `GraphBackend` asks of a draft; this one proposes nothing (autoregressive decoding).

    Attributes:
        nodes: the tree it proposes, and the verdict on it.
        caches: what it attends to.
    """

    caches: Sequence[StaticCache] = ()

    def __init__(self, nodes: TreeNodes):
        self.nodes = nodes

    @classmethod
    def nothing(cls, device: torch.device) -> CapturedDraft:
        """The draft of autoregressive decoding: a root alone."""
        return cls(TreeNodes.chain(0, device))

    @property
    def state(self) -> list[Tensor]:
        """What a round changes besides keys and values that nobody attends to yet."""
        return [self.nodes.report, self.nodes.newest, *(cache.length for cache in self.caches)]

    @property
    def is_current(self) -> bool:
        return all(cache.is_current for cache in self.caches)

    def rebind(self) -> None:
        """Point at the caches' buffers as they are now; what was captured before is void."""
        for cache in self.caches:
            cache.rebind()

    def require(self, tokens: int) -> None:
        """Make room for a context of `tokens` in what is not a cache of the drafter's."""

    def limit_span(self, tokens: int) -> bool:
        """Let dense attention go over a context of `tokens` and no further; whether that changes the steps."""
        return False

    def begin(self, first: Tensor) -> None:
        """Go on from the drafter's prefill; `first` [] is the newest token."""
        for cache in self.caches:
            cache.begin()
        self.nodes.begin(first)

    def draft(self, run: Run, *, every_level: bool = False) -> None:
        """Propose; `every_level` leaves out nothing that another round may need."""

    def context(self) -> tuple[Tensor, int]:
        """Tokens [] that a refresh chooses from, and how many they may be."""
        raise AssertionError("this draft has no cache to refresh")

    def refresh(self, positions: Tensor, exist: Tensor) -> None:
        """Attend to the tokens at `positions` [m], as far as they `exist` [m]: those that do not come last."""
        raise AssertionError("this draft has no cache to refresh")

    def follow(self, target: FusedTarget) -> None:
        """Take notice of what `target` accepted, which it has compacted; most find all they need in `nodes`."""


class LookupDraft(CapturedDraft):
    """Proposes what followed the newest tokens where they last stood in the context.

    Args:
        depth: draft tokens at most.
        read: gives the context [N] after the drafter's prefill, the newest token included.
    """

    def __init__(self, depth: int, read: Callable[[], Tensor], device: torch.device):
        super().__init__(TreeNodes.chain(depth, device))
        self._depth, self._read = depth, read
        self._ids = self._bound = torch.zeros(0, dtype=torch.int64, device=device)
        self._length = torch.zeros((), dtype=torch.int64, device=device)

    @property
    def state(self) -> list[Tensor]:
        return [*super().state, self._length]

    @property
    def is_current(self) -> bool:
        return self._bound is self._ids

    def rebind(self) -> None:
        self._bound = self._ids

    def require(self, tokens: int) -> None:
        needed = tokens + 2 * len(self.nodes.emitted)
        if needed > len(self._ids):
            larger = self._ids.new_zeros(-(-needed // SPAN) * SPAN)
            larger[: len(self._ids)] = self._ids
            self._ids = larger

    def begin(self, first: Tensor) -> None:
        super().begin(first)
        known = self._read()[:-1]
        self._ids[: len(known)] = known
        self._length.fill_(len(known))

    def draft(self, run: Run, *, every_level: bool = False) -> None:
        run("draft", self._propose)

    def _propose(self) -> None:
        nodes = self.nodes
        newest = self._length + torch.arange(len(nodes.emitted), device=self._length.device)
        self._ids.index_copy_(0, newest, nodes.emitted)  # what is beyond `count` is written over next time
        self._length += nodes.count
        tokens, exist = continuation(self._ids, self._length, self._depth)
        nodes.tokens.copy_(torch.cat((nodes.root, tokens)))
        nodes.used[1:] = exist


class SelfDraft(CapturedDraft):
    """The target over chosen entries of its own cache, greedy, token by token (`SelfDrafter`).

    Args:
        full: the target's whole cache; sparse: what is chosen of it.
    """

    def __init__(self, model: PreTrainedModel, full: KVCache, sparse: KVCache, workspaces: Workspaces, depth: int):
        device = sparse.buffer.device
        super().__init__(TreeNodes.chain(depth, device))
        self._root = TreeNodes.chain(0, device)
        self._sparse = FusedTarget(model, sparse, workspaces, 1, positions=full)
        self._full = StaticCache(full)
        self._left_out = torch.zeros(1, dtype=torch.int32, device=device)
        self.caches = (self._sparse.cache, self._full)
        self._depth = depth

    @property
    def state(self) -> list[Tensor]:
        return [*super().state, self._left_out]

    def rebind(self) -> None:
        self._sparse.rebind()
        self._full.rebind()

    def draft(self, run: Run, *, every_level: bool = False) -> None:
        run("draft", self._propose)

    def _propose(self) -> None:
        nodes, length = self.nodes, self._sparse.cache.length
        nodes.tokens[:1] = nodes.root
        for index in range(self._depth):
            self._root.tokens[:1] = nodes.tokens[index : index + 1]
            logits = self._sparse.verify(self._root, depth=self._left_out)
            nodes.tokens[index + 1 : index + 2] = logits.argmax(-1)
            length += 1
        length -= self._depth

    def context(self) -> tuple[Tensor, int]:
        return self._full.length, self._full.capacity

    def refresh(self, positions: Tensor, exist: Tensor) -> None:
        at, cache = positions.clamp(max=self._full.capacity - 1), self._sparse.cache
        cache.keys[:, :, : len(at)] = self._full.keys.index_select(2, at)
        cache.values[:, :, : len(at)] = self._full.values.index_select(2, at)
        cache.length.copy_(exist.sum())
        self._left_out.copy_((self._full.length - cache.length).reshape(1))

    def follow(self, target: FusedTarget) -> None:
        """The entries that the target computed replace the drafts' own."""
        nodes, cache = self.nodes, self._sparse.cache
        steps = torch.arange(len(nodes.emitted), device=cache.length.device)
        here, there = cache.length + steps, nodes.start + steps
        cache.keys.index_copy_(2, here, self._full.keys.index_select(2, there))
        cache.values.index_copy_(2, here, self._full.values.index_select(2, there))
        cache.length += nodes.count
        self._full.length += nodes.count


class TreeDraft(CapturedDraft):
    """A model that grows trees over caches of its own; what runs over them is a subclass's.

    Args:
        cache: filled by the drafter's prefill; its working cache is at least as large as any round needs.
        depth: levels of a tree at most.
        dense: attends by dense attention. Its levels are then steps of their own, and the host asks after each
            whether the tree still grows, since dense attention cannot be ended from the device.
        scratch: slots behind the context that a tree needs.
    """

    target_ids: Tensor | None = None  # [V_draft] target id of every draft id, where the vocabularies differ

    def __init__(self, cache: DraftCache, tree: TreeBuffers, depth: int, *, dense: bool, scratch: int):
        super().__init__(tree)
        self._tree, self._depth, self._dense, self._scratch = tree, depth, dense, scratch
        self.working = StaticCache(cache.working)
        self.full = StaticCache(cache.full) if cache.full is not None else None
        self.caches = [self.working] if self.full is None else [self.working, self.full]
        self._rope = cache.rope
        self._newest = Slots.causal(len(tree.emitted), self.working.length.device)
        self._blocks: list[FusedBlock] = []
        self._span = self.working.capacity

    def limit_span(self, tokens: int) -> bool:
        before, self._span = self._span, self.working.capacity
        if self.full is None:
            self._span = min(self._span, span_for(tokens + self._scratch))
        return self._dense and self._span != before

    def rebind(self) -> None:
        super().rebind()
        cos, sin = self._rope.tables(self.working.capacity)  # a captured graph must not find them too short
        for block in self._blocks:
            block.cos, block.sin = cos, sin

    def draft(self, run: Run, *, every_level: bool = False) -> None:
        tree = self._tree
        if self._dense:
            for level in range(self._depth):
                run(f"draft level {level}", partial(self._add_level, level))
                if not every_level and not tree.grows():
                    break
            run("draft tree", self._finish)
            if tree.is_read and not every_level:
                tree.look()
            return
        for first in self._first_levels:
            self._run_from(first, run)
            if tree.is_read and not every_level and not tree.look():
                break

    def draft_unseen(self, run: Run, levels: int) -> None:
        """As `draft`, of about so many levels; the host sees the tree later, and nothing waits for it."""
        assert not self._dense, "dense attention asks the host after every level"
        for first in self._first_levels:
            if first < levels:
                self._run_from(first, run)
        self._tree.show()

    @property
    def _first_levels(self) -> range:
        """Of the steps that a tree is drafted in."""
        return range(0, self._depth, LEVELS_AT_ONCE if self._tree.is_read else self._depth)

    def _run_from(self, first: int, run: Run) -> None:
        last = min(first + self._first_levels.step, self._depth)
        run(f"draft from {first}" if first else "draft", partial(self._grow, first, last))

    def context(self) -> tuple[Tensor, int]:
        assert self.full is not None, "a draft cache that holds the whole context is never refreshed"
        return self.full.length, self.full.capacity

    def refresh(self, positions: Tensor, exist: Tensor) -> None:
        at = positions.clamp(max=self.full.capacity - 1)
        self.working.keys[:, :, : len(at)] = self._rope.rotate(self.full.keys.index_select(2, at), 0)
        self.working.values[:, :, : len(at)] = self.full.values.index_select(2, at)
        self.working.length.copy_(exist.sum())

    def absorb(self) -> None:
        """Read all that was emitted but the newest token, without proposing anything."""
        tree = self._tree
        tree.count -= 1
        self._read_newest(tree.emitted, tree.count, mask=self._mask(self._newest))
        for cache in self.caches:
            cache.length += tree.count
        tree.emitted[:1] = tree.emitted.index_select(0, tree.count.reshape(1))
        tree.count.fill_(1)

    def follow_alone(self, target: FusedTarget) -> None:
        """Take notice of the one token that `target` chose after a root alone."""

    def _grow(self, first: int, last: int) -> None:
        for level in range(first, last):
            self._add_level(level)
        self._finish()

    def _add_level(self, level: int) -> None:
        tree = self._tree
        if level:
            logits = self._expand(level - 1)
        else:
            logits = self._catch_up()
            tree.sprout()
        tree.add_level(logits, level, self.target_ids)

    def _finish(self) -> None:
        # the tokens caught up with stay the verdict's until the next one
        self._tree.finish(self._tree.root)

    def _catch_up(self) -> Tensor:
        """Read the tokens of the last verdict; logits [1, V] after the newest."""
        logits = self._read_newest(self._tree.emitted, self._tree.count, mask=self._mask(self._newest))
        for cache in self.caches:
            cache.length += self._tree.count
        return logits

    def _expand(self, level: int) -> Tensor:
        """Logits [W, V] after the nodes of `level`, of which the root's children are 0."""
        tree = self._tree
        first = level * tree.width
        slots = Slots(tree.all_ancestor_bits[first : first + tree.width], first + tree.width)
        # the root is committed; where the stop rule has spoken, a level's launches end at once
        where = {"shift": level, "step": 0, "offset": first, "active": tree.state, "mask": self._mask(slots)}
        return self._read_level(tree.level_tokens, tree.below, slots, **where)

    def _mask(self, slots: Slots) -> Tensor | None:
        return slots.mask(self.working.length, self._span) if self._dense else None

    def _full_layer(self, index: int) -> KeyValue | None:
        return None if self.full is None else self.full.layer(index)

    def _read_newest(self, tokens: Tensor, count: Tensor, *, mask: Tensor | None) -> Tensor:
        raise NotImplementedError

    def _read_level(self, tokens: Tensor, below: Tensor, slots: Slots, **where) -> Tensor:
        raise NotImplementedError


class SmallLMDraft(TreeDraft):
    """A small language model."""

    def __init__(
        self, model: PreTrainedModel, embed: Callable[[Tensor], Tensor], cache: DraftCache, tree: TreeBuffers,
        workspaces: Workspaces, depth: int,
        *, dense: bool, scratch: int,
    ):  # fmt: skip
        super().__init__(cache, tree, depth, dense=dense, scratch=scratch)
        decoder, tables = model.get_decoder(), self._rope.tables(self.working.capacity)
        self._embedding, self._workspaces = embed, workspaces
        self._blocks = [FusedBlock(layer, *tables, workspaces) for layer in decoder.layers]
        self._norm, self._readout = as_norm(decoder.norm), model.get_output_embeddings().weight

    def _read_newest(self, tokens, count, *, mask):
        hidden = self._embedding(tokens)
        for index, block in enumerate(self._blocks):
            hidden = block.run(hidden, self._newest, self.working.layer(index), full=self._full_layer(index), mask=mask)
        return self._logits(hidden.index_select(0, (count - 1).reshape(1)))

    def _read_level(self, tokens, below, slots, **where):
        hidden = self._embedding(tokens)
        for index, block in enumerate(self._blocks):
            hidden = block.run(hidden, slots, self.working.layer(index), **where)
        return self._logits(hidden, where["active"])

    def _logits(self, hidden, active=None):
        final = rms_norm(hidden, self._norm, active)
        return linear.linear(final, self._readout, self._workspaces.linear, active=active)


def span_for(tokens: int) -> int:
    """Keys that dense attention goes over for a context of `tokens`: a captured step serves all that share a span."""
    return -(-tokens // SPAN) * SPAN

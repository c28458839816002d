"""Draft models behind one set of verbs, and what those with a cache of their own share."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from specextend.config import SpecExtendConfig, prefill_block
from specextend.drafting.expansion import Level, grow
from specextend.modeling.attention import Attend, attention, band_attention, has_flash_kernel
from specextend.modeling.blocks import OnBlock
from specextend.modeling.cache import DraftCache, KVCache
from specextend.modeling.features import FeatureTap
from specextend.modeling.rope import Rope
from specextend.trees.acceptance import Accepted
from specextend.trees.growth import Growth
from specextend.trees.tree import DraftTree

if TYPE_CHECKING:
    from specextend.drafting.captured import CapturedDraft
    from specextend.modeling.llama_blocks import Workspaces


class Drafter:
    """What the decode loop asks of a draft; this one proposes nothing (autoregressive decoding).

    Attributes:
        passes: rows of each level that the last tree took, the root's not counted.
        tap: what it reads of the target's hidden states, None for drafters that read none.
        can_capture: whether its rounds can be captured (`captured.py`); asked only where there is Triton.
        kept: the cache whose beginning the next prompt may have use for, if there is one.
        lookahead: an entry of it depends on so many tokens after its own.
    """

    passes: Sequence[int] = ()
    tap: FeatureTap | None = None
    can_capture = True
    kept: KVCache | None = None
    lookahead = 0

    def __init__(self) -> None:
        self._root = torch.empty(0, dtype=torch.long)

    @property
    def context(self) -> int:
        """Tokens in the draft's cache, those out of its working cache included."""
        return 0

    def prefill(
        self, prompt: Tensor, first: Tensor, extra_slots: int, known: int = 0, on_block: OnBlock | None = None
    ) -> None:
        """Read `prompt` [N], of which the cache `kept` holds the first `known` entries.

        Args:
            first: [] the target's token after it, the first root.
            on_block: see `blocks`.
        """
        self._root = first

    def entries(self, prompt_tokens: int, emitted: Sequence[int]) -> int:
        """Entries of `kept` that a prefill would also have made, after rounds that `emitted` so many tokens each."""
        return 0

    def propose(self, growth: Growth) -> DraftTree:
        """A tree below the newest token, within the bounds of `growth`; those that draft chains have their own."""
        return DraftTree.root(self._root)

    def commit(self, accepted: Accepted) -> None:
        """Take notice of what the target accepted."""
        self._root = accepted.bonus

    def refresh(self, positions: Tensor) -> None:
        """Make the tokens at `positions` [m] the working cache."""
        raise AssertionError("this draft has no cache to refresh")

    def require(self, tokens: int) -> None:
        """Make room for a context of `tokens`, where a generation outgrows what was reserved for it."""

    def captured(self, workspaces: Workspaces) -> CapturedDraft:
        """This drafter for captured rounds, over the caches that `prefill` fills."""
        from specextend.drafting.captured import CapturedDraft

        return CapturedDraft.nothing(workspaces.device)


class TreeDrafter(Drafter):
    """What drafters with a cache of their own share: who attends to what, in the prompt and in the tree.

    Attributes:
        waiting: tokens that captured rounds have emitted and not read yet.
    Args:
        shape: config of the draft's layers, for the shape of the cache.
        rotary: the draft's own rotary embedding; the draft itself runs un-rotated, see `DraftCache`.
        config: its switches are resolved here.
    """

    waiting = 0

    def __init__(
        self, shape: PreTrainedConfig, rotary: nn.Module, dtype: torch.dtype, device: torch.device,
        config: SpecExtendConfig,
    ):  # fmt: skip
        rope = Rope(rotary, dtype, device)
        self.cache = DraftCache(shape, rope, dtype, device, working_capacity=config.slots.working)
        self.kept = self.cache.whole
        self._tree, self._slots = config.tree, config.slots
        self._dense = not config.hybrid_tree_attention
        self._prefill_attention = attention(hybrid=config.flash_prefill)
        self._tree_attention = attention(hybrid=config.hybrid_tree_attention)
        self._window = (config.draft_window or None) if config.flash_prefill else None
        self._prefill_block = prefill_block(config, device)
        if self._window and not has_flash_kernel(device, dtype):
            self._prefill_block = self._window  # the window is a mask then, which grows with the block

    @property
    def context(self) -> int:
        return self.cache.context

    @property
    def candidates(self) -> int:
        """How many tokens it chooses among."""
        raise NotImplementedError

    @property
    def unread(self) -> int:
        """Tokens that were accepted and that it has not read, the newest one included."""
        raise NotImplementedError

    def hold(self) -> DraftTree:
        """The newest token alone: a round that does not speculate. What was accepted waits to be read."""
        raise NotImplementedError

    def rehearsal(self) -> AbstractContextManager[None]:
        """What is proposed inside is forgotten at the end."""
        raise NotImplementedError

    def catch_up(self) -> None:
        """Read all that was accepted but the newest token, without proposing anything."""
        raise NotImplementedError

    @property
    def room(self) -> int | None:
        """Tokens that fit into the working cache until its next refresh; None where it keeps everything."""
        return None if self._slots.working is None else self._slots.working - self.cache.working.length

    def refresh(self, positions: Tensor) -> None:
        self.cache.refresh(positions)

    def require(self, tokens: int) -> None:
        self.cache.require(tokens, self._slots.draft)

    def _grow(self, root: Tensor, logprobs: Tensor, growth: Growth) -> DraftTree:
        """The tree below `root` [], whose children have the log-probabilities [1, V]."""
        self.passes = passes = []

        def expand(level: Level) -> Tensor:
            passes.append(len(level.tokens))
            return self._expand(level)

        return grow(root, logprobs, expand, growth)

    def _expand(self, level: Level) -> Tensor:
        """Log-probabilities [n, V] after the nodes of `level`."""
        raise NotImplementedError

    def _reset(self, prompt_tokens: int, extra_slots: int, known: int) -> None:
        self.cache.reset(prompt_tokens + extra_slots, self._slots.draft, known)

    def _attend_level(self, level: Level) -> Attend:
        """The nodes of `level`, each behind the committed tokens and its own ancestors."""

        def attend(layer, query, key, value, scaling):
            position = self.cache.working.length - 1 + level.depth  # the root is committed
            offset = level.visible.shape[1] - level.visible.shape[0]
            query, key = self.cache.rope.rotate_pair(query, key, position, same=True)
            keys, values = self.cache.working.write(layer, key, value, self.cache.working.length + offset)
            return self._tree_attention(query, keys, values, scaling, level.visible.shape[1], level.visible)[0]

        return attend

    def _attend_newest(self, layer, query, key, value, scaling):
        """The newest tokens, causal, behind the working cache."""
        query, keys, values = self.cache.append(layer, query, key, value)
        return self._tree_attention(query, keys, values, scaling, query.shape[2], None)[0]

    def _attend_prompt(self, layer, query, key, value, scaling):
        """A block of the prompt, before there is a working cache."""
        query, keys, values = self.cache.append_prompt(layer, query, key, value, self._window)
        if self._window:
            return band_attention(query, keys, values, scaling, self._window)[0]
        return self._prefill_attention(query, keys, values, scaling, query.shape[2], None)[0]

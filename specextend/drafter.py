"""Draft models behind one set of verbs; the classic drafter is a small language model over its own cache."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specextend.attention import Attention, band_attention
from specextend.cache import DraftCache
from specextend.config import TreeConfig
from specextend.tree import DraftTree, Level, grow
from specextend.verify import Accepted


class Drafter(Protocol):
    """What the decode loop asks of a draft."""

    @property
    def context(self) -> int:
        """Tokens in the draft's cache, those out of its working cache included."""

    def prefill(self, prompt: Tensor, first: Tensor, room: int) -> None:
        """Forget the last prompt, read `prompt` [N]; `first` [] is the target's token after it, the first root."""

    def propose(self) -> DraftTree:
        """A tree below the newest token."""

    def commit(self, accepted: Accepted) -> None:
        """Take notice of what the target accepted."""

    def refresh(self, positions: Tensor) -> None:
        """Make the tokens at `positions` [m] the working cache."""


class ClassicDrafter:
    """A small causal LM with the target's vocabulary, run with un-rotated keys (see `DraftCache`).

    Args:
        prefill_attention, tree_attention: as for the target.
        window: sliding causal window of the prefill in tokens, None for full causal attention.
        prefill_block: tokens per prefill block; None runs the whole prompt at once.
        vocab_size: the target's; ids beyond it are never proposed.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cache: DraftCache,
        tree: TreeConfig,
        *,
        prefill_attention: Attention,
        tree_attention: Attention,
        window: int | None,
        prefill_block: int | None,
        vocab_size: int,
    ):
        self.cache = cache
        self._model, self._tree, self._vocab_size = model, tree, vocab_size
        self._prefill_attention, self._tree_attention = prefill_attention, tree_attention
        self._window, self._prefill_block = window, prefill_block
        self._pending = torch.empty(0, dtype=torch.long)

    @property
    def context(self) -> int:
        return self.cache.context

    def prefill(self, prompt: Tensor, first: Tensor, room: int) -> None:
        self.cache.reset(len(prompt) + room, self._tree.nodes * self._tree.max_depth)
        for block in prompt.split(self._window or self._prefill_block or len(prompt)):
            self._run(self._model.get_decoder(), block, self._attend_prompt)
            self.cache.commit_prompt(len(block))
        self._pending = first.reshape(1)

    def propose(self) -> DraftTree:
        root = self._pending[-1]
        logits = self._run(self._model, self._pending, self._attend_newest, logits_to_keep=1).logits[0]
        self.cache.commit(len(self._pending))
        self._pending = self._pending[:0]
        return grow(root, self._logprobs(logits), self._expand, self._tree)

    def commit(self, accepted: Accepted) -> None:
        self._pending = torch.cat((accepted.tokens, accepted.bonus.reshape(1)))

    def refresh(self, positions: Tensor) -> None:
        self.cache.refresh(positions)

    def _expand(self, level: Level) -> Tensor:
        """Log-probabilities [n, V] after the nodes of `level`."""

        def attend(layer, query, key, value, scaling):
            position = self.cache.working.length - 1 + level.depth  # the root is committed
            offset = level.visible.shape[1] - level.visible.shape[0]
            query, key = self.cache.rope.rotate_pair(query, key, position, same=True)
            keys, values = self.cache.working.write(layer, key, value, self.cache.working.length + offset)
            return self._tree_attention(query, keys, values, scaling, level.visible.shape[1], level.visible)[0]

        return self._logprobs(self._run(self._model, level.tokens, attend).logits[0])

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

    def _run(self, model, tokens: Tensor, attend, **options):
        return model(
            input_ids=tokens[None],
            position_ids=torch.zeros_like(tokens)[None],  # keys stay un-rotated
            use_cache=False,
            attend=attend,
            **options,
        )

    def _logprobs(self, logits: Tensor) -> Tensor:
        return logits[:, : self._vocab_size].float().log_softmax(-1)

"""Self-speculation: the target drafts for itself over a part of its own KV cache (TriForce, MagicDec).

What the part is, retrieved chunks or sink and window, is the retriever's choice, as for any draft; here it is one row
of attention for all layers, where TriForce chooses per layer and head. The target's keys are rotated already, so a
gathered token keeps its position in the context.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specextend.config import SpecExtendConfig
from specextend.drafting.drafter import Drafter, TreeDrafter
from specextend.drafting.retrieval import StreamingWindow
from specextend.errors import ConfigError
from specextend.modeling.attention import attention
from specextend.modeling.blocks import OnBlock
from specextend.modeling.cache import KVCache
from specextend.modeling.target import Target
from specextend.trees.acceptance import Accepted, accept
from specextend.trees.growth import Growth
from specextend.trees.tree import DraftTree

if TYPE_CHECKING:
    from specextend.drafting.captured import CapturedDraft
    from specextend.modeling.llama_blocks import Workspaces


class SparseTarget(Target):
    """The target over chosen entries of its own cache, and over all that came after the choice.

    Args:
        full: the target's whole cache, which verification fills.
    """

    def __init__(self, model: PreTrainedModel, full: KVCache, config: SpecExtendConfig):
        hybrid = attention(hybrid=config.hybrid_tree_attention)
        super().__init__(model, KVCache(model.config, model.dtype, model.device), hybrid, hybrid, None)
        self.full = full
        slots = config.slots  # beside those of a draft: a chain under verification, and what a smaller draft proposes
        self._capacity = slots.working + 2 * slots.path + config.tree.nodes
        self._left_out = 0

    @property
    def position(self) -> int:
        return self.cache.length + self._left_out

    def begin(self, extra_slots: int = 0) -> None:
        """Forget the last prompt; `choose` comes before anything is drafted, `extra_slots` more than in a round."""
        self.cache.reset(self._capacity + extra_slots)

    def choose(self, positions: Tensor) -> None:
        """Attend to the tokens at `positions` [m] of the context, and to those that follow."""
        self.cache.fill(*self.full.gather(positions))
        self._left_out = self.full.length - self.cache.length

    def follow(self, tokens: int) -> None:
        """Take over the `tokens` newest entries of the whole cache, after dropping drafts of one's own."""
        self.cache.length = self.full.length - tokens - self._left_out
        self.cache.extend(*self.full.gather(slice(self.full.length - tokens, self.full.length)))


class SelfDrafter(Drafter):
    """The target over a part of its cache, greedy, as a draft of chains.

    Args:
        length: draft tokens per chain.
    """

    def __init__(self, sparse: SparseTarget, length: int):
        self._sparse, self._length = sparse, length
        self._root = torch.empty(0, dtype=torch.long)

    @property
    def context(self) -> int:
        return self._sparse.full.length

    def prefill(
        self, prompt: Tensor, first: Tensor, extra_slots: int, known: int = 0, on_block: OnBlock | None = None
    ) -> None:
        self._sparse.begin()
        self._root = first.reshape(1)

    def propose(self, growth: Growth) -> DraftTree:
        tokens = [self._root]
        for _ in range(self._length):
            logits = self._sparse.verify(DraftTree.root(tokens[-1]))
            self._sparse.cache.length += 1
            tokens.append(logits.argmax(-1))
        return DraftTree.chain(torch.cat(tokens))

    def commit(self, accepted: Accepted) -> None:
        self._sparse.follow(len(accepted.path))
        self._root = accepted.bonus.reshape(1)

    def refresh(self, positions: Tensor) -> None:
        self._sparse.choose(positions)

    def captured(self, workspaces: Workspaces) -> CapturedDraft:
        from specextend.drafting.captured import SelfDraft

        sparse = self._sparse
        return SelfDraft(sparse.model, sparse.full, sparse.cache, workspaces, self._length)


class HierarchicalDrafter(SelfDrafter):
    """A small draft over sink and window proposes for the sparse target, whose text is the chain (TriForce).

    Args:
        small: made for `config_of_small`.
    """

    can_capture = False  # how often the small draft proposes within a round depends on what the target accepts

    def __init__(self, small: TreeDrafter, sparse: SparseTarget, config: SpecExtendConfig):
        if small.tap is not None:
            raise ConfigError("an EAGLE head needs the whole target's hidden states; triforce drafts with a small LM")
        super().__init__(sparse, config.tree.max_depth)
        self._small, self._window = small, StreamingWindow.of_size(config.retrieval)
        self._growth = Growth.of(config.tree)  # of the small draft's trees
        self.kept = small.kept

    @staticmethod
    def config_of_small(config: SpecExtendConfig) -> SpecExtendConfig:
        return replace(config, drafting="model", draft_cache="streaming")

    def prefill(
        self, prompt: Tensor, first: Tensor, extra_slots: int, known: int = 0, on_block: OnBlock | None = None
    ) -> None:
        super().prefill(prompt, first, extra_slots)
        self._small.prefill(prompt, first, extra_slots, known, on_block)

    def entries(self, prompt_tokens: int, emitted: Sequence[int]) -> int:
        return self._small.entries(prompt_tokens, emitted)

    def propose(self, growth: Growth) -> DraftTree:
        tokens = self._root
        tree = self._small.propose(self._growth)
        with self._small.cache.provisional():
            while True:
                accepted = accept(tree, self._sparse.verify(tree).argmax(-1))
                self._sparse.commit(accepted.path)
                tokens = torch.cat((tokens, accepted.tokens, accepted.bonus.reshape(1)))
                if len(tokens) > self._length:
                    return DraftTree.chain(tokens[: self._length + 1])
                self._small.commit(accepted)
                tree = self._small.propose(self._growth)

    def commit(self, accepted: Accepted) -> None:
        super().commit(accepted)
        self._small.commit(accepted)

    def refresh(self, positions: Tensor) -> None:
        super().refresh(positions)
        self._small.refresh(self._window.select(self._sparse.attention_row, self._small.context))

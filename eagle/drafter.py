"""An EAGLE head behind the verbs of the decode loop; the tree, the cache and the retrieval are `specextend`'s."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel

from eagle.heads import Head
from specextend.config import SpecExtendConfig
from specextend.drafting.drafter import TreeDrafter
from specextend.drafting.expansion import Level
from specextend.modeling.blocks import OnBlock, blocks
from specextend.modeling.features import FeatureTap
from specextend.trees.acceptance import Accepted
from specextend.trees.growth import Growth
from specextend.trees.tree import DraftTree

if TYPE_CHECKING:
    from specextend.drafting.captured import CapturedDraft
    from specextend.modeling.llama_blocks import Workspaces


class EagleDrafter(TreeDrafter):
    """Drafts with an EAGLE head.

    The head's cache holds pairs: pair i is token i + 1 with the target's feature of token i, at position i. After N
    committed tokens and a root, N pairs exist, and the last of them, the root's, predicts the tree's first level.
    A prefill begins with the pair that joins the last known token to the first new one, so the target reads that
    token's feature again.

    Args:
        vocab_size: the target's; ids beyond it are never proposed.
        target: whose hidden states are tapped.
    """

    def __init__(self, head: Head, config: SpecExtendConfig, vocab_size: int, *, target: PreTrainedModel):
        super().__init__(head.config, head.rotary_emb, target.dtype, target.device, config)
        self.lookahead = 1
        self.tap = FeatureTap(target, head.entering)
        self.head, self._vocab_size = head, vocab_size
        self._tokens = self._states = self._hidden = torch.empty(0)
        dim = head.layers[0].self_attn.head_dim
        zero = torch.zeros(1, 1, dim, dtype=target.dtype, device=target.device)
        self._unrotated = (zero + 1, zero)

    @property
    def candidates(self) -> int:
        ids = self.head.target_ids
        return self._vocab_size if ids is None else len(ids)

    @property
    def can_capture(self) -> bool:
        from specextend.modeling.llama_blocks import is_block_supported

        return is_block_supported(self.head.layers[0])

    def captured(self, workspaces: Workspaces) -> CapturedDraft:
        from eagle.captured import EagleDraft
        from specextend.kernels.tree import TreeBuffers

        tree = TreeBuffers(self._tree, self.candidates, workspaces.device)
        return EagleDraft(
            self.head, lambda: self._states, self.cache, tree, workspaces, self._tree.max_depth, dense=self._dense,
            scratch=self._slots.draft,
        )  # fmt: skip

    def entries(self, prompt_tokens: int, emitted: Sequence[int]) -> int:
        # a round's pairs come with the next one's tree; keys and values follow from a pair alone, whenever it came
        if not emitted:
            return prompt_tokens - 1
        unread = max(len(self._tokens), self.waiting, emitted[-1])  # more than a round's where some did not speculate
        return prompt_tokens + sum(emitted) - unread

    def prefill(
        self, prompt: Tensor, first: Tensor, extra_slots: int, known: int = 0, on_block: OnBlock | None = None
    ) -> None:
        """The prompt's pairs need keys and values only: nothing reads the block's output for them."""
        self._reset(len(prompt), extra_slots, known)
        tokens, features = torch.cat((prompt[1:], first.reshape(1))), self.tap.take()
        unread = len(prompt) - len(features)
        for pairs in blocks(known, len(prompt) - 1, self._prefill_block, on_block):
            states = self.head.states(features[pairs.start - unread : pairs.stop - unread])
            key, value = self.head.keys_and_values(tokens[None, pairs], states[None], self._unrotated)
            self.cache.store_prompt(0, key, value)
            self.cache.commit_prompt(key.shape[2])
        self._tokens, self._states = tokens[-1:], self.head.states(features[-1:])

    @property
    def unread(self) -> int:
        return len(self._tokens)

    def hold(self) -> DraftTree:
        return DraftTree.root(self._tokens[-1])

    @contextmanager
    def rehearsal(self) -> Iterator[None]:
        tokens, states = self._tokens, self._states
        with self.cache.provisional():
            yield
        self._tokens, self._states = tokens, states

    def catch_up(self) -> None:
        self._read(len(self._tokens) - 1)

    def propose(self, growth: Growth) -> DraftTree:
        root = self._tokens[-1]
        self._hidden = self._read(len(self._tokens))[-1:]
        tree = self._grow(root, self._logprobs(self._hidden), growth)
        return replace(tree, tokens=torch.cat((root.reshape(1), self._target_ids(tree.tokens[1:]))))

    def commit(self, accepted: Accepted) -> None:
        self._tokens = torch.cat((self._tokens, accepted.tokens, accepted.bonus.reshape(1)))
        self._states = torch.cat((self._states, self.head.states(self.tap.take()[accepted.path])))

    def _read(self, pairs: int) -> Tensor:
        """Block output [T, H] of the context's next `pairs` pairs, which it commits."""
        hidden = self._run(self._tokens[:pairs], self._states[:pairs], self._attend_newest)
        self.cache.commit(pairs)
        self._tokens, self._states = self._tokens[pairs:], self._states[pairs:]
        return hidden

    def _expand(self, level: Level) -> Tensor:
        """Log-probabilities [n, V_draft] after the nodes of `level`, whose tokens are draft ids."""
        states = self._hidden[level.parents]
        self._hidden = self._run(self._target_ids(level.tokens), states, self._attend_level(level))
        return self._logprobs(self._hidden)

    def _run(self, tokens: Tensor, states: Tensor, attend) -> Tensor:
        """Block output [T, H] of pairs."""
        return self.head(tokens[None], states[None], self._unrotated, attend=attend)[0]

    def _logprobs(self, hidden: Tensor) -> Tensor:
        logits = self.head.logits(hidden).float()
        return (logits if self.head.target_ids is not None else logits[:, : self._vocab_size]).log_softmax(-1)

    def _target_ids(self, tokens: Tensor) -> Tensor:
        return tokens if self.head.target_ids is None else self.head.target_ids[tokens]

"""A small language model as the draft, over its own cache (the classic drafter)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specextend.config import SpecExtendConfig
from specextend.drafting.drafter import TreeDrafter
from specextend.drafting.expansion import Level
from specextend.modeling.attention import Attend
from specextend.modeling.blocks import OnBlock, blocks
from specextend.modeling.rope import make_exact
from specextend.trees.acceptance import Accepted
from specextend.trees.growth import Growth
from specextend.trees.tree import DraftTree

if TYPE_CHECKING:
    from specextend.drafting.captured import CapturedDraft
    from specextend.modeling.llama_blocks import Workspaces


class ClassicDrafter(TreeDrafter):
    """A small causal LM with the target's vocabulary.

    Args:
        vocab_size: the target's; ids beyond it are never proposed.
    """

    def __init__(self, model: PreTrainedModel, config: SpecExtendConfig, vocab_size: int):
        make_exact(model)
        super().__init__(model.config, model.get_decoder().rotary_emb, model.dtype, model.device, config)
        self.model, self.vocab_size = model, vocab_size
        self._embed = model.get_decoder().embed_tokens
        self._pending = torch.empty(0, dtype=torch.long)

    @property
    def candidates(self) -> int:
        return self.vocab_size

    def entries(self, prompt_tokens: int, emitted: Sequence[int]) -> int:
        return prompt_tokens  # what came after was read with the working cache in view

    def prefill(
        self, prompt: Tensor, first: Tensor, extra_slots: int, known: int = 0, on_block: OnBlock | None = None
    ) -> None:
        self._reset(len(prompt), extra_slots, known)
        for block in blocks(known, len(prompt), self._prefill_block, on_block):
            self._run(prompt[block], self._attend_prompt)
            self.cache.commit_prompt(block.stop - block.start)
        self._pending = first.reshape(1)

    @property
    def can_capture(self) -> bool:
        from specextend.modeling.llama_blocks import is_supported

        return is_supported(self.model)

    def captured(self, workspaces: Workspaces) -> CapturedDraft:
        from specextend.drafting.captured import SmallLMDraft
        from specextend.kernels.tree import TreeBuffers

        tree = TreeBuffers(self._tree, self.candidates, workspaces.device)
        return SmallLMDraft(
            self.model, self._embed, self.cache, tree, workspaces, self._tree.max_depth, dense=self._dense,
            scratch=self._slots.draft,
        )  # fmt: skip

    def clamp_ids(self, vocab_size: int) -> None:
        """Prepare for a target that knows `vocab_size` ids: those the draft lacks are read as its last one.

        The draft only guesses; what it guesses after such a token is verified like anything else.
        """
        rows = self._embed.num_embeddings
        if vocab_size > rows:
            embed = self._embed
            self._embed = lambda tokens: embed(tokens.clamp(max=rows - 1))

    @property
    def unread(self) -> int:
        return len(self._pending)

    def hold(self) -> DraftTree:
        return DraftTree.root(self._pending[-1])

    @contextmanager
    def rehearsal(self) -> Iterator[None]:
        pending = self._pending
        with self.cache.provisional():
            yield
        self._pending = pending

    def catch_up(self) -> None:
        self._read(self._pending[:-1])
        self._pending = self._pending[-1:]

    def propose(self, growth: Growth) -> DraftTree:
        root, hidden = self._pending[-1], self._read(self._pending)[-1:]
        self._pending = self._pending[:0]
        return self._grow(root, self._logprobs(hidden), growth)

    def score(self, tokens: Tensor) -> Tensor:
        """Log-probabilities [T, V] after each of the context's next `tokens` [T], which it commits."""
        return self._logprobs(self._read(tokens))

    def commit(self, accepted: Accepted) -> None:
        self._pending = torch.cat((self._pending, accepted.tokens, accepted.bonus.reshape(1)))

    def _expand(self, level: Level) -> Tensor:
        """Log-probabilities [n, V] after the nodes of `level`."""
        return self._logprobs(self._run(level.tokens, self._attend_level(level)))

    def _read(self, tokens: Tensor) -> Tensor:
        """Final hidden states [T, H] of the context's next tokens."""
        hidden = self._run(tokens, self._attend_newest)
        self.cache.commit(len(tokens))
        return hidden

    def _run(self, tokens: Tensor, attend: Attend) -> Tensor:
        return run_unrotated(self.model, self._embed(tokens), attend)

    def _logprobs(self, hidden: Tensor) -> Tensor:
        return self.model.get_output_embeddings()(hidden)[:, : self.vocab_size].float().log_softmax(-1)


def run_unrotated(model: PreTrainedModel, embedded: Tensor, attend: Attend) -> Tensor:
    """Final hidden states [T, H] of a causal LM, given its tokens `embedded` [T, H], un-rotated for `attend`.

    Runs the decoder's parts one after the other: a draft pass is so short that the model's own preparations (masks,
    rotary tables, arguments) would be a fifth of it.
    """
    decoder = model.get_decoder()
    hidden = embedded[None]
    dim = decoder.layers[0].self_attn.head_dim
    no_rotation = (hidden.new_ones(1, 1, dim), hidden.new_zeros(1, 1, dim))
    for layer in decoder.layers:
        hidden = layer(hidden, position_embeddings=no_rotation, attend=attend)
    return decoder.norm(hidden)[0]

"""Draft models behind one set of verbs; the classic drafter is a small language model over its own cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from specextend.attention import Attend, attention, band_attention, has_flash_kernel
from specextend.cache import DraftCache
from specextend.config import SpecExtendConfig, prefill_block
from specextend.features import FeatureTap
from specextend.rope import Rope, make_exact
from specextend.tree import DraftTree, Level, grow
from specextend.verify import Accepted

if TYPE_CHECKING:
    from specextend.fused import FusedDraft, Workspaces
    from specextend.kernels.tree import TreeBuffers


class Drafter(Protocol):
    """What the decode loop asks of a draft.

    Attributes:
        tap: what it reads of the target's hidden states, None for drafters that read none.
    """

    tap: FeatureTap | None

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


class TreeDrafter:
    """What drafters with a cache of their own share: who attends to what, in the prompt and in the tree.

    Args:
        shape: config of the draft's layers, for the shape of the cache.
        rotary: the draft's own rotary embedding; the draft itself runs un-rotated, see `DraftCache`.
        config: its switches are resolved here.
    """

    tap: FeatureTap | None = None

    def __init__(
        self, shape: PreTrainedConfig, rotary: nn.Module, dtype: torch.dtype, device: torch.device,
        config: SpecExtendConfig,
    ):  # fmt: skip
        rope = Rope(rotary, dtype, device)
        self.cache = DraftCache(shape, rope, dtype, device, working_capacity=_working_capacity(config))
        self._tree = config.tree
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
    def fits_kernels(self) -> bool:
        """Whether its rounds can be captured, see `fused`; needs Triton."""
        raise NotImplementedError

    def fused(self, tree: TreeBuffers, workspaces: Workspaces) -> FusedDraft:
        """This drafter for captured rounds, over the caches that `prefill` fills."""
        raise NotImplementedError

    def refresh(self, positions: Tensor) -> None:
        self.cache.refresh(positions)

    def _reset(self, prompt_tokens: int, room: int) -> None:
        self.cache.reset(prompt_tokens + room, self._tree.nodes * self._tree.max_depth)

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


class ClassicDrafter(TreeDrafter):
    """A small causal LM with the target's vocabulary.

    Args:
        vocab_size: the target's; ids beyond it are never proposed.
    """

    def __init__(self, model: PreTrainedModel, config: SpecExtendConfig, vocab_size: int):
        make_exact(model)
        super().__init__(model.config, model.get_decoder().rotary_emb, model.dtype, model.device, config)
        self.model, self.vocab_size = model, vocab_size
        self._pending = torch.empty(0, dtype=torch.long)

    @property
    def candidates(self) -> int:
        return self.vocab_size

    def prefill(self, prompt: Tensor, first: Tensor, room: int) -> None:
        self._reset(len(prompt), room)
        for block in prompt.split(self._prefill_block or len(prompt)):
            self._run(block, self._attend_prompt)
            self.cache.commit_prompt(len(block))
        self._pending = first.reshape(1)

    @property
    def fits_kernels(self) -> bool:
        from specextend.blocks import fits

        return fits(self.model)

    def fused(self, tree: TreeBuffers, workspaces: Workspaces) -> FusedDraft:
        from specextend.fused import FusedClassicDraft

        return FusedClassicDraft(self, tree, workspaces)

    def propose(self) -> DraftTree:
        root, hidden = self._pending[-1], self._read(self._pending)[-1:]
        self._pending = self._pending[:0]
        return grow(root, self._logprobs(hidden), self._expand, self._tree)

    def score(self, tokens: Tensor) -> Tensor:
        """Log-probabilities [T, V] after each of the context's next `tokens` [T], which it commits."""
        return self._logprobs(self._read(tokens))

    def commit(self, accepted: Accepted) -> None:
        self._pending = torch.cat((accepted.tokens, accepted.bonus.reshape(1)))

    def _expand(self, level: Level) -> Tensor:
        """Log-probabilities [n, V] after the nodes of `level`."""
        return self._logprobs(self._run(level.tokens, self._attend_level(level)))

    def _read(self, tokens: Tensor) -> Tensor:
        """Final hidden states [T, H] of the context's next tokens."""
        hidden = self._run(tokens, self._attend_newest)
        self.cache.commit(len(tokens))
        return hidden

    def _run(self, tokens: Tensor, attend: Attend) -> Tensor:
        return run_unrotated(self.model, tokens, attend)

    def _logprobs(self, hidden: Tensor) -> Tensor:
        return self.model.get_output_embeddings()(hidden)[:, : self.vocab_size].float().log_softmax(-1)


def run_unrotated(model: PreTrainedModel, tokens: Tensor, attend: Attend) -> Tensor:
    """Final hidden states [T, H] of a causal LM whose queries and keys reach `attend` un-rotated.

    Runs the decoder's parts one after the other: a draft pass is so short that the model's own preparations (masks,
    rotary tables, arguments) would be a fifth of it.
    """
    decoder = model.get_decoder()
    hidden = decoder.embed_tokens(tokens[None])
    dim = decoder.layers[0].self_attn.head_dim
    no_rotation = (hidden.new_ones(1, 1, dim), hidden.new_zeros(1, 1, dim))
    for layer in decoder.layers:
        hidden = layer(hidden, position_embeddings=no_rotation, attend=attend)
    return decoder.norm(hidden)[0]


def _working_capacity(config: SpecExtendConfig) -> int | None:
    """Tokens the working cache must hold: what is retrieved and what comes until the next refresh."""
    if config.draft_cache == "full":
        return None
    retrieval = config.retrieval
    # between two refreshes it grows by at most a full path and a bonus token per round
    return retrieval.top_k * retrieval.chunk_size + (retrieval.every_n_steps + 1) * (config.tree.max_depth + 1)

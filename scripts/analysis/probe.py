"""Target and draft apart from the engine's loop: single passes, and what each expects of given tokens (teacher-forced).

Everything runs eagerly over caches of its own, under an engine's setting.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from specextend import SpecExtend, SpecExtendConfig
from specextend.config import prefill_block
from specextend.drafting.retrieval import CrossModelRetrieval, StreamingWindow
from specextend.drafting.self_speculation import SparseTarget
from specextend.drafting.small_lm import ClassicDrafter
from specextend.errors import InputError
from specextend.methods import METHODS
from specextend.modeling.attention import attention
from specextend.modeling.cache import KVCache
from specextend.modeling.target import Target
from specextend.models.loading import LoadedModels
from specextend.trees.tree import DraftTree


def target_of(models: LoadedModels, config: SpecExtendConfig) -> Target:
    """A target over an empty cache of its own."""
    return Target(
        models.target,
        KVCache(models.target.config, models.dtype, models.device),
        attention(hybrid=config.flash_prefill),
        attention(hybrid=config.hybrid_tree_attention),
        prefill_block(config, models.device),
    )


def drafter_of(models: LoadedModels, config: SpecExtendConfig) -> ClassicDrafter:
    """A small language model as draft, over a cache of its own."""
    drafter = models.drafter(models.draft, config, models.vocab_size)
    if not isinstance(drafter, ClassicDrafter):
        raise InputError("an EAGLE head cannot be probed alone; give a small language model as draft")
    return drafter


class Probe:
    """A draft model under each cache, and the target over a part and over all of its own."""

    def __init__(self, engine: SpecExtend):
        models, config = engine.models, engine.config
        self.device = models.device
        self._target, self._windowed = target_of(models, config), drafter_of(models, config)
        full = METHODS["fa_hta"].config(config.tree, config.retrieval)
        self._whole = drafter_of(models, replace(full, draft_window=0))
        self._retrieved = CrossModelRetrieval(config.retrieval)
        self._streaming = StreamingWindow.of_size(config.retrieval)
        own = METHODS["self_retrieval"].config(config.tree, config.retrieval)
        self._own = CrossModelRetrieval(own.retrieval)
        self._sparse = SparseTarget(models.target, self._target.cache, own)
        self.setting = {
            "working_cache": config.retrieval.top_k * config.retrieval.chunk_size,
            "chunk_size": config.retrieval.chunk_size,
            "chunk_size_of_target_retrieval": own.retrieval.chunk_size,
            "draft_window": config.draft_window,
        }

    @torch.inference_mode()
    def logits(self, context: Tensor, read: Tensor) -> dict[str, Tensor]:
        """Logits or log-probabilities [T, V] after each of `read` [T] behind `context` [N], by cache.

        The attention of `read`'s first token over the context retrieves.
        """
        self._target.prefill(context, len(read))
        whole_target = self._target.verify(DraftTree.chain(read))
        row = self._target.attention_row()
        found = {"full": self.draft_alone(context, read)}
        self._windowed.prefill(context, read[0], len(read))
        for name, chosen in (("streaming", self._streaming), ("cmr", self._retrieved)):
            with self._windowed.cache.provisional():
                self._windowed.refresh(chosen.select(lambda: row, len(context)))
                found[name] = self._windowed.score(read)
        self._sparse.begin(len(read))
        self._sparse.choose(self._own.select(lambda: row, len(context)))
        found["target_retrieval"] = self._sparse.verify(DraftTree.chain(read))
        return found | {"target": whole_target}

    @torch.inference_mode()
    def draft_alone(self, context: Tensor, read: Tensor) -> Tensor:
        """The draft's log-probabilities [T, V] with all of `context` in its cache, read without a window."""
        self._whole.prefill(context, read[0], len(read))
        return self._whole.score(read)

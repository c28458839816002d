"""A prompt through a Llama target on a GPU, block by block of `blocks.PromptBlock`.

What `Target.prefill` computes through transformers' modules, which read and write the hidden states some thirty times
a layer between their products; here it is eight times.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from specextend.kernels.elementwise import KeyValue, rms_norm
from specextend.modeling.llama_blocks import PromptBlock, as_norm
from specextend.modeling.rope import Rope
from specextend.modeling.target import LastLayer, Target


class FusedPrefillTarget(Target):
    """A `Target` whose prefill runs without transformers' modules; see `llama_blocks.is_supported`."""

    def _read(self, block: Tensor) -> Tensor:
        decoder, start = self.model.get_decoder(), self.cache.length
        entering = (self._tap and self._tap.entering) or ()
        entered: dict[int, Tensor] = {}
        length = torch.full((), start, device=block.device)
        tables = self._rope.tables(start + len(block))
        hidden = decoder.embed_tokens(block)
        for index, layer in enumerate(self._layers):
            if index in entering:
                entered[index] = hidden.clone()
            keys, values = self.cache.buffer[:, index, 0]
            query, lse = layer.run(hidden, KeyValue(keys, values, length), start, tables)
        norm = as_norm(decoder.norm)
        entered[len(self._layers)] = hidden
        if self._tap:  # who names no layer reads the final state
            self._tap.collect([entered[layer] for layer in entering] or [rms_norm(hidden, norm)])
        self._last_layer = LastLayer.newest(query, lse, layer.scaling, 1)
        return self.model.get_output_embeddings()(rms_norm(hidden[-1:], norm))

    @cached_property
    def _layers(self) -> list[PromptBlock]:
        return [PromptBlock(layer, self._prefill_attention) for layer in self.model.get_decoder().layers]

    @cached_property
    def _rope(self) -> Rope:
        return Rope(self.model.get_decoder().rotary_emb, self.model.dtype, self.model.device)

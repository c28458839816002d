"""A round of SpecExtend on a GPU, without a look at any value from the host.

The algorithm is that of `generate.speculative`, in a form that CUDA graphs can hold for every length: lengths are
tensors on the device, a tree always has all its levels and slots, and what does not count is masked. The host reads the
accepted tokens once, at the end of a round. What the models compute is `blocks.py`'s; models that do not fit go the way
of `target.py` and `drafter.py`.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from specextend.kernels import scores
from specextend.kernels.elementwise import KeyValue, rms_norm
from specextend.modeling.cache import KVCache
from specextend.modeling.features import FeatureTap
from specextend.modeling.llama_blocks import FusedBlock, Slots, Workspaces, as_norm
from specextend.modeling.rope import Rope
from specextend.modeling.target import Target


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
        tokens: [T] int64; depth: [T] int32; ancestor_bits: [T, ceil(T / 32)] int32 ancestor bits; slots: T.
    """

    tokens: Tensor
    depth: Tensor
    ancestor_bits: Tensor
    slots: int


class Root:
    """A lone token, autoregressive decoding's tree."""

    slots = 1

    def __init__(self, device: torch.device):
        self.tokens = torch.zeros(1, dtype=torch.int64, device=device)
        self.depth = torch.zeros(1, dtype=torch.int32, device=device)
        self.ancestor_bits = torch.ones(1, 1, dtype=torch.int32, device=device)


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
        slots = Slots(tree.ancestor_bits, tree.slots)
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

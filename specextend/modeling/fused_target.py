"""Verification on a GPU without host synchronisation, in a form that CUDA graphs can hold for every length.

Lengths are tensors on the device, a tree always has all its slots, and what does not count is masked. What the model
computes is `llama_blocks.py`'s; models that are not supported there are verified by `target.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specextend.kernels import scores
from specextend.kernels.elementwise import rms_norm
from specextend.kernels.tree import TreeNodes
from specextend.modeling.cache import KVCache
from specextend.modeling.features import FeatureTap
from specextend.modeling.llama_blocks import FusedBlock, Slots, Workspaces, as_norm
from specextend.modeling.rope import Rope
from specextend.modeling.static_cache import StaticCache
from specextend.modeling.target import LastLayer


class FusedTarget:
    """Verification of a tree of fixed size behind the committed tokens of a cache.

    Args:
        cache: of the model's shape; a prefill fills it.
        slots: nodes of a tree, the root included.
        tap: what the draft reads of the hidden states, if it reads any.
        positions: the cache whose capacity bounds the nodes' positions, if it is another.
    Attributes:
        span: None attends by the tree kernel; else by dense attention over the first `span` keys.
    """

    def __init__(
        self, model: PreTrainedModel, cache: KVCache, workspaces: Workspaces, slots: int,
        tap: FeatureTap | None = None, positions: KVCache | None = None,
    ):  # fmt: skip
        decoder, weight = model.get_decoder(), model.get_output_embeddings().weight
        self.cache = StaticCache(cache)
        self._embedding, self._norm = decoder.embed_tokens, as_norm(decoder.norm)
        self._rope, self.span = Rope(decoder.rotary_emb, model.dtype, model.device), None
        self._positions = positions or cache
        tables = self._rope.tables(self._positions.capacity)
        self._blocks = [FusedBlock(layer, *tables, workspaces) for layer in decoder.layers]
        self._readout = weight
        heads, dim = len(decoder.layers[-1].self_attn.q_proj.weight), decoder.layers[-1].self_attn.head_dim
        self.query = torch.zeros(heads // dim, slots, dim, dtype=model.dtype, device=model.device)
        self.lse = torch.zeros(heads // dim, slots, device=model.device)
        self._scaling = decoder.layers[-1].self_attn.scaling
        self._entering = tap and tap.entering
        parts = 0 if tap is None else 1 if tap.entering is None else len(tap.entering)
        self.features = weight.new_zeros(slots, parts * weight.shape[1])

    def begin(self, newest: LastLayer) -> None:
        """Go on from a prefill: the cache's length, and what it kept of the newest token."""
        self.query[:, 0], self.lse[:, 0] = newest.query[0, :, -1], newest.lse[0, :, -1]
        self.cache.begin()

    def rebind(self) -> None:
        """Point at the cache's buffer as it is now; what was captured before is void."""
        self.cache.rebind()
        cos, sin = self._rope.tables(self._positions.capacity)
        for block in self._blocks:
            block.cos, block.sin = cos, sin

    def verify(self, tree: TreeNodes, depth: Tensor | None = None) -> Tensor:
        """Logits [T, V] after every node; keeps what the attention row and the draft will ask for.

        Args:
            depth: [T] int32 distance of each node from the cache's length; None: its depth in the tree.
        """
        slots = Slots(tree.ancestor_bits, tree.slots)
        depth = tree.depth if depth is None else depth
        mask = slots.mask(self.cache.length, self.span) if self.span else None
        hidden = self._embedding(tree.tokens)
        for index, block in enumerate(self._blocks):
            self._keep(hidden, index)
            hidden = block.run(hidden, slots, self.cache.layer(index), mask=mask, depth=depth)
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

    def last_layer(self, nodes: slice) -> LastLayer:
        """A copy of what the last verification keeps of `nodes`."""
        return LastLayer(self.query[None, :, nodes].clone(), self.lse[None, :, nodes].clone(), self._scaling)

    def attention_row(self, newest: Tensor) -> Tensor:
        """[S] attention of node `newest` [] of the tree just verified over the committed context, 0 beyond."""
        return scores.attention_row(self.query, self.lse, newest, self.cache.keys[-1], self.cache.length, self._scaling)

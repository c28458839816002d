"""Blocks of the Llama family in few launches, over the model's own weights.

`FusedBlock` runs the few rows of a tree behind a cache whose length the host does not know, in eight launches of
`kernels`. `PromptBlock` runs the many rows of a prompt, where the products are PyTorch's and what stands between them
is small kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer

from specextend.kernels import linear, tree_attention
from specextend.kernels.elementwise import KeyValue, Norm, Placement, gate, place, rms_norm
from specextend.modeling.attention import Attention, DenseAttention
from specextend.modeling.rope import DynamicRope

HEAD_DIMS = (32, 64, 128)


def is_supported(model: PreTrainedModel) -> bool:
    """Whether the kernels compute what this model's blocks compute."""
    decoder = model.get_decoder()
    is_known = all(isinstance(layer, LlamaDecoderLayer | MistralDecoderLayer) for layer in decoder.layers)
    is_static = not isinstance(decoder.rotary_emb, DynamicRope)
    return is_known and is_static and all(map(is_block_supported, decoder.layers))


def is_block_supported(block: nn.Module) -> bool:
    """The same of one block, which is known to compute what a Llama block computes."""
    attention, mlp = block.self_attn, block.mlp
    projections = [*_projections(attention), attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    return (
        all(type(projection) is nn.Linear and projection.bias is None for projection in projections)
        and attention.head_dim in HEAD_DIMS
        and mlp.config.hidden_act == "silu"
    )


def _projections(attention: nn.Module) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
    return attention.q_proj, attention.k_proj, attention.v_proj


def merged(projections: Sequence[nn.Linear]) -> Tensor:
    """One weight out of several that read the same input; the modules keep theirs as views of it."""
    weights = [projection.weight.data for projection in projections]
    if not all(_follows(*pair) for pair in pairwise(weights)):
        whole = torch.cat(weights)
        for projection, view in zip(projections, whole.split([len(weight) for weight in weights]), strict=True):
            projection.weight.data = view
        return whole
    return weights[0].as_strided((sum(map(len, weights)), weights[0].shape[1]), weights[0].stride())


def _follows(first: Tensor, second: Tensor) -> bool:
    same = first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    return same and first.data_ptr() + first.nbytes == second.data_ptr()


class BlockWeights:
    """What the launches of a block read; products that share an input are one weight."""

    def __init__(self, block: nn.Module):
        attention, mlp = block.self_attn, block.mlp
        self.qkv, self.gate_up = merged(_projections(attention)), merged((mlp.gate_proj, mlp.up_proj))
        self.output, self.down = attention.o_proj.weight, mlp.down_proj.weight
        self.before, self.between = as_norm(block.input_layernorm), as_norm(block.post_attention_layernorm)
        self.scaling = attention.scaling


class Workspaces:
    """Scratch memory of the kernels; launches follow each other on one stream and share it."""

    def __init__(self, device: torch.device):
        self.device = device
        self.linear = linear.Workspace(device)
        self._attention: dict[tuple[int, int, int, int], tree_attention.Workspace] = {}

    def attention(self, heads: int, queries: int, dim: int, splits: int) -> tree_attention.Workspace:
        shape = (heads, queries, dim, splits)
        if shape not in self._attention:
            self._attention[shape] = tree_attention.Workspace(heads, queries, dim, splits, self.device)
        return self._attention[shape]


@dataclass(frozen=True)
class Slots:
    """Who sees whom behind the committed tokens: `count` slots, `ancestor_bits` [T, ceil(count / 32)]."""

    ancestor_bits: Tensor
    count: int

    @classmethod
    def causal(cls, count: int, device: torch.device) -> Slots:
        mask = torch.ones(count, count, dtype=torch.bool, device=device).tril()
        return cls(tree_attention.pack_mask(mask), count)

    def mask(self, length: Tensor, span: int) -> Tensor:
        """[T, span] bool: who sees which of the first `span` keys of a cache of `length` [], slots included."""
        place = torch.arange(span, device=length.device) - length
        slot = place.clamp(0, self.count - 1)
        seen = (self.ancestor_bits[:, slot // 32] >> (slot % 32)) & 1
        return (place < 0) | ((place < self.count) & (seen == 1))


class FusedBlock:
    """One transformer block over T rows."""

    def __init__(self, block: nn.Module, cos: Tensor, sin: Tensor, workspaces: Workspaces):
        self._weights, self.cos, self.sin, self._workspaces = BlockWeights(block), cos, sin, workspaces
        self.query = self.lse = torch.empty(0)

    def run(
        self, residual: Tensor, slots: Slots, cache: KeyValue, *, entry: Tensor | None = None,
        full: KeyValue | None = None, mask: Tensor | None = None, active: Tensor | None = None, **where,
    ) -> Tensor:  # fmt: skip
        """Hidden states [T, H] after the block; writes keys and values into the caches.

        Args:
            residual: [T, H] before the block; entry: what the attention reads, if it is not the residual normed.
            full: a second cache, that keeps keys un-rotated.
            mask: [T, span] as `Slots.mask`: dense attention over the first `span` keys; None is the tree kernel.
            active: [>= 1] float32; where its first is not positive, nothing is computed.
            where: `shift`, `step`, `offset` and `depth` of a `Placement`.
        """
        weights, work = self._weights, self._workspaces.linear
        read, norm = (residual, weights.before) if entry is None else (entry, None)
        attended = self.attend(read, slots, cache, norm=norm, full=full, mask=mask, active=active, **where)
        residual = linear.linear(attended, weights.output, work, residual=residual, active=active)
        inner = linear.swiglu(residual, weights.gate_up, work, norm=weights.between, active=active)
        return linear.linear(inner, weights.down, work, residual=residual, active=active)

    def attend(
        self, entry: Tensor, slots: Slots, cache: KeyValue, *, norm: Norm | None = None, full: KeyValue | None = None,
        mask: Tensor | None = None, active: Tensor | None = None, **where,
    ) -> Tensor:  # fmt: skip
        """Attention output [T, heads * D] of `entry` [T, K], normed if asked; the rest as for `run`."""
        weights, placement = self._weights, Placement(self.cos, self.sin, cache.length, **where)
        self.query = linear.rotary(
            entry, weights.qkv, self._workspaces.linear, placement, cache, norm=norm, full=full, active=active
        )
        heads, rows, _ = self.query.shape
        if mask is not None:
            keys, values = (part[None, :, : mask.shape[1]] for part in (cache.keys, cache.values))
            dense, lse = DenseAttention()(self.query[None], keys, values, weights.scaling, mask.shape[1], mask)
            self.lse = lse[0]
            return dense[0].transpose(0, 1).reshape(rows, -1)
        launch = tree_attention.launch_for(entry.device, len(cache.keys), heads // len(cache.keys) * rows)
        attended, self.lse = tree_attention.tree_attention(
            self.query, cache.keys, cache.values, cache.length, slots.ancestor_bits, weights.scaling, slots=slots.count,
            launch=launch, workspace=self._workspaces.attention(*self.query.shape, launch.splits), active=active,
        )  # fmt: skip
        return attended.transpose(0, 1).reshape(rows, -1)


class PromptBlock:
    """One transformer block over a block of the prompt."""

    def __init__(self, block: nn.Module, attend: Attention):
        self._weights, self._attend = BlockWeights(block), attend
        self.scaling = self._weights.scaling

    def run(
        self, residual: Tensor, cache: KeyValue, start: int, tables: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Turns `residual` [T, H] into the hidden states after the block; writes keys and values into `cache`.

        Args:
            start: how long the cache is, `cache.length` as the host knows it.
            tables: cos and sin, see `Placement`.
        Returns:
            the queries [1, H, T, D] and their log-sum-exp [1, H, T].
        """
        weights, rows = self._weights, len(residual)
        states = rms_norm(residual, weights.before) @ weights.qkv.T
        query = place(states, Placement(*tables, cache.length), cache)[None]
        keys, values = (part[None, :, : start + rows] for part in (cache.keys, cache.values))
        output, lse = self._attend(query, keys, values, weights.scaling, rows, None)
        residual.addmm_(output[0].transpose(0, 1).reshape(rows, -1), weights.output.T)
        inner = gate(rms_norm(residual, weights.between) @ weights.gate_up.T)
        residual.addmm_(inner, weights.down.T)
        return query, lse


def as_norm(module: nn.Module) -> Norm | None:
    """An RMSNorm for the kernels; None for what EAGLE-1's block has in place of one."""
    return None if isinstance(module, nn.Identity) else Norm(module.weight, module.variance_epsilon)

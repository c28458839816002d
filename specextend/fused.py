"""A round of SpecExtend on a GPU, without a look at any value from the host.

The algorithm is that of `generate.speculative`, in a form that CUDA graphs can hold for every length: lengths are
tensors on the device, a tree always has all its levels and slots, and what does not count is masked. The host reads the
accepted tokens once, at the end of a round. Blocks of the Llama family run as eight launches over the model's own
weights (`kernels`, and PyTorch's product where it is faster). Prefill, and any model that does not fit, go the
way of `target.py` and `drafter.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer

from specextend.cache import KVCache
from specextend.config import RetrievalConfig
from specextend.drafter import ClassicDrafter, TreeDrafter
from specextend.features import FeatureTap
from specextend.kernels import linear, scores, tree_attention
from specextend.kernels.linear import KeyValue, Norm, Placement
from specextend.kernels.tree import TreeBuffers
from specextend.retrieval import Retriever
from specextend.rope import DynamicRope
from specextend.target import Target

MAX_SLOTS = 128  # rows of one tile
HEAD_DIMS = (32, 64, 128)

Choose = Callable[[Tensor, Tensor], Tensor]  # the target's rule: logits [T, V] and depth [T] to tokens [T]


def fits(model: PreTrainedModel) -> bool:
    """Whether the kernels compute what this model's blocks compute."""
    decoder = model.get_decoder()
    is_known = all(isinstance(layer, LlamaDecoderLayer | MistralDecoderLayer) for layer in decoder.layers)
    is_static = not isinstance(decoder.rotary_emb, DynamicRope)
    return is_known and is_static and all(map(block_fits, decoder.layers))


def block_fits(block: nn.Module) -> bool:
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


class Workspaces:
    """Scratch memory of the kernels; launches follow each other on one stream and share it."""

    def __init__(self, device: torch.device):
        self._device = device
        self.linear = linear.Workspace(device)
        self._attention: dict[tuple[int, int, int, int], tree_attention.Workspace] = {}

    def attention(self, heads: int, queries: int, dim: int, splits: int) -> tree_attention.Workspace:
        shape = (heads, queries, dim, splits)
        if shape not in self._attention:
            self._attention[shape] = tree_attention.Workspace(heads, queries, dim, splits, self._device)
        return self._attention[shape]


@dataclass(frozen=True)
class Slots:
    """Who sees whom behind the committed tokens: `count` slots, ancestor bits `words` [T, ceil(count / 32)]."""

    words: Tensor
    count: int

    @classmethod
    def causal(cls, count: int, device: torch.device) -> Slots:
        mask = torch.ones(count, count, dtype=torch.bool, device=device).tril()
        return cls(tree_attention.pack_mask(mask), count)


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


class FusedBlock:
    """One transformer block over T rows."""

    def __init__(self, block: nn.Module, cos: Tensor, sin: Tensor, workspaces: Workspaces):
        attention, mlp = block.self_attn, block.mlp
        self._qkv, self._gate_up = merged(_projections(attention)), merged((mlp.gate_proj, mlp.up_proj))
        self._output, self._down = attention.o_proj.weight, mlp.down_proj.weight
        self._before, self._between = as_norm(block.input_layernorm), as_norm(block.post_attention_layernorm)
        self._scaling = attention.scaling
        self._cos, self._sin, self._workspaces = cos, sin, workspaces
        self.query = self.lse = torch.empty(0)

    def run(
        self, residual: Tensor, slots: Slots, cache: KeyValue, *, entry: Tensor | None = None,
        full: KeyValue | None = None, **where,
    ) -> Tensor:  # fmt: skip
        """Hidden states [T, H] after the block; writes over `residual`, and keys and values into the caches.

        Args:
            residual: [T, H] before the block; entry: what the attention reads, if it is not the residual normed.
            full: a second cache, that keeps keys un-rotated.
            where: `shift`, `step`, `offset` and `depth` of a `Placement`.
        """
        work = self._workspaces.linear
        placement = Placement(self._cos, self._sin, cache.length, **where)
        norm = self._before if entry is None else None
        self.query = linear.rotary(
            residual if entry is None else entry, self._qkv, work, placement, cache, norm=norm, full=full
        )
        heads, rows, _ = self.query.shape
        launch = tree_attention.launch_for(residual.device, len(cache.keys), heads // len(cache.keys) * rows)
        attended, self.lse = tree_attention.tree_attention(
            self.query, cache.keys, cache.values, cache.length, slots.words, self._scaling, slots=slots.count,
            launch=launch, workspace=self._workspaces.attention(*self.query.shape, launch.splits),
        )  # fmt: skip
        residual.addmm_(attended.transpose(0, 1).reshape(rows, -1), self._output.T)
        inner = linear.swiglu(residual, self._gate_up, work, norm=self._between)
        if rows == 1:
            return residual.addmm_(inner, self._down.T)
        return linear.linear(inner, self._down, work, residual=residual)


def as_norm(module: nn.Module) -> Norm | None:
    """An RMSNorm for the kernels; None where EAGLE's blocks have none."""
    return Norm(module.weight, module.variance_epsilon) if hasattr(module, "variance_epsilon") else None


def normed(hidden: Tensor, norm: LlamaRMSNorm) -> Tensor:
    return linear.rms_norm(hidden, norm.weight, norm.variance_epsilon)


def half_tables(rotary: nn.Module, positions: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin [positions, D / 2] of a model's rotary embedding."""
    at = torch.arange(positions, device=device)[None]
    cos, sin = rotary(torch.empty(0, dtype=torch.float32, device=device), at)
    half = cos.shape[-1] // 2
    return cos[0, :, :half].to(dtype).contiguous(), sin[0, :, :half].to(dtype).contiguous()


class Nodes(Protocol):
    """What is verified: a draft tree (`TreeBuffers`), or a root alone.

    Attributes:
        tokens: [T] int64; depth: [T] int32; words: [T, ceil(T / 32)] int32 ancestor bits; slots: T.
    """

    tokens: Tensor
    depth: Tensor
    words: Tensor
    slots: int


class Root:
    """A lone token, autoregressive decoding's tree."""

    slots = 1

    def __init__(self, device: torch.device):
        self.tokens = torch.zeros(1, dtype=torch.int64, device=device)
        self.depth = torch.zeros(1, dtype=torch.int32, device=device)
        self.words = torch.ones(1, 1, dtype=torch.int32, device=device)


class FusedTarget:
    """Verification of up to `MAX_SLOTS` nodes behind the tokens that `Target` committed.

    Args:
        tap: what the draft reads of the hidden states, if it reads any.
    """

    def __init__(self, target: Target, workspaces: Workspaces, slots: int, tap: FeatureTap | None = None):
        model = target.model
        decoder, weight = model.get_decoder(), model.get_output_embeddings().weight
        self._target, self.cache = target, StaticCache(target.cache)
        self._embedding, self._norm = decoder.embed_tokens, decoder.norm
        tables = half_tables(decoder.rotary_emb, self.cache.keys.shape[2], model.dtype, model.device)
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
        slots = Slots(tree.words, tree.slots)
        hidden = self._embedding(tree.tokens)
        for index, block in enumerate(self._blocks):
            self._keep(hidden, index)
            hidden = block.run(hidden, slots, self.cache.layer(index), depth=tree.depth)
        self._keep(hidden, len(self._blocks))
        self.query[:, : tree.slots] = self._blocks[-1].query
        self.lse[:, : tree.slots] = self._blocks[-1].lse
        final = normed(hidden, self._norm)
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


class FusedDraft:
    """A draft's caches on the device: appended to, drafted behind, refilled. What runs over them is a subclass's.

    Args:
        drafter: whose prefill fills the caches; its working cache is at least as large as any round needs.
    """

    target_ids: Tensor | None = None  # [V_draft] target id of every draft id, where the vocabularies differ

    def __init__(self, drafter: TreeDrafter, tree: TreeBuffers, rotary: nn.Module, dtype: torch.dtype):
        cache = drafter.cache
        self.working = StaticCache(cache.working)
        self.full = StaticCache(cache.full) if cache.full is not None else None
        self._tree, device = tree, self.working.keys.device
        self._tables = half_tables(rotary, self.working.keys.shape[2], dtype, device)
        self._newest = Slots.causal(len(tree.emitted), device)

    @property
    def is_current(self) -> bool:
        return self.working.is_current and (self.full is None or self.full.is_current)

    def take_over(self) -> None:
        for cache in self._caches:
            cache.take_over()

    def catch_up(self) -> Tensor:
        """Read the tokens of the last verdict; logits [1, V] after the newest."""
        logits = self._read_newest(self._tree.emitted, self._tree.count)
        for cache in self._caches:
            cache.length += self._tree.count
        return logits

    def expand(self, level: int) -> Tensor:
        """Logits [W, V] after the nodes of `level`, of which the root's children are 0."""
        tree = self._tree
        first = level * tree.width
        slots = Slots(tree.all_words[first : first + tree.width], first + tree.width)
        # the root is committed
        return self._read_level(tree.level_tokens, tree.below, slots, shift=level, step=0, offset=first)

    def take(self, features: Tensor) -> None:
        """Notice what the target's `features` [T, F] of the tree say about the accepted path; most drafts need none."""

    def refresh(self, row: Tensor | None, config: RetrievalConfig) -> None:
        """Fill the working cache with the first and newest chunks of `config`, and those `row` asks for.

        Args:
            row: [S] attention over the context; None asks for nothing.
        """
        assert self.full is not None, "a draft cache that holds the whole context is never refreshed"
        length, size, capacity = self.full.length, config.chunk_size, self.full.keys.shape[2]
        device, chunks = self.full.keys.device, -(-capacity // config.chunk_size)
        index, newest = torch.arange(chunks, device=device), (length - 1) // size
        asked = torch.full((chunks,), float("-inf"), device=device)
        if row is not None:
            row = nn.functional.pad(row, (0, max(0, chunks * size - len(row))))[: chunks * size]
            row = torch.where(torch.arange(len(row), device=device) < length, row, 0.0)
            counts = (length - index * size).clamp(1, size)
            asked = torch.where(index <= newest, row.view(chunks, size).sum(-1) / counts, asked)
        always = ((index < config.sink) | (index > newest - config.recent)) & (index <= newest)
        asked = torch.where(always, float("inf"), asked)
        kept = asked.topk(min(config.top_k, chunks)).indices.sort().values
        positions = (kept[:, None] * size + torch.arange(size, device=device)).flatten()
        # kept chunks stand in order: those that do not exist come last, and only the newest may be short
        there = (positions < length) & (asked[kept] > float("-inf")).repeat_interleave(size)
        at = positions.clamp(max=capacity - 1)
        cos, sin = (table[: len(at)] for table in self._tables)
        low, high = self.full.keys.index_select(2, at).chunk(2, dim=-1)
        self.working.keys[:, :, : len(at)] = torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)
        self.working.values[:, :, : len(at)] = self.full.values.index_select(2, at)
        self.working.length.copy_(there.sum())

    @property
    def _caches(self) -> list[StaticCache]:
        return [self.working] if self.full is None else [self.working, self.full]

    def _full_layer(self, index: int) -> KeyValue | None:
        return None if self.full is None else self.full.layer(index)

    def _read_newest(self, tokens: Tensor, count: Tensor) -> Tensor:
        raise NotImplementedError

    def _read_level(self, tokens: Tensor, below: Tensor, slots: Slots, **where: int) -> Tensor:
        raise NotImplementedError


class FusedClassicDraft(FusedDraft):
    """A small language model."""

    def __init__(self, drafter: ClassicDrafter, tree: TreeBuffers, workspaces: Workspaces):
        model = drafter.model
        decoder = model.get_decoder()
        super().__init__(drafter, tree, decoder.rotary_emb, model.dtype)
        self._embedding = decoder.embed_tokens
        self._blocks = [FusedBlock(layer, *self._tables, workspaces) for layer in decoder.layers]
        self._norm, self._readout = decoder.norm, model.get_output_embeddings().weight

    def _read_newest(self, tokens, count):
        hidden = self._embedding(tokens)
        for index, block in enumerate(self._blocks):
            hidden = block.run(hidden, self._newest, self.working.layer(index), full=self._full_layer(index))
        return self._logits(hidden.index_select(0, (count - 1).reshape(1)))

    def _read_level(self, tokens, below, slots, **where):
        hidden = self._embedding(tokens)
        for index, block in enumerate(self._blocks):
            hidden = block.run(hidden, slots, self.working.layer(index), **where)
        return self._logits(hidden)

    def _logits(self, hidden):
        return normed(hidden, self._norm) @ self._readout.T


class FusedRound:
    """Target and draft with the verdict of the last round between them.

    `begin`, then every round `refresh` if it is due, `draft`, `verify`, `accept`, `read`.
    """

    def __init__(self, target: FusedTarget, draft: FusedDraft, tree: TreeBuffers, max_depth: int):
        self.target, self.drafter, self.tree = target, draft, tree
        self._max_depth = max_depth
        self._chosen = torch.zeros(tree.slots, dtype=torch.int64, device=tree.tokens.device)
        self._report = torch.zeros(2 + len(tree.emitted), dtype=torch.int64, device=tree.tokens.device)

    @property
    def is_current(self) -> bool:
        return self.target.cache.is_current and self.drafter.is_current

    def begin(self, first: Tensor) -> None:
        """Go on from a prefill of both models whose token was `first` []."""
        self.target.take_over()
        self.drafter.take_over()
        self.tree.emitted[0] = first
        self.tree.count.fill_(1)
        self.tree.newest.zero_()

    def refresh(self, retriever: Retriever) -> None:
        """Refill the draft's working cache with what the target attends to, or with the window."""
        row = self.target.attention_row(self.tree.newest) if retriever.reads_attention else None
        self.drafter.refresh(row, retriever.config)

    def draft(self) -> None:
        """Grow a tree below the newest token."""
        tree = self.tree
        root = tree.emitted.index_select(0, (tree.count - 1).reshape(1))
        logits = self.drafter.catch_up()
        tree.begin()
        for level in range(self._max_depth):
            if level:
                logits = self.drafter.expand(level - 1)
            tree.add_level(logits, level, self.drafter.target_ids)
        tree.finish(root)

    def verify(self, choose: Choose) -> None:
        """Let the target choose a token after every node."""
        self._chosen.copy_(choose(self.target.verify(self.tree), self.tree.depth))

    def accept(self) -> None:
        """Keep what the target agrees to."""
        tree, cache = self.tree, self.target.cache
        tree.accept(self._chosen, cache.length)
        tree.compact(cache.keys, cache.values)
        self.drafter.take(self.target.features)
        self._report[0] = tree.used.sum() - 1
        self._report[1] = tree.count
        self._report[2:] = tree.emitted

    def read(self) -> tuple[int, list[int]]:
        """Drafted tokens and the round's tokens, the bonus token last; the one time that the host waits."""
        drafted, count, *emitted = self._report.tolist()
        return drafted, emitted[:count]


class FusedDecoder:
    """Autoregressive decoding by the same launches: the baseline that speedups are measured against."""

    def __init__(self, target: FusedTarget):
        self.target, self.root = target, Root(target.cache.length.device)

    @property
    def is_current(self) -> bool:
        return self.target.cache.is_current

    def begin(self, first: Tensor) -> None:
        self.target.take_over()
        self.root.tokens[0] = first

    def step(self, choose: Choose) -> None:
        """One token."""
        self.root.tokens.copy_(choose(self.target.verify(self.root), self.root.depth))
        self.target.cache.length += 1

    def read(self) -> int:
        return int(self.root.tokens)

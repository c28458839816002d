"""One round of SpecExtend over buffers of fixed shape, without a look at any value from the host.

The same algorithm as `generate.speculative`, `tree.grow` and `verify.accept`, in a form that one CUDA graph can hold
for every length: lengths are tensors on the device, a tree always has all its levels and slots, and what does not count
is masked. The host reads the accepted tokens once, at the end of the round. Nothing here needs a GPU: plain PyTorch
defines it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from specextend.attention import attention_row, masked_attention
from specextend.cache import KVCache
from specextend.config import RetrievalConfig, SpecExtendConfig, TreeConfig
from specextend.drafter import ClassicDrafter, run_unrotated
from specextend.target import Target
from specextend.tree import DraftTree

NEVER = float("-inf")


class StaticAttention(Protocol):
    """How T queries attend to the first `length` tokens of a buffer and to the slots behind them."""

    def prepare(self, mask: Tensor) -> Tensor:
        """The mask [T, K] bool of the slots in the form that calls take; made once for all layers."""

    def __call__(
        self, query: Tensor, keys: Tensor, values: Tensor, length: Tensor, mask: Tensor, slots: int, scaling: float
    ) -> tuple[Tensor, Tensor]:
        """Output [1, H, T, D] and lse [1, H, T] for `query` [1, H, T, D], `keys` and `values` [H_kv, S, D]."""


class PlainStaticAttention:
    """The definition: all scores over the whole buffer, what does not count masked."""

    def prepare(self, mask: Tensor) -> Tensor:
        return mask

    def __call__(self, query, keys, values, length, mask, slots, scaling):
        position = torch.arange(keys.shape[1], device=keys.device)
        slot = position - length
        in_tree = (slot >= 0) & (slot < slots)
        visible = (position < length) | (in_tree & mask[:, slot.clamp(0, slots - 1)])
        values = torch.where((slot < slots)[:, None], values, 0.0)  # beyond may be anything, and 0 * nan is nan
        groups = query.shape[1] // keys.shape[0]
        expanded = (part.repeat_interleave(groups, 0)[None] for part in (keys, values))
        return masked_attention(query, *expanded, scaling, visible)


class StaticCache:
    """The buffer of a `KVCache` with its length on the device."""

    def __init__(self, cache: KVCache):
        self.keys, self.values = cache.buffer[0, :, 0], cache.buffer[1, :, 0]  # [L, H_kv, S, D]
        self.length = torch.tensor(cache.length, device=self.keys.device)

    def write(self, layer: int, key: Tensor, value: Tensor, first: Tensor) -> None:
        """Put `key` and `value` [1, H_kv, T, D] at positions first .. first + T - 1."""
        positions = first + torch.arange(key.shape[2], device=key.device)
        self.keys[layer].index_copy_(1, positions, key[0])
        self.values[layer].index_copy_(1, positions, value[0])

    def compact(self, path: Tensor) -> None:
        """Move the scratch rows `path` [P] (offsets from the length) to the front of the scratch."""
        front = self.length + torch.arange(len(path), device=path.device)
        for part in (self.keys, self.values):
            part.index_copy_(2, front, part.index_select(2, self.length + path))


@dataclass(frozen=True)
class StaticTree:
    """A draft tree of exactly `nodes` + 1 slots.

    Attributes:
        tokens, parents, depth, ancestors: as of `DraftTree`; node 0 is the root.
        used: [T] bool; slots that are not used hold paths of probability 0 and are never accepted.
    """

    tokens: Tensor
    parents: Tensor
    depth: Tensor
    ancestors: Tensor
    used: Tensor

    def as_tree(self) -> DraftTree:
        """The used part, for comparison; reads from the device."""
        kept = self.used.nonzero()[:, 0]
        place = torch.full_like(self.parents, -1).scatter_(0, kept, torch.arange(len(kept), device=kept.device))
        above = self.parents[kept]
        parents = torch.where(above >= 0, place[above.clamp(min=0)], -1)
        return DraftTree(self.tokens[kept], parents, self.depth[kept], self.ancestors[kept][:, kept])


def grow(
    root: Tensor, logprobs: Tensor, expand: Callable[[Tensor, int, Tensor], Tensor], config: TreeConfig
) -> StaticTree:
    """`tree.grow` with every level run: one that comes after the stop rule has spoken counts for nothing.

    Args:
        root: [] token; logprobs: [1, V] after it.
        expand: (tokens [W], depth, visible [W, depth * W]) -> log-probabilities [W, V] after a level's W nodes.
    """
    width, device = min(config.nodes, logprobs.shape[1]), root.device
    own = torch.eye(width, dtype=torch.bool, device=device)
    above = torch.zeros(1, dtype=logprobs.dtype, device=device)  # path scores of the level before
    visible = torch.empty(1, 0, dtype=torch.bool, device=device)
    tokens, parents, scores, sight = [], [], [], []
    alive, expected = torch.ones((), dtype=torch.bool, device=device), torch.zeros((), device=device)
    floor = torch.tensor(config.min_probability, device=device).log()

    for depth in range(1, config.max_depth + 1):
        if depth > 1:
            logprobs = expand(tokens[-1], depth - 1, visible)
        values, children = logprobs.topk(width, dim=-1)
        values = (values.clamp(max=0) + above[:, None]).flatten()
        index = values.sort(descending=True, stable=True).indices[:width].sort().values
        above = values[index]
        below = index // width
        tokens.append(children.flatten()[index])
        parents.append(below + 1 + (depth - 2) * width if depth > 1 else torch.zeros_like(below))
        scores.append(torch.where(alive & (above >= floor), above, NEVER))
        visible = torch.cat((visible[below], own), dim=1)
        sight.append(nn.functional.pad(visible, (0, (config.max_depth - depth) * width)))
        total = torch.cat(scores).topk(min(config.nodes, depth * width)).values.exp().sum()
        alive = alive & (total - expected >= config.threshold)
        expected = torch.where(alive, total, expected)

    # candidate c is node c + 1 of the tree of all candidates, whose node 0 is the root
    all_scores = torch.cat((torch.zeros(1, device=device), torch.cat(scores)))
    kept = all_scores.sort(descending=True, stable=True).indices[: config.nodes + 1].sort().values
    ancestors = nn.functional.pad(torch.cat(sight), (1, 0, 1, 0), value=True)
    ancestors[0, 1:] = False
    all_parents = torch.cat((torch.full((1,), -1, device=device), torch.cat(parents)))
    place = torch.zeros_like(all_parents).scatter_(0, kept, torch.arange(len(kept), device=device))
    above = all_parents[kept]
    return StaticTree(
        tokens=torch.cat((root.reshape(1), torch.cat(tokens)))[kept],
        parents=torch.where(above >= 0, place[above.clamp(min=0)], -1),
        depth=(kept + width - 1) // width,
        ancestors=ancestors[kept][:, kept],
        used=all_scores[kept] > NEVER,
    )


@dataclass(frozen=True)
class StaticAccepted:
    """The verdict on a tree, in slots for the longest possible path.

    Attributes:
        path: [P] accepted nodes, root first; beyond `count` anything.
        emitted: [P] accepted draft tokens, then the bonus token; beyond `count` anything.
        count: [] nodes on the path, tokens emitted.
    """

    path: Tensor
    emitted: Tensor
    count: Tensor


def accept(tree: StaticTree, chosen: Tensor, max_depth: int) -> StaticAccepted:
    """`verify.accept`: follow the target's choices [T] down the tree."""
    matches = tree.used & (tree.tokens == chosen[tree.parents.clamp(min=0)])
    matches[0] = True
    on_path = (matches | ~tree.ancestors).all(dim=-1) & tree.used
    path = (~on_path).to(torch.int8).sort(stable=True).indices[: max_depth + 1]
    count = on_path.sum()
    drafted = torch.cat((tree.tokens[path[1:]], chosen[path[-1:]]))  # shifted: token after each node of the path
    last = torch.arange(len(path), device=path.device) == count - 1
    return StaticAccepted(path, torch.where(last, chosen[path], drafted), count)


class StaticTarget:
    """Verification by an unmodified model over a static cache; remembers what the attention row needs."""

    def __init__(self, model: PreTrainedModel, cache: StaticCache, attention: StaticAttention):
        self.model, self.cache, self._attention = model, cache, attention
        self._query = self._lse = torch.empty(0)
        self._scaling = 1.0

    def remember(self, query: Tensor, lse: Tensor, scaling: float) -> None:
        """Last-layer queries [1, H, T, D] and lse of a run elsewhere: the prefill's."""
        self._query, self._lse, self._scaling = query, lse, scaling

    def verify(self, tree: StaticTree) -> Tensor:
        """Logits [T, V] after every node."""
        mask, slots = self._attention.prepare(tree.ancestors), len(tree.tokens)

        def attend(layer, query, key, value, scaling):
            self.cache.write(layer, key, value, self.cache.length)
            output, lse = self._attention(
                query, self.cache.keys[layer], self.cache.values[layer], self.cache.length, mask, slots, scaling
            )
            self.remember(query, lse, scaling)  # the last layer's stays
            return output

        positions = self.cache.length + tree.depth
        return self.model(
            input_ids=tree.tokens[None], position_ids=positions[None], use_cache=False, attend=attend
        ).logits[0]

    def commit(self, accepted: StaticAccepted) -> None:
        self.cache.compact(accepted.path)
        self.cache.length += accepted.count

    def attention_row(self, newest: Tensor) -> Tensor:
        """`Target.attention_row` over the whole buffer [S], 0 beyond the committed tokens.

        Args:
            newest: [] node of the tree just verified that was accepted last.
        """
        weights = attention_row(self._query[0, :, newest], self._lse[0, :, newest], self.cache.keys[-1], self._scaling)
        committed = torch.arange(len(weights), device=weights.device) < self.cache.length
        return torch.where(committed, weights, 0.0)


class StaticDraft:
    """A small language model over a full, un-rotated cache and a working, rotated one.

    Args:
        full: None where the working cache is the whole context.
        cos, sin: [S_w, D] tables of the draft's rotary embedding, the sign of rotate-half folded into sin.
    """

    def __init__(
        self, model: PreTrainedModel, full: StaticCache | None, working: StaticCache, attention: StaticAttention,
        cos: Tensor, sin: Tensor, vocab_size: int,
    ):  # fmt: skip
        self._model, self._readout = model, model.get_output_embeddings()
        self.full, self.working = full, working
        self._attention, self._cos, self._sin, self._vocab_size = attention, cos, sin, vocab_size

    def catch_up(self, emitted: Tensor, count: Tensor) -> Tensor:
        """Read the first `count` of `emitted` [P]; log-probabilities [1, V] after the last of them."""
        causal = torch.ones(len(emitted), len(emitted), dtype=torch.bool, device=emitted.device).tril()
        mask = self._attention.prepare(causal)
        offset = torch.arange(len(emitted), device=emitted.device)

        def attend(layer, query, key, value, scaling):
            if self.full is not None:
                self.full.write(layer, key, value, self.full.length)
            query, key = (self._rotated(part, self.working.length + offset) for part in (query, key))
            self.working.write(layer, key, value, self.working.length)
            return self._attend(layer, query, mask, len(emitted), scaling)

        hidden = run_unrotated(self._model, emitted, attend).index_select(0, (count - 1).reshape(1))
        self.working.length += count
        if self.full is not None:
            self.full.length += count
        return self._logprobs(hidden)

    def expand(self, tokens: Tensor, depth: int, visible: Tensor) -> Tensor:
        """Log-probabilities [W, V] after a level's nodes; `visible` [W, depth * W]."""
        mask, slots = self._attention.prepare(visible), visible.shape[1]
        position = (self.working.length - 1 + depth).expand(len(tokens))  # the root is committed

        def attend(layer, query, key, value, scaling):
            query, key = self._rotated(query, position), self._rotated(key, position)
            self.working.write(layer, key, value, self.working.length + slots - len(tokens))
            return self._attend(layer, query, mask, slots, scaling)

        return self._logprobs(run_unrotated(self._model, tokens, attend))

    def refresh(self, row: Tensor, config: RetrievalConfig) -> None:
        """Fill the working cache with the chunks that `row` [S], the target's attention, asks for."""
        length, size = self.full.length, config.chunk_size
        chunks = -(-len(row) // size)
        position = torch.arange(chunks * size, device=row.device).view(chunks, size)
        inside = position < length
        sums = (nn.functional.pad(row, (0, chunks * size - len(row))).view(chunks, size) * inside).sum(-1)
        index, newest = torch.arange(chunks, device=row.device), (length - 1) // size
        scores = torch.where(index <= newest, sums / inside.sum(-1).clamp(min=1), NEVER)
        always = (index < config.sink) | (index > newest - config.recent)
        scores = torch.where(always & (index <= newest), -NEVER, scores)
        kept = scores.topk(min(config.top_k, chunks)).indices.sort().values
        positions = position[kept].flatten().clamp(max=self.full.keys.shape[2] - 1)
        order = torch.arange(len(positions), device=row.device)
        keys, values = (part.index_select(2, positions) for part in (self.full.keys, self.full.values))
        self.working.keys[:, :, : len(positions)] = self._rotated(keys, order)
        self.working.values[:, :, : len(positions)] = values
        # kept chunks stand in order, and only the newest, the last of them, may be short
        self.working.length.copy_(((position[kept] < length) & (kept <= newest)[:, None]).sum())

    def _attend(self, layer: int, query: Tensor, mask: Tensor, slots: int, scaling: float) -> Tensor:
        keys, values = self.working.keys[layer], self.working.values[layer]
        return self._attention(query, keys, values, self.working.length, mask, slots, scaling)[0]

    def _rotated(self, states: Tensor, positions: Tensor) -> Tensor:
        """`states` [..., T, D] rotated to `positions` [T]."""
        half = states.shape[-1] // 2
        swapped = torch.cat((states[..., half:], states[..., :half]), -1)
        return torch.addcmul(states * self._cos[positions], swapped, self._sin[positions])

    def _logprobs(self, hidden: Tensor) -> Tensor:
        return self._readout(hidden)[:, : self._vocab_size].float().log_softmax(-1)


class StaticRound:
    """Target and draft with the verdict of the last round, ready to be captured: `refresh`, then `run`, then `read`."""

    def __init__(self, target: StaticTarget, draft: StaticDraft, tree: TreeConfig, retrieval: RetrievalConfig):
        self.target, self.draft = target, draft
        self._tree, self._retrieval = tree, retrieval
        device = target.cache.length.device
        self.emitted = torch.zeros(tree.max_depth + 1, dtype=torch.long, device=device)
        self.count = torch.ones((), dtype=torch.long, device=device)
        self.newest = torch.zeros((), dtype=torch.long, device=device)

    @classmethod
    def after_prefill(
        cls, target: Target, drafter: ClassicDrafter, prompt: Tensor, room: int, attention: StaticAttention,
        config: SpecExtendConfig,
    ) -> tuple[StaticRound, int]:  # fmt: skip
        """Prefill both models as the loop does and take over their buffers; the round, and the first token."""
        first = target.prefill(prompt, room).argmax(-1)[0]
        drafter.prefill(prompt, first, room)
        static_target = StaticTarget(target.model, StaticCache(target.cache), attention)
        static_target.remember(*target.last_queries())
        cache = drafter.cache
        working = StaticCache(cache.working)
        cos, sin = cache.rope.tables(working.keys.shape[2])
        full = StaticCache(cache.full) if cache.full is not None else None
        draft = StaticDraft(drafter.model, full, working, attention, cos, sin, drafter.vocab_size)
        captured = cls(static_target, draft, config.tree, config.retrieval)
        captured.emitted[0] = first
        return captured, int(first)

    def refresh(self) -> None:
        self.draft.refresh(self.target.attention_row(self.newest), self._retrieval)

    def run(self) -> None:
        """Draft a tree below the newest token, verify it, keep what is accepted."""
        logprobs = self.draft.catch_up(self.emitted, self.count)
        root = self.emitted.index_select(0, (self.count - 1).reshape(1))[0]
        tree = grow(root, logprobs, self.draft.expand, self._tree)
        chosen = self.target.verify(tree).argmax(-1)
        accepted = accept(tree, chosen, self._tree.max_depth)
        self.newest.copy_(accepted.path.index_select(0, (accepted.count - 1).reshape(1))[0])
        self.target.commit(accepted)
        self.emitted.copy_(accepted.emitted)
        self.count.copy_(accepted.count)

    def read(self) -> list[int]:
        """The round's tokens, the bonus token last; the one time that the host waits."""
        both = torch.cat((self.count.reshape(1), self.emitted)).tolist()
        return both[1 : 1 + both[0]]

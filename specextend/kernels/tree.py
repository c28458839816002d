"""Draft trees on the device in few launches (Triton): best children, growth, the final tree, the verdict, compaction.

The definitions are `tree.grow`, `verify.accept` and `KVCache.commit`, where a level of a tree takes some forty small
operations; here it takes two launches. Ancestors are bits: slot j in bit j % 32 of word j // 32.

"The k best" are found by their k-th value, bit by bit from the highest, which needs no sort; among equals the older
index is kept, as a stable sort would.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from specextend.config import CALIBRATION_CELLS, TreeConfig
from specextend.kernels.tree_attention import pack_mask

WORD = 32
CHUNK = 4096  # logits at a time
ROOM = 1024  # of them that may come close to the best
CELLS = tl.constexpr(CALIBRATION_CELLS)
BITS = {torch.float32: 32, torch.float16: 19, torch.bfloat16: 16}  # of a float32 that holds a value of the dtype


@triton.jit
def _ordered(values, BITS: tl.constexpr):
    """Unsigned integers in the order of float32 `values`, of the BITS leading bits in which they can differ."""
    bits = values.to(tl.uint32, bitcast=True)
    return tl.where(bits >= 0x80000000, bits ^ 0xFFFFFFFF, bits | 0x80000000) >> (32 - BITS)


@triton.jit
def _best(values, count):
    """Which of `values` [X] float32 are the `count` highest, the earlier of equals first, and the place of each."""
    key = _ordered(values, 32)
    lowest = _lowest_of_best(key, count, 32)
    taken, place, _, _ = _take(key, lowest, count - tl.sum((key > lowest).to(tl.int32), 0), 0, 0)
    return taken, place


@triton.jit
def _take(key, lowest, needed, above_so_far, equal_so_far):
    """Which of `key` [X] are above `lowest` or among the first `needed` equal to it, their places, and both counts."""
    above, equal = (key > lowest).to(tl.int32), (key == lowest).to(tl.int32)
    both = tl.cumsum(above * 65536 + equal, 0)  # two counts in one scan
    above_before, equal_before = above_so_far + (both >> 16) - above, equal_so_far + (both & 65535) - equal
    taken = (above == 1) | ((equal == 1) & (equal_before < needed))
    place = above_before + tl.minimum(equal_before, needed)
    return taken, place, above_so_far + tl.sum(above, 0), equal_so_far + tl.sum(equal, 0)


@triton.jit
def _children(
    logits, above, names, close, close_at, tokens, scores, given, bounds, state, vocab, stride, width,
    NAMED: tl.constexpr, CALIBRATED: tl.constexpr, KEPT: tl.constexpr, CHUNK: tl.constexpr, ROOM: tl.constexpr,
    BITS: tl.constexpr,
):  # fmt: skip
    """The `width` most probable tokens after one node, with the scores of the paths to them.

    Logits are dealt out to ROOM lanes. The `width`-th highest of the lanes' highest is a bound below which none of the
    best lies, and in all but made-up rows only a few more than `width` logits reach it: these are put aside, and
    searched instead of the row.
    """
    if tl.load(state) > 0:
        row, index = tl.program_id(0), tl.arange(0, CHUNK)
        at = logits + row.to(tl.int64) * stride
        close += row * ROOM
        close_at += row * ROOM
        highest = tl.full([ROOM], float("-inf"), tl.float32)
        for start in tl.range(0, vocab, CHUNK, num_stages=4):
            x = tl.load(at + start + index, start + index < vocab, float("-inf"))
            lanes = tl.max(tl.reshape(x, [ROOM, CHUNK // ROOM]), 1).to(tl.float32)
            highest = tl.maximum(highest, lanes)
        top = tl.max(highest, 0)
        bound = _lowest_of_best(_ordered(highest, BITS), width, BITS)

        mass = tl.zeros([], tl.float32)
        found = tl.full([], 0, tl.int32)
        for start in tl.range(0, vocab, CHUNK, num_stages=4):
            x = tl.load(at + start + index, start + index < vocab, float("-inf"))
            mass += tl.sum(tl.exp(x.to(tl.float32) - top), 0)
            reaches = ((start + index < vocab) & (_ordered(x.to(tl.float32), BITS) >= bound)).to(tl.int32)
            place = found + tl.cumsum(reaches, 0) - reaches
            tl.store(close + place, x, (reaches == 1) & (place < ROOM))
            tl.store(close_at + place, start + index, (reaches == 1) & (place < ROOM))
            found += tl.sum(reaches, 0)
        normal = top + tl.log(mass)
        tl.debug_barrier()

        fits = found <= ROOM
        count = tl.where(fits, found, vocab)
        source = tl.where(fits, close, at)
        if fits:
            lowest = _lowest_of_best(_keys(close, 0, found, ROOM, BITS), width, BITS)
        else:
            lowest = tl.full([], 0, tl.uint32)
            for bit in range(BITS):
                higher = lowest | (tl.full([], 1, tl.uint32) << (BITS - 1 - bit))
                reach = tl.zeros([ROOM], tl.int32)
                for start in range(0, vocab, ROOM):
                    reach += (_keys(at, start, vocab, ROOM, BITS) >= higher).to(tl.int32)
                lowest = tl.where(tl.sum(reach, 0) >= width, higher, lowest)
        above_lowest = tl.zeros([ROOM], tl.int32)
        for start in range(0, count, ROOM):
            above_lowest += (_keys(source, start, count, ROOM, BITS) > lowest).to(tl.int32)

        needed, path = width - tl.sum(above_lowest, 0), tl.load(above + row)
        above_so_far = tl.full([], 0, tl.int32)
        equal_so_far = tl.full([], 0, tl.int32)
        for start in range(0, count, ROOM):
            lane = start + tl.arange(0, ROOM)
            key = _keys(source, start, count, ROOM, BITS)
            taken, place, above_so_far, equal_so_far = _take(key, lowest, needed, above_so_far, equal_so_far)
            taken = taken & (lane < count)
            token = tl.where(fits, tl.load(close_at + lane, taken & fits, 0), lane)
            if NAMED:
                token = tl.load(names + token, taken, 0).to(tl.int32)
            tl.store(tokens + row * KEPT + place, token, taken)
            score = tl.minimum(tl.load(source + lane, taken, 0.0).to(tl.float32) - normal, 0.0)
            if CALIBRATED:
                tl.store(given + row * KEPT + place, score, taken)
                score = _worth(score, bounds + 2, taken)
            tl.store(scores + row * KEPT + place, score + path, taken)


@triton.jit
def _worth(given, table, taken):
    """Log-probability of acceptance where the draft gives `given`, by a `Calibration.table`."""
    cell = tl.minimum((tl.sqrt(-given) * 4).to(tl.int32), CELLS - 1)
    start, end = cell * 0.25, (cell + 1) * 0.25
    share = tl.minimum((-given - start * start) / (end * end - start * start), 1.0)
    low = tl.load(table + cell, taken, 0.0)
    high = tl.load(table + cell + 1, taken, 0.0)
    return low + share * (high - low) + tl.minimum(given + CELLS * CELLS * 0.0625, 0.0)


@triton.jit
def _keys(source, start, count, SIZE: tl.constexpr, BITS: tl.constexpr):
    """`_ordered` of SIZE values from `start`, those beyond `count` the lowest of all."""
    lane = start + tl.arange(0, SIZE)
    return _ordered(tl.load(source + lane, lane < count, float("-inf")).to(tl.float32), BITS)


@triton.jit
def _lowest_of_best(key, count, BITS: tl.constexpr):
    """The `count`-th highest of `key` [X]; 0 if there are fewer."""
    lowest = tl.full([], 0, tl.uint32)
    for step in range((BITS + 1) // 2):  # two bits at a time: three counts in one sum
        one = tl.full([], 1, tl.uint32) << ((BITS + 1) // 2 * 2 - 2 - 2 * step)
        first, second, third = lowest + one, lowest + 2 * one, lowest + 3 * one
        reach = (key >= first).to(tl.int64) + ((key >= second).to(tl.int64) << 20) + ((key >= third).to(tl.int64) << 40)
        counts = tl.sum(reach, 0)
        lowest = tl.where((counts & 0xFFFFF) >= count, first, lowest)
        lowest = tl.where(((counts >> 20) & 0xFFFFF) >= count, second, lowest)
        lowest = tl.where((counts >> 40) >= count, third, lowest)
    return lowest


@triton.jit
def _level(
    child_tokens, child_scores, child_given, level_tokens, below, above, tokens, parents, scores, given, words,
    bounds, state, level, wide, width, nodes,
    CALIBRATED: tl.constexpr, KEPT: tl.constexpr, WORDS: tl.constexpr, PADDED: tl.constexpr, SIZE: tl.constexpr,
    ALL: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Keep the `width` best of a level's `wide` * `width` candidates, write them down, and see whether it goes on.

    Once the stop rule has spoken, a level's slots hold paths of probability 0, and nothing else changes.
    """
    lane, first = tl.arange(0, LANES), level * width  # of this level's slots among all levels'
    is_lane = lane < width
    if tl.load(state) <= 0:
        tl.store(scores + first + lane, tl.full([LANES], float("-inf"), tl.float32), is_lane)
    else:
        index = tl.arange(0, SIZE)
        row, column = index // width, index % width
        is_child = row < wide
        score = tl.load(child_scores + row * KEPT + column, is_child, float("-inf"))
        taken, place = _best(score, width)
        taken = taken & is_child
        token = tl.load(child_tokens + row * KEPT + column, taken, 0).to(tl.int64)
        tl.store(level_tokens + place, token, taken)
        tl.store(below + place, row.to(tl.int64), taken)
        tl.store(above + place, score, taken)
        tl.store(tokens + first + place, token, taken)
        tl.store(parents + first + place, tl.where(level > 0, row + 1 + first - width, 0), taken)
        tl.store(scores + first + place, tl.where(score >= tl.load(bounds + 1), score, float("-inf")), taken)
        if CALIBRATED:
            tl.store(given + first + place, tl.load(child_given + row * KEPT + column, taken, 0.0), taken)
        tl.debug_barrier()

        parent = tl.load(below + lane, is_lane, 0)
        slot = first + lane
        w = tl.arange(0, PADDED)[None, :]
        is_word = is_lane[:, None] & (w < WORDS)
        inherited = tl.load(words + (first - width + parent)[:, None] * WORDS + w, is_word & (level > 0), 0)
        own = tl.where((slot // 32)[:, None] == w, (1 << (slot % 32))[:, None], 0)
        tl.store(words + slot[:, None] * WORDS + w, inherited | own, is_word)

        every = tl.arange(0, ALL)
        everything = tl.load(scores + every, every < first + width, float("-inf"))
        best, _ = _best(everything, tl.minimum(nodes, first + width))
        total = tl.sum(tl.where(best, tl.exp(everything), 0.0), 0)
        expected = tl.load(state + 1)
        tl.debug_barrier()
        tl.store(state + 2, level + 1.0)
        if total - expected >= tl.load(bounds):
            tl.store(state + 1, total)
        else:
            tl.store(state, 0.0)


@triton.jit
def _tree(
    root, tokens, parents, scores, given, words, kept, order,
    tree_tokens, tree_parents, tree_depth, tree_used, tree_words, sheet, state,
    candidates, width, slots,
    CALIBRATED: tl.constexpr, WORDS: tl.constexpr, TREE_WORDS: tl.constexpr, ALL: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """The `slots` best of root and candidates, in order; candidate c is node c + 1 of all, the root node 0."""
    node = tl.arange(0, ALL)
    is_node = node <= candidates
    score = tl.load(scores + node - 1, is_node & (node > 0), float("-inf"))
    score = tl.where(node == 0, float("inf"), score)
    taken, place = _best(score, slots)
    tl.store(kept + place, node, taken)
    tl.store(order + node, place, is_node)
    tl.debug_barrier()

    slot = tl.arange(0, SLOTS)
    is_slot = slot < slots
    at = tl.load(kept + slot, is_slot, 0)
    is_child = is_slot & (at > 0)
    token = tl.load(tokens + at - 1, is_child, 0)
    tl.store(tree_tokens + slot, tl.where(at > 0, token, tl.load(root)), is_slot)
    parent = tl.load(order + tl.load(parents + at - 1, is_child, 0), is_child, -1)
    tl.store(tree_parents + slot, parent, is_slot)
    tl.store(tree_depth + slot, (at + width - 1) // width, is_slot)
    reached = tl.load(scores + at - 1, is_child, 0.0)  # the root always is
    tl.store(tree_used + slot, (reached > float("-inf")).to(tl.int32), is_slot)
    if CALIBRATED:
        tl.store(sheet, tl.load(state))
        tl.store(sheet + 1, tl.load(state + 2))
        sheet += 2
        tl.store(sheet + slot, token.to(tl.float32), is_slot)
        tl.store(sheet + slots + slot, parent.to(tl.float32), is_slot)
        tl.store(sheet + 2 * slots + slot, ((at + width - 1) // width).to(tl.float32), is_slot)
        tl.store(sheet + 3 * slots + slot, tl.load(given + at - 1, is_child, 0.0), is_slot)
        tl.store(sheet + 4 * slots + slot, reached, is_slot)

    for w in range(TREE_WORDS):
        bit = tl.arange(0, 32)
        other = w * 32 + bit
        ancestor = tl.load(kept + other, other < slots, 0) - 1  # candidate in question; -1 is the root
        word = tl.load(
            words + (at - 1)[:, None] * WORDS + (ancestor // 32)[None, :],
            is_child[:, None] & (ancestor >= 0)[None, :] & (other < slots)[None, :],
            0,
        )
        seen = ((word >> (ancestor % 32)[None, :]) & 1) == 1
        seen = seen | ((other == 0)[None, :] & is_slot[:, None])
        tl.store(tree_words + slot * TREE_WORDS + w, tl.sum(seen.to(tl.int32) << bit[None, :], 1), is_slot)


@triton.jit
def _accept(
    tokens, parents, used, words, chosen, path, drafted, emitted, count, newest, start, length, slots,
    WORDS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Follow the target's choices down the tree; `start` gets the old length, `length` the new one."""
    slot = tl.arange(0, SLOTS)
    is_slot = slot < slots
    parent = tl.load(parents + slot, is_slot, -1)
    wanted = tl.load(chosen + parent, is_slot & (parent >= 0), -1)
    used_ = tl.load(used + slot, is_slot, 0) > 0
    matches = used_ & ((slot == 0) | (tl.load(tokens + slot, is_slot, -2) == wanted))
    on_path = used_
    for w in range(WORDS):
        bits = tl.sum(tl.where((slot // 32 == w) & matches, 1 << (slot % 32), 0), 0)
        word = tl.load(words + slot * WORDS + w, is_slot, 0)
        on_path = on_path & ((word & ~bits) == 0)
    place = tl.cumsum(on_path.to(tl.int32), 0) - 1
    total = tl.sum(on_path.to(tl.int32), 0)
    tl.store(path + place, slot.to(tl.int64), on_path)
    tl.store(emitted + place, tl.load(chosen + slot, is_slot, 0), on_path)
    tl.store(newest, tl.max(tl.where(on_path, slot, 0), 0).to(tl.int64))
    tl.store(drafted, tl.sum(used_.to(tl.int64), 0) - 1)
    tl.store(count, total.to(tl.int64))
    known = tl.load(length)
    tl.debug_barrier()
    tl.store(start, known)
    tl.store(length, known + total)


@triton.jit
def _compact(
    keys, values, path, count, start, layer_stride, head_stride, row_stride,
    PATH: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Move one head's rows `path` to the front of the scratch; all are read before one is written."""
    base = tl.program_id(0).to(tl.int64) * layer_stride + tl.program_id(1).to(tl.int64) * head_stride
    step, dim = tl.arange(0, PATH), tl.arange(0, DIM)
    moves = step < tl.load(count)
    first = tl.load(start)
    source = base + (first + tl.load(path + step, moves, 0))[:, None] * row_stride + dim[None, :]
    target = base + (first + step)[:, None] * row_stride + dim[None, :]
    k = tl.load(keys + source, moves[:, None])
    v = tl.load(values + source, moves[:, None])
    tl.debug_barrier()
    tl.store(keys + target, k, moves[:, None])
    tl.store(values + target, v, moves[:, None])


class TreeNodes:
    """A tree of a fixed number of slots on the device, and the verdict on it; a captured graph keeps pointing at both.

    Args:
        slots: T, the root included.
        depth: of the deepest path; P = depth + 1 tokens at most come out of a round.
        verdict: nodes that are judged in this one's stead in other rounds, and share what is said of the verdict.
    Attributes:
        tokens: [T] int64, parents, depth, used: [T] int32, ancestor_bits: [T, ceil(T / 32)] int32 of the tree.
        fields: all of these in one piece.
        path, emitted: [P] int64, count, newest: [] int64 of the verdict; beyond `count` anything.
        report: [2 + P] int64, what the host reads of a round: drafted nodes, `count`, `emitted`.
    """

    def __init__(self, slots: int, depth: int, device: torch.device, verdict: TreeNodes | None = None):
        self.slots = slots
        words = -(-slots // WORD)
        self.fields = _zeros(device, slots * (5 + words))  # one piece of memory, so that one copy fills it
        self._staged = torch.zeros(len(self.fields), dtype=torch.int32, pin_memory=device.type == "cuda")
        self.tokens = self.fields[: 2 * slots].view(torch.int64)
        self.parents, self.depth, self.used = self.fields[2 * slots : 5 * slots].view(3, slots)
        self.ancestor_bits = self.fields[5 * slots :].view(slots, words)
        steps = min(depth + 1, slots)
        if verdict is None:
            self.path, self.report = (_zeros(device, size, dtype=torch.int64) for size in (steps, 2 + steps))
            self.newest, self.start = (_zeros(device, dtype=torch.int64) for _ in range(2))
        else:
            self.path, self.report = verdict.path, verdict.report
            self.newest, self.start = verdict.newest, verdict.start
        self.drafted, self.count, self.emitted = self.report[0], self.report[1], self.report[2:]

    @classmethod
    def chain(cls, length: int, device: torch.device) -> TreeNodes:
        """A root and `length` nodes below each other, all of them used; a lone root is always the newest token."""
        chain = cls(length + 1, length, device)
        chain.depth.copy_(torch.arange(length + 1))
        chain.parents.copy_(chain.depth - 1)
        chain.used.fill_(1)
        chain.ancestor_bits.copy_(pack_mask(torch.ones(length + 1, length + 1, dtype=torch.bool).tril()))
        if not length:
            chain.tokens = chain.emitted
        return chain

    def put_chain(self, tokens: Tensor, chain: TreeNodes) -> None:
        """Hold `tokens` [n] below each other, as the `chain` of as many slots does, whose own tokens fill the rest."""
        self.fields.copy_(chain.fields)
        self.tokens[: len(tokens)] = tokens

    def begin(self, first: Tensor) -> None:
        """Start a generation: `first` [] is the newest token."""
        self.emitted[0] = first
        self.count.fill_(1)
        self.newest.zero_()

    def put(self, tokens: NDArray, parents: NDArray, depth: NDArray, ancestor_bits: Sequence[int]) -> None:
        """Hold a tree that the host has decided on: fields [T] as of `HostTree`, T slots at most.

        It is copied in the device's queue: put the next one when the host has waited for this one.
        """
        count, slots, size = len(tokens), self.slots, 4 * self.ancestor_bits.shape[1]
        fields = self._staged.numpy()
        fields[:] = 0
        fields[: 2 * count].view(np.int64)[:] = tokens
        rows = fields[2 * slots : 5 * slots].reshape(3, slots)
        rows[0, :count], rows[1, :count], rows[2, :count] = parents, depth, 1
        packed = b"".join([bits.to_bytes(size, "little") for bits in ancestor_bits])
        fields[5 * slots :][: count * size // 4] = np.frombuffer(packed, dtype=np.int32)
        self.fields.copy_(self._staged, non_blocking=True)

    @property
    def root(self) -> Tensor:
        """[1] the newest token."""
        return self.emitted.index_select(0, (self.count - 1).reshape(1))

    def accept(self, chosen: Tensor, length: Tensor) -> None:
        """The verdict of the target's choices `chosen` [T] int64; adds the accepted to `length` [] in place."""
        _accept[(1,)](
            self.tokens, self.parents, self.used, self.ancestor_bits, chosen, self.path, self.drafted, self.emitted,
            self.count, self.newest, self.start, length, self.slots,
            WORDS=self.ancestor_bits.shape[1], SLOTS=triton.next_power_of_2(self.slots), num_warps=1,
        )  # fmt: skip

    def append(self, chosen: Tensor, length: Tensor) -> None:
        """The verdict on a root alone: its successor `chosen` [1] int64 joins what was `emitted` and not read yet."""
        self.start.copy_(length)
        self.emitted.index_copy_(0, self.count.reshape(1), chosen)
        self.count += 1
        length += 1
        self.newest.zero_()
        self.path[:1].zero_()
        self.drafted.zero_()

    def compact(self, keys: Tensor, values: Tensor) -> None:
        """Move the accepted rows of `keys` and `values` [L, H_kv, S, D] to the front of the scratch."""
        if self.slots == 1:
            return
        layers, heads, _, dim = keys.shape
        assert keys.stride() == values.stride()
        _compact[(layers, heads)](
            keys, values, self.path, self.count, self.start, keys.stride(0), keys.stride(1), keys.stride(2),
            PATH=triton.next_power_of_2(len(self.path)), DIM=dim, num_warps=2,
        )  # fmt: skip


class TreeBuffers(TreeNodes):
    """What growing trees of one `TreeConfig` needs besides."""

    def __init__(self, config: TreeConfig, vocab_size: int, device: torch.device):
        self._nodes, self._vocab_size = config.nodes, vocab_size
        self.is_read = config.rule == "price"  # the host decides what of the tree is verified
        assert vocab_size <= 1 << 24, "a float32 must hold every token"
        floor = math.log(config.min_probability) if config.min_probability else -math.inf
        # threshold, floor, and a table of what the draft's probabilities are worth: a captured graph reads them here
        self.bounds = torch.tensor([config.threshold, floor, *[0.0] * (CALIBRATION_CELLS + 1)], device=device)
        self.width = width = min(config.nodes, vocab_size)
        every = width * config.max_depth
        super().__init__(min(config.nodes, every) + 1, config.max_depth, device)
        self.kept_per_row = triton.next_power_of_2(width)
        self.child_tokens = _zeros(device, width, self.kept_per_row)
        self.child_scores = _zeros(device, width, self.kept_per_row, dtype=torch.float32)
        self.child_given = torch.zeros_like(self.child_scores)
        self._close_at = _zeros(device, width, ROOM)
        self.level_tokens = _zeros(device, width, dtype=torch.int64)
        self.below = _zeros(device, width, dtype=torch.int64)
        self.above = _zeros(device, width, dtype=torch.float32)
        self.all_tokens, self.all_parents = _zeros(device, every, dtype=torch.int64), _zeros(device, every)
        self.all_scores, self.all_given = (_zeros(device, every, dtype=torch.float32) for _ in range(2))
        self.state = _zeros(device, 3, dtype=torch.float32)  # still grows, expected length, levels
        self.all_ancestor_bits = _zeros(device, every, -(-every // WORD))
        self.kept, self.order = _zeros(device, self.slots), _zeros(device, every + 1)
        self._fresh = torch.tensor([1.0, 0.0, 0.0], device=device)
        # still grows, levels, then tokens, parents, depth, logprobs and reach of each slot; where the host sees them
        self.sheet = _zeros(device, 2 + 5 * self.slots, dtype=torch.float32)
        self.seen = torch.zeros(len(self.sheet), pin_memory=device.type == "cuda")

    def sprout(self) -> None:
        """Start a new tree; levels that are never added hold nothing."""
        self.above.zero_()
        self.all_scores.fill_(-math.inf)
        self.state.copy_(self._fresh)

    def grows(self) -> bool:
        """Whether the stop rule lets another level come; the host waits for it."""
        return bool(self.state[0] > 0)

    def show(self) -> None:
        """Let the host see the sheet once the device has come so far."""
        self.seen.copy_(self.sheet, non_blocking=True)

    def look(self) -> bool:
        """Let the host see the sheet of the tree as `finish` left it; whether the stop rule lets another level come."""
        self.show()
        if self.sheet.is_cuda:
            torch.cuda.current_stream(self.sheet.device).synchronize()
        return bool(self.seen[0] > 0)

    def add_level(self, logits: Tensor, level: int, names: Tensor | None = None) -> None:
        """Level `level` (0 is the root's children) from the `logits` [n, V] after the nodes of the level before.

        Args:
            names: [V] token of every column, where it is not the column itself.
        """
        wide, vocab = 1 if level == 0 else self.width, self._vocab_size
        close = logits.new_empty(wide, ROOM)
        _children[(wide,)](
            logits, self.above, logits if names is None else names, close, self._close_at, self.child_tokens,
            self.child_scores, self.child_given, self.bounds, self.state, vocab, logits.stride(0), self.width,
            NAMED=names is not None, CALIBRATED=self.is_read,
            KEPT=self.kept_per_row, CHUNK=min(CHUNK, max(ROOM, triton.next_power_of_2(vocab))), ROOM=ROOM,
            BITS=BITS[logits.dtype], num_warps=8,
        )  # fmt: skip
        words = self.all_ancestor_bits.shape[1]
        _level[(1,)](
            self.child_tokens, self.child_scores, self.child_given, self.level_tokens, self.below, self.above,
            self.all_tokens, self.all_parents, self.all_scores, self.all_given, self.all_ancestor_bits,
            self.bounds, self.state, level, wide, self.width, self._nodes, CALIBRATED=self.is_read,
            KEPT=self.kept_per_row, WORDS=words, PADDED=triton.next_power_of_2(words),
            SIZE=triton.next_power_of_2(self.width * wide),
            ALL=triton.next_power_of_2(len(self.all_scores)), LANES=self.kept_per_row, num_warps=8,
        )  # fmt: skip

    def finish(self, root: Tensor) -> None:
        """The tree below `root` [] out of all levels."""
        every = len(self.all_scores)
        _tree[(1,)](
            root, self.all_tokens, self.all_parents, self.all_scores, self.all_given, self.all_ancestor_bits,
            self.kept, self.order, self.tokens, self.parents, self.depth, self.used, self.ancestor_bits, self.sheet,
            self.state, every, self.width, self.slots, CALIBRATED=self.is_read,
            WORDS=self.all_ancestor_bits.shape[1], TREE_WORDS=self.ancestor_bits.shape[1],
            ALL=triton.next_power_of_2(every + 1), SLOTS=triton.next_power_of_2(self.slots), num_warps=4,
        )  # fmt: skip


def _zeros(device: torch.device, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.zeros(*shape, dtype=dtype, device=device) if shape else torch.zeros((), dtype=dtype, device=device)

"""`FusedTarget` on one rank's share of the heads and neurons: two sums over ranks per block, for CUDA graphs.

A block is  q/k/v, rotation, into the cache | attention | o | sum, norm | gate/up, SiLU | down | sum, norm.  The norm
that opens the next block belongs to the sum before it, so that a sharded block has no more launches than a whole one.
How sums are taken is a `Reducer`'s business: by the process group's all-reduce, or straight from the peers' memory.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _symmetric_memory as symmetric
from transformers import PreTrainedModel

from specextend.kernels import linear, reduce
from specextend.kernels.elementwise import KeyValue, Norm, rms_norm
from specextend.kernels.tree import TreeNodes
from specextend.modeling.cache import KVCache
from specextend.modeling.fused_target import FusedTarget
from specextend.modeling.llama_blocks import FusedBlock, Slots, Workspaces, as_norm

PATIENCE_MS = 60_000  # of a rank that waits for its peers' parts, while they compile their kernels, say


class Reducer(Protocol):
    """Sums over ranks."""

    def part(self, rows: int) -> Tensor:
        """Where this rank's part of the next sum goes, [T, H]."""

    def add_and_norm(self, residual: Tensor, norm: Norm) -> Tensor:
        """Add all ranks' parts to `residual` [T, H], in place; the sum normed [T, H]."""

    def gather(self, logits: Tensor) -> Tensor:
        """[T, V] of all ranks' `logits` [T, V / R]."""


class GroupReducer:
    """By the process group: NCCL on GPUs, gloo on CPUs.

    Args:
        rows: most rows of a sum.
    """

    def __init__(self, rows: int, hidden: int, dtype: torch.dtype, device: torch.device):
        self._parts = torch.zeros(rows, hidden, dtype=dtype, device=device)
        self._rows = rows

    def part(self, rows: int) -> Tensor:
        self._rows = rows
        return self._parts[:rows]

    def add_and_norm(self, residual: Tensor, norm: Norm) -> Tensor:
        part = self._parts[: self._rows]
        dist.all_reduce(part)
        return rms_norm(residual.add_(part), norm)

    def gather(self, logits: Tensor) -> Tensor:
        shares = [torch.empty_like(logits) for _ in range(dist.get_world_size())]
        dist.all_gather(shares, logits)
        return torch.cat(shares, dim=1)


class PeerReducer:
    """By reading the peers' memory over NVLink (PyTorch's symmetric memory), without NVLink's multicast.

    Parts alternate between two buffers, so that ranks need to meet once per sum: whoever has met the others at a sum
    knows that all have read the sum before it.

    Args:
        vocab: of one rank's share of the readout.
        signals: ranks meet inside the kernel that sums; otherwise at a barrier launched before it.
    """

    def __init__(
        self, rows: int, hidden: int, vocab: int, dtype: torch.dtype, device: torch.device, *, signals: bool
    ):  # fmt: skip
        group, self._turn, self._rows = dist.group.WORLD, 0, rows
        sizes = {"even": (rows, hidden), "odd": (rows, hidden), "logits": (rows, vocab)}
        self._mine = {name: symmetric.empty(size, dtype=dtype, device=device) for name, size in sizes.items()}
        self._handles = {name: symmetric.rendezvous(mine, group) for name, mine in self._mine.items()}
        self._peers = {
            name: [handle.get_buffer(rank, sizes[name], dtype) for rank in range(dist.get_world_size())]
            for name, handle in self._handles.items()
        }
        self._addresses = {
            name: torch.tensor([peer.data_ptr() for peer in peers], device=device)
            for name, peers in self._peers.items()
        }
        self._signals = self._make_signals(rows, device) if signals else None

    def _make_signals(self, rows: int, device: torch.device) -> reduce.Signals:
        ranks = dist.get_world_size()
        self._flags = symmetric.empty((ranks, rows), dtype=torch.int32, device=device).zero_()
        handle = symmetric.rendezvous(self._flags, dist.group.WORLD)
        handle.barrier(timeout_ms=PATIENCE_MS)  # all zeros before the first is sent
        flags = [handle.get_buffer(rank, (ranks, rows), torch.int32).data_ptr() for rank in range(ranks)]
        counts = torch.zeros(rows, dtype=torch.int32, device=device)
        return reduce.Signals(torch.tensor(flags, device=device), counts, dist.get_rank())

    @property
    def _name(self) -> str:
        return "odd" if self._turn % 2 else "even"

    def part(self, rows: int) -> Tensor:
        self._turn += 1
        return self._mine[self._name][:rows]

    def add_and_norm(self, residual: Tensor, norm: Norm) -> Tensor:
        if self._signals is None:
            self._handles[self._name].barrier(timeout_ms=PATIENCE_MS)
        return reduce.add_and_norm(self._addresses[self._name], residual, norm, self._signals)

    def gather(self, logits: Tensor) -> Tensor:
        self._mine["logits"][: len(logits)] = logits
        self._handles["logits"].barrier(timeout_ms=PATIENCE_MS)
        return torch.cat([peer[: len(logits)] for peer in self._peers["logits"]], dim=1)


class ShardedBlock(FusedBlock):
    """One transformer block over T rows, this rank's heads and neurons of it."""

    def share(
        self, residual: Tensor, entry: Tensor, slots: Slots, cache: KeyValue, depth: Tensor, after: Norm, sums: Reducer
    ) -> Tensor:
        """What the next block's attention reads, [T, H]; writes over `residual`, keys and values into `cache`.

        Args:
            residual: [T, H] before the block; entry: the same, normed.
            depth: [T] of the nodes.
            after: the norm before the next block, or before the readout.
        """
        weights, rows = self._weights, len(residual)
        attended = self.attend(entry, slots, cache, depth=depth)
        torch.mm(attended, weights.output.T, out=sums.part(rows))
        entry = sums.add_and_norm(residual, weights.between)
        inner = linear.swiglu(entry, weights.gate_up, self._workspaces.linear)
        torch.mm(inner, weights.down.T, out=sums.part(rows))
        return sums.add_and_norm(residual, after)


class ShardedFusedTarget(FusedTarget):
    """Verification by all ranks together; every rank gets all logits.

    Args:
        model: this rank's share, whose linear layers hold plain tensors; cache: of its heads.
        vocab: of the whole readout.
    """

    def __init__(
        self, model: PreTrainedModel, cache: KVCache, workspaces: Workspaces, slots: int, sums: Reducer, vocab: int
    ):  # fmt: skip
        super().__init__(model, cache, workspaces, slots)
        decoder = model.get_decoder()
        tables = self._blocks[0].cos, self._blocks[0].sin
        self._blocks = [ShardedBlock(layer, *tables, workspaces) for layer in decoder.layers]
        self._first = as_norm(decoder.layers[0].input_layernorm)
        self._after = [*(as_norm(layer.input_layernorm) for layer in decoder.layers[1:]), as_norm(decoder.norm)]
        self._sums, self._is_split = sums, len(self._readout) < vocab

    def verify(self, tree: TreeNodes) -> Tensor:
        slots = Slots(tree.ancestor_bits, tree.slots)
        residual = self._embedding(tree.tokens)
        entry = rms_norm(residual, self._first)
        for index, (block, after) in enumerate(zip(self._blocks, self._after, strict=True)):
            entry = block.share(residual, entry, slots, self.cache.layer(index), tree.depth, after, self._sums)
        self.query[:, : tree.slots] = self._blocks[-1].query
        self.lse[:, : tree.slots] = self._blocks[-1].lse
        logits = entry @ self._readout.T
        return self._sums.gather(logits) if self._is_split else logits

    def attention_row(self, newest: Tensor) -> Tensor:
        """[S] as of one device: the mean over the heads of all ranks."""
        row = super().attention_row(newest)
        dist.all_reduce(row)
        return row.div_(dist.get_world_size())

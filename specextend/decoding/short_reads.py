"""A prompt's few new tokens behind a prefix that is known, read by the verification that is captured anyway.

A prefill asks the device for every kernel of every layer, which takes the host several times as long as the device
needs for a question of some words; a captured verification takes one launch, and computes the same of a chain.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from specextend.decoding.backend import unchanged
from specextend.kernels.tree import TreeNodes
from specextend.modeling.fused_target import FusedTarget
from specextend.modeling.target import LastLayer

AT_MOST = 2  # verifications; a prefill of more tokens keeps the device busy


class ChainReader:
    """A `ShortReader` of a target that is captured.

    Args:
        nodes: those for which there is a verification.
        verify: logits [T, V] after every node.
    """

    def __init__(self, target: FusedTarget, nodes: Sequence[TreeNodes], verify: Callable[[TreeNodes], Tensor]):
        self._target, self._verify = target, verify
        self._nodes = sorted((one for one in nodes if one.slots > 1), key=lambda one: one.slots)
        self._chains = {one.slots: TreeNodes.chain(one.slots - 1, one.tokens.device) for one in self._nodes}
        self._most = max(self._chains, default=0)

    def reads(self, tokens: int) -> int | None:
        return self._most if tokens <= AT_MOST * self._most and self._target.cache.is_current else None

    def read(self, block: Tensor) -> tuple[Tensor, LastLayer, Tensor]:
        count, target = len(block), self._target
        nodes = next(one for one in self._nodes if one.slots >= count)
        target.cache.begin()
        with unchanged(nodes.fields):  # some drafts set theirs once
            nodes.put_chain(block, self._chains[nodes.slots])
            logits = self._verify(nodes)
        newest = slice(count - 1, count)
        # copies: the next verification writes over all of it
        return logits[newest].clone(), target.last_layer(newest), target.features[:count].clone()

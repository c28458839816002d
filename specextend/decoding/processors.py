"""transformers' logits processors between the target and its choice: any of them, each called as `generate` calls it.

A processor sees the whole text so far and may remember what it saw, so it cannot judge the nodes of a tree side by
side. It need not: only the nodes on the accepted path are ever asked for their next token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from specextend.decoding.loop import ROOT
from specextend.decoding.sampling import Chooser
from specextend.modeling.target import Target
from specextend.trees.tree import DraftTree


class ProcessedTarget:
    """A target whose every token is chosen behind `processors`, for one prompt; its logits leave no other choice.

    Args:
        choose: the rule behind the processors.
        processors: called once per output position, in order, with ids [1, n] and float32 scores [1, V].
    """

    def __init__(self, target: Target, choose: Chooser, processors: Sequence[LogitsProcessor]):
        self._target, self._choose, self._processors = target, choose, LogitsProcessorList(processors)
        self._ids = torch.empty(1, 0)
        self._chosen = 0
        self.commit, self.attention_row = target.commit, target.attention_row

    def prefill(self, prompt: Tensor, extra_slots: int) -> Tensor:
        """As `Target.prefill`."""
        logits = self._target.prefill(prompt, extra_slots)
        self._ids = prompt[None]
        return _certain(logits, {0: self._next(logits)})

    def verify(self, tree: DraftTree) -> Tensor:
        """As `Target.verify`; rows beside the accepted path are the target's own, and nobody follows them."""
        logits = self._target.verify(tree)
        children = {
            edge: node for node, edge in enumerate(zip(tree.parents.tolist(), tree.tokens.tolist(), strict=True))
        }
        chosen, node = {}, 0
        while node is not None:
            chosen[node] = self._next(logits[node : node + 1])
            node = children.get((node, chosen[node]))
        return _certain(logits, chosen)

    def _next(self, logits: Tensor) -> int:
        """The token after the text so far, to which it is added; `logits` [1, V]."""
        scores = self._processors(self._ids, logits.float())
        token = self._choose(scores, self._chosen, ROOT)
        self._ids = torch.cat((self._ids, token[None]), dim=1)
        self._chosen += 1
        return int(token)


def _certain(logits: Tensor, chosen: dict[int, int]) -> Tensor:
    """`logits` [T, V] with all mass of row i on chosen[i]."""
    certain = logits.clone()
    for row, token in chosen.items():
        certain[row] = float("-inf")
        certain[row, token] = 0
    return certain

"""transformers' logits processors before the target's choice: any of them, each called as `generate` calls it.

A processor sees the whole text so far and may remember what it saw, so it cannot judge the nodes of a tree side by
side. It need not: only the nodes on the accepted path are ever asked for their next token, and none after the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from specextend.decoding.sampling import Chooser
from specextend.trees.tree import DraftTree, Nodes


class ProcessedChooser:
    """Chooses every token behind `processors`, for one prompt.

    Args:
        choose: the rule behind the processors.
        processors: called once per output position, in order, with ids [1, n] and float32 scores [1, V].
        prompt: [N].
        ends: told the newest token; whether the output ends with it.
    """

    def __init__(
        self, choose: Chooser, processors: Sequence[LogitsProcessor], prompt: Tensor, ends: Callable[[int], bool]
    ):
        self._choose, self._processors, self._ends = choose, LogitsProcessorList(processors), ends
        self._ids, self._root = prompt[None], DraftTree.root(prompt[-1])

    def __call__(self, logits: Tensor, tree: Nodes, first: int) -> Tensor:
        """Rows beside the accepted path are the target's own, and nobody follows them."""
        chosen = logits.argmax(-1)
        nodes = zip(tree.parents.tolist(), tree.tokens.tolist(), tree.used.tolist(), strict=True)
        children = {(parent, token): node for node, (parent, token, used) in enumerate(nodes) if used}
        node: int | None = 0
        while node is not None:
            scores = self._processors(self._ids, logits[node : node + 1].float())
            token = self._choose(scores, self._root, first)
            chosen[node] = token[0]
            self._ids, first = torch.cat((self._ids, token[None]), dim=1), first + 1
            node = None if self._ends(int(token)) else children.get((node, int(token)))
        return chosen

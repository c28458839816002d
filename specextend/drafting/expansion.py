"""Draft trees and their OPT-Tree expansion ("Hybrid Tree Attention"; Appendix D).

Level by level the draft scores the children of the best nodes; the tree that is verified holds the `nodes` most
probable paths over all levels. The sum of their probabilities is the accepted length to expect.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from specextend.trees.growth import Growth
from specextend.trees.tree import DraftTree


@dataclass(frozen=True)
class Level:
    """Nodes of one depth for the draft to run on.

    Attributes:
        tokens: [n]; depth: their distance from the root, at least 1.
        parents: [n] index of each node's parent among the nodes of the level before (the root is level 0).
        visible: [n, E] bool over all E nodes handed out so far in order, this level last: the node's own ancestors.
    """

    tokens: Tensor
    depth: int
    parents: Tensor
    visible: Tensor


def grow(root: Tensor, logprobs: Tensor, expand: Callable[[Level], Tensor], growth: Growth) -> DraftTree:
    """Grow the OPT-Tree below `root`.

    Candidates that fall out of the best `nodes` are not expanded: a path is never more probable than its beginning,
    so none of their descendants could come back.

    Args:
        root: [] token.
        logprobs: [1, V] the draft's log-probabilities of the token after the root.
        expand: runs the draft on a level, log-probabilities [n, V] of the tokens after its nodes.
    """
    device = root.device
    tokens = root.reshape(1)
    parents = torch.full((1,), -1, dtype=torch.long, device=device)
    given = torch.zeros(1, dtype=logprobs.dtype, device=device)  # log-probability after the parent
    reach = torch.zeros(1, dtype=logprobs.dtype, device=device)  # log-probability of the path; 0 for the root
    frontier = torch.zeros(1, dtype=torch.long, device=device)  # nodes that `logprobs` continues
    visible = torch.empty(1, 0, dtype=torch.bool, device=device)
    expected = 0.0
    floor = math.log(growth.floor) if growth.floor else -math.inf

    for depth in range(1, growth.max_depth + 1):
        children = _best_children(reach[frontier], logprobs, growth)
        first_new = len(tokens)
        tokens, parents = torch.cat((tokens, children.tokens)), torch.cat((parents, frontier[children.parents]))
        given, reach = torch.cat((given, children.logprobs)), torch.cat((reach, children.reach))
        kept = _best(reach, growth.nodes + 1)
        kept = kept[reach[kept] >= floor]
        gain = float(reach[kept].exp().sum()) - 1.0 - expected
        expected += gain
        fresh = kept[kept >= first_new]
        if gain < growth.threshold or depth == growth.max_depth or not len(fresh):
            break
        below = children.parents[fresh - first_new]
        visible = torch.cat((visible[below], torch.eye(len(fresh), dtype=torch.bool, device=device)), dim=1)
        logprobs = expand(Level(tokens[fresh], depth, below, visible))
        frontier = fresh

    renumber = torch.empty_like(parents).scatter_(0, kept, torch.arange(len(kept), device=device))
    above = parents[kept]
    tree = DraftTree.from_parents(tokens[kept], torch.where(above >= 0, renumber[above.clamp(min=0)], -1))
    return replace(tree, logprobs=given[kept], reach=reach[kept])


class _Children(NamedTuple):
    """Candidates of a level: index of the parent in the level before, token, scores; each [<= nodes]."""

    parents: Tensor
    tokens: Tensor
    logprobs: Tensor
    reach: Tensor


def _best_children(path: Tensor, logprobs: Tensor, growth: Growth) -> _Children:
    """The best continuations of a level.

    Args:
        path: [n] `reach` of the level's nodes; logprobs: [n, V].
    """
    values, tokens = logprobs.topk(min(growth.nodes, logprobs.shape[1]), dim=-1)
    # rounding may lift a log-probability above 0; a child must not outrank its parent
    values = values.clamp(max=0)
    worth = values if growth.calibration is None else growth.calibration(values)
    reach = (worth + path[:, None]).flatten()
    best = _best(reach, growth.nodes)
    return _Children(best // tokens.shape[1], tokens.flatten()[best], values.flatten()[best], reach[best])


def _best(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` highest scores, ascending. Ties go to the older index, so to parents before children."""
    order = torch.argsort(scores, descending=True, stable=True)
    return order[:count].sort().values

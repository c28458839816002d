"""Captured rounds whose trees earn their time: a graph for every size of verification, and one that drafts nothing.

Which of them runs is the policy's decision. What a round needs of it lies on the device before the draft begins (stop
rule, floor, calibration), so that nothing is captured anew; the host looks at the tree's probabilities between draft
and verification, and does its thinking while the target verifies. The device waits for that look, so the look has to
earn its time like everything else: where the last tree was worth all slots, and no branch says anything, the next one
is verified whole and unseen.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from specextend.decoding.backend import unchanged
from specextend.decoding.eager import branch_of
from specextend.decoding.graphs import GraphBackend, tree_of
from specextend.decoding.output import Output
from specextend.drafting.captured import Run, Step, TreeDraft
from specextend.kernels.tree import TreeBuffers, TreeNodes
from specextend.policy.costs import LONGER, REPEATS, SHORT, Costs, measure_curve
from specextend.policy.policies import Outcome, PricedTree
from specextend.trees.growth import Growth
from specextend.trees.host_tree import HostTree

SIZES = (8, 16, 32, 64)  # slots of verifications that are captured, besides that of a root alone and the largest
LOOK = 2e-4  # seconds that a look at a tree takes, before one has been timed


class PricedGraphs(GraphBackend):
    """A `GraphBackend` for drafts that grow trees, as `PricedTree` decides."""

    def __init__(self, target, drafter, retriever, config, prefixes=None):
        super().__init__(target, drafter, retriever, config, prefixes)
        self._config = config
        self._policy: PricedTree | None = None
        self._lookup = branch_of(config)
        most = config.slots.verify
        self._sizes = (1, *(size for size in SIZES if size < most), most)

    # --- the steps of a round ---

    def prefill(self, output: Output) -> Tensor:
        first = super().prefill(output)
        self._set_costs(output)
        self._policy.begin()
        self._decide()
        self._verified: HostTree | None = None  # of this round
        self._learnable: Callable[..., Outcome] | None = None  # of the last round, once it has been read
        self._unread = 1  # tokens that were emitted and that the draft has not read
        self._working = self._slots.working or 0  # slots of the working cache that may be taken: it waits for a refresh
        self._speculated = 0  # rounds in which the draft grew a tree
        self._levels, self._lost = 0.0, math.inf  # of the last trees, and tokens that verifying all of one lost
        return first

    def plan(self) -> None:
        output, policy = self._output, self._policy
        self._lookup.extend(output.rounds[-1].tokens if output.rounds else output.token_ids)
        self._growth, self._branch = self._next, self._lookup.look()
        self._is_spared = self._growth is not None and policy.spares(self._branch.reach)
        if self._growth is None:  # a branch is worth a round if it pays for what the draft reads in it
            reading = policy.costs.draft(0, 0) * policy.price
            self._is_spared = policy.earned(self._branch.reach, output.context) > reading
        if self._is_spared:
            self._growth = Growth(1, 1, threshold=math.inf, calibration=policy.calibration)
            self._put_bounds(self._growth)
        self._is_unseen = self._growth is not None and not self._is_spared and not self._earns_a_look()
        output.price = policy.price

    def refresh_is_due(self) -> bool:
        if self._growth is not None:
            if not self._is_spared and self._retriever.is_due(self._speculated, self._output.context):
                return True
            return self._lacks_room(self._slots.path)
        return self._must_absorb and self._lacks_room(0)

    def refresh(self) -> None:
        super().refresh()
        self._working = self._config.retrieval.top_k * self._config.retrieval.chunk_size

    def draft(self) -> None:
        if self._reserved.is_short(self._output.context):
            self._grow()
        if self._growth is None:
            if self._must_absorb:
                self._run("absorb", self._draft.absorb)
                self._read_by_draft(self._unread - 1)
            self._size, self._verified = 1, None
            self._outcome = partial(Outcome, None, None, self._branch.reach)
        else:
            self._speculated += not self._is_spared
            if self._is_unseen:
                self._draft.draft_unseen(self._run, math.ceil(self._levels))
                self._size = self._sizes[-1]
                self._shown = self._mark()
            else:
                self._draft.draft(self._run)
                began = time.perf_counter()
                self._see()
                self._cut()
                self._looking += 0.1 * (time.perf_counter() - began - self._looking)
            self._read_by_draft(self._unread)
        if self._output.observer:
            self._set_root(self._judged)
            self._output.observer.drafted(tree_of(self._judged))

    def _see(self) -> None:
        """Take the draft's tree from where it was shown, to be verified as it is until it is cut."""
        levels, self._drafted = self._read_sheet()
        seen = None if self._is_spared else self._drafted
        self._verified, passes = self._drafted, [self._tree.width] * (levels - 1)
        self._outcome = partial(Outcome, seen, passes, self._branch.reach)

    def _earns_a_look(self) -> bool:
        """Whether a look at the next tree is expected to save, or to find in the branch, what it takes."""
        if not self._can_be_unseen:
            return True
        branch = float(np.exp(self._branch.reach).sum())
        return self._lost + branch > self._policy.price * self._looking

    def _cut(self) -> None:
        """Let a verification have the best of the draft's tree and the branch; the device waits for it."""
        context = self._output.context
        whole = self._drafted.joined(self._branch.tokens, self._branch.reach)
        needed = self._policy.size(whole.reach[1:], context) + 1
        self._size = max(self._policy.costs.size(needed, context), self._sizes[1])
        kept = self._verified = whole.most_probable(self._size - 1)
        self._judged.put(kept.tokens, kept.parents, kept.depth, kept.ancestor_bits())

    def verify(self) -> None:
        super().verify()
        self._think()

    def read(self) -> tuple[int, list[int]]:
        drafted, emitted = super().read()
        if self._size == 1:
            emitted = emitted[-1:]
        self._unread += len(emitted)
        self._drafter.waiting = self._unread
        return drafted, emitted

    # --- deciding ---

    def _think(self) -> None:
        """Learn from the last round, and decide on the next; the device is busy with this one."""
        output = self._output
        if self._is_unseen:
            self._shown()
            self._see()
        if self._growth is not None and not self._is_spared:  # a tree that would have grown on is followed by a larger
            self._levels = max(float(self._tree.seen[1] + (self._tree.seen[0] > 0)), self._levels - 0.5)
            self._lost = self._policy.loses(self._drafted.reach[1:], output.context)
        if self._learnable is not None:
            last = output.rounds[-1]
            context = output.context - len(last.tokens)
            self._policy.learn(self._learnable(tokens=last.tokens, seconds=last.seconds, context=context))
        promised = self._verified.expected(len(self._verified)) if self._verified else 0.0
        self._learnable = partial(self._outcome, promised=promised, verified=self._size)
        self._decide()

    def _decide(self) -> None:
        """What the next round drafts; its bounds are on the device when the round begins."""
        self._next = self._policy.plan(self._output.context)
        if self._next is not None:
            self._put_bounds(self._next)

    def _put_bounds(self, growth: Growth) -> None:
        floor = math.log(growth.floor) if growth.floor else -math.inf
        self._bounds[:] = torch.tensor([growth.threshold, floor, *growth.calibration.table])
        self._tree.bounds.copy_(self._bounds, non_blocking=True)

    def _read_sheet(self) -> tuple[int, HostTree]:
        """Levels of the draft's tree, and those of its nodes that the floor lets pass."""
        sheet = self._tree.seen.numpy()
        levels, rows = int(sheet[1]), sheet[2:].reshape(5, -1)
        used = rows[4] > -math.inf
        rows = rows if used.all() else rows[:, used]
        (tokens, parents, depth), logs = rows[:3].astype(int), rows[3:].astype(float)
        if len(tokens) < len(used):
            parents[1:] = (np.cumsum(used) - 1)[parents[1:]]
        tokens[0] = self._output.token_ids[-1]
        return levels, HostTree(tokens, parents, depth, *logs)

    def _mark(self) -> Callable[[], None]:
        """Waits until the device has come to where it is asked now."""
        if self.device.type != "cuda":
            return lambda: None
        event = torch.cuda.Event()
        event.record()
        return event.synchronize

    @property
    def _must_absorb(self) -> bool:
        return self._unread >= self._slots.path

    def _lacks_room(self, more: int) -> bool:
        return self._slots.working is not None and self._working + self._unread + more > self._slots.working

    def _read_by_draft(self, tokens: int) -> None:
        self._working += tokens
        self._unread -= tokens

    # --- the steps that are captured ---

    @property
    def _tree(self) -> TreeBuffers:
        return self._draft.nodes

    def _build(self) -> None:
        super()._build()
        assert isinstance(self._draft, TreeDraft)
        tree, cuda = self._tree, self.device.type == "cuda"
        self._parts = {size: TreeNodes(size, 0, self.device, verdict=tree) for size in self._sizes}
        self._can_be_unseen = tree.slots == self._sizes[-1] and not self._dense
        if self._can_be_unseen:  # what is verified whole stays where it has grown
            self._parts[tree.slots] = tree
        self._looking = LOOK
        alone = self._parts[1]
        alone.parents.fill_(-1), alone.used.fill_(1), alone.ancestor_bits.fill_(1)
        self._bounds = torch.zeros(len(tree.bounds), pin_memory=cuda)

    @property
    def _judged(self) -> TreeNodes:
        return self._parts[self._size]

    @property
    def _verifiable(self) -> list[TreeNodes]:
        return list(self._parts.values())

    def _named(self, step: str, nodes: TreeNodes) -> str:
        return f"{step} {nodes.slots}"

    def _each_verdict(self, handle: Run) -> None:
        self._tree.count.fill_(1)  # a root alone adds a token to those that the draft has not read: room for one more
        for size, nodes in self._parts.items():
            handle(f"verify {size}", partial(self._verify, nodes))
            handle(f"accept {size}", partial(self._accept, nodes))
        self._tree.count.fill_(2)
        handle("absorb", self._draft.absorb)

    def _set_root(self, nodes: TreeNodes) -> None:
        if nodes.slots == 1:
            nodes.tokens.copy_(self._tree.root)

    def _verify(self, nodes: TreeNodes) -> None:
        self._set_root(nodes)
        super()._verify(nodes)

    def _accept(self, nodes: TreeNodes) -> None:
        if nodes.slots > 1:
            return super()._accept(nodes)
        nodes.append(self._chosen[:1], self._target.cache.length)
        self._draft.follow_alone(self._target)
        self._report.copy_(nodes.report, non_blocking=True)

    # --- what they cost ---

    def _set_costs(self, output: Output) -> None:
        """Time the steps behind a prompt of this length, unless that is known."""
        context, cache = output.prompt_tokens, self._target.cache
        short = min(SHORT, context)
        known = self._policy.costs if self._policy else None
        if known and context <= LONGER * known.verify_curve.longest:
            return
        # a verification behind the shorter context writes over entries of the prompt
        overwritten = [part[:, :, short : short + self._slots.verify] for part in (cache.keys, cache.values)]

        def verification(size: int, length: int) -> float:
            cache.length.fill_(length)
            return self._seconds_of(lambda: self._run(f"verify {size}", partial(self._verify, self._parts[size])))

        with self._capturing(), unchanged(*self._state, *overwritten):
            verify = measure_curve(verification, self._sizes, (short, context), only=True)
            if known:
                known.verify_curve = verify
            else:
                costs = Costs(verify, self._drafting_seconds())
                self._policy = PricedTree(self._config.tree, costs, self._config.retrieval.every_n_steps)

    def _drafting_seconds(self) -> NDArray[np.float64]:
        """Seconds of reading the newest tokens, of a level, and of each of its rows; levels are of one size here."""

        def drafting(threshold: float) -> float:
            self._tree.bounds[0] = threshold
            return self._seconds_of(lambda: self._draft.draft(self._run))

        thresholds = math.inf, -math.inf  # no level after the first, every level
        reading, every = np.min([[drafting(one) for one in thresholds] for _ in range(REPEATS)], axis=0)
        level = (every - reading) / max(self._config.tree.max_depth - 1, 1)
        return np.array([reading, max(level, 1e-7), 0.0])

    def _seconds_of(self, step: Step) -> float:
        self._synchronise()
        began = time.perf_counter()
        step()
        self._synchronise()
        return time.perf_counter() - began

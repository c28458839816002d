"""The steps of a round in plain PyTorch, on any device, for any model: the definition, and the oracle of the tests."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from specextend.config import SpecExtendConfig
from specextend.decoding.backend import Reservation, read_prompt, unchanged
from specextend.decoding.output import Output
from specextend.decoding.prefixes import NoReuse
from specextend.drafting.drafter import Drafter, TreeDrafter
from specextend.drafting.lookup_branch import Branch, LookupBranch, NoBranch
from specextend.drafting.retrieval import Retriever
from specextend.modeling.target import Target
from specextend.policy.costs import LONGER, SHORT, Costs, Curve, measure_curve, measure_drafting
from specextend.policy.policies import FixedTree, Outcome, Policy, PricedTree
from specextend.trees.acceptance import accept
from specextend.trees.growth import Growth
from specextend.trees.host_tree import HostTree
from specextend.trees.tree import DraftTree

SLOTS = (1, 2, 4, 8, 16, 32, 64)  # of verifications that are timed
BEHIND = 4  # paths that the draft may fall behind while nothing is drafted


def branch_of(config: SpecExtendConfig) -> NoBranch:
    """The lookup branch of priced trees, or none, as the setting has it."""
    return LookupBranch(config.tree.max_depth) if config.tree.lookup_branch else NoBranch()


class EagerBackend:
    """A target, a drafter, and what tells the draft which part of the context to keep.

    Args:
        config: its tree's rule decides who sizes the trees.
        prefixes: what is kept from prompt to prompt.
    """

    name = "eager"

    def __init__(
        self, target: Target, drafter: Drafter, retriever: Retriever, config: SpecExtendConfig,
        prefixes: NoReuse | None = None,
    ):  # fmt: skip
        self.device, self._prefixes = target.model.device, prefixes or NoReuse()
        self._target, self._drafter, self._retriever = target, drafter, retriever
        self._config, self._slots = config, config.slots
        self._policy: Policy = FixedTree(config.tree)
        self._is_priced = config.tree.rule == "price" and isinstance(drafter, TreeDrafter)
        self._lookup = branch_of(config) if self._is_priced else NoBranch()

    def prefill(self, output: Output) -> Tensor:
        self._output, self._reserved = output, Reservation(output, self._slots)
        verify = self._measured_verification() if self._is_priced else None
        extra = self._reserved.extra_slots
        first = read_prompt(output, self._target, self._drafter, extra, self._prefixes, self._lookup.begin)
        if verify:
            self._set_costs(verify)
        self._policy.begin()
        self._speculated = 0  # rounds in which the draft grew a tree
        return first

    def plan(self) -> None:
        output = self._output
        if not output.rounds:
            self._lookup.extend(output.token_ids)
        elif self._is_priced:
            self._learn()
        self._context = output.context
        self._growth: Growth | None = self._policy.plan(self._context)
        self._branch: Branch = self._lookup.look()
        if self._growth is not None and self._policy.spares(self._branch.reach):
            self._growth = None
        output.price = self._policy.price

    def _learn(self) -> None:
        """Take notice of the last round."""
        passes = None if self._drafted is None else self._drafter.passes
        seconds, slots = self._output.rounds[-1].seconds, len(self._tree)
        branch = self._branch.reach
        self._policy.learn(
            Outcome(self._drafted, passes, branch, self._promised, slots, self._emitted, seconds, self._context)
        )
        self._lookup.extend(self._emitted)

    def refresh_is_due(self) -> bool:
        if self._growth is not None:
            if self._retriever.is_due(self._speculated, self._output.context):
                return True
            return self._is_priced and self._lacks_room(self._slots.path)
        return self._is_priced and self._must_catch_up and self._lacks_room(0)

    def refresh(self) -> None:
        context = self._drafter.context
        positions = self._retriever.select(self._target.attention_row, context)
        self._drafter.refresh(positions)
        if self._output.observer:
            self._output.observer.refreshed(len(self._output.rounds), positions, context)

    def draft(self) -> None:
        if self._reserved.is_short(self._output.context):
            self._reserved.grow(self._output.context)
            self._target.cache.require(self._reserved.tokens + self._slots.verify)
            self._drafter.require(self._reserved.tokens + self._slots.verify)
        if self._growth is None:
            if self._must_catch_up:
                self._drafter.catch_up()
            self._tree = self._cut_branch(self._drafter.hold())
        else:
            self._speculated += 1
            self._tree = self._drafter.propose(self._growth)
            if self._is_priced:
                self._tree = self._cut(self._tree)
        if self._output.observer:
            self._output.observer.drafted(self._tree)

    def _cut_branch(self, root: DraftTree) -> DraftTree:
        """What is verified where nothing was drafted: as much of the branch as is worth it."""
        self._drafted, self._promised = None, 0.0
        nodes = self._policy.size(self._branch.reach, self._context)
        if not nodes:
            return root
        return DraftTree.chain(torch.tensor([self._output.token_ids[-1], *self._branch.tokens[:nodes]]).to(self.device))

    def _cut(self, grown: DraftTree) -> DraftTree:
        """What is verified of what the draft has grown and of the branch."""
        self._drafted = HostTree.of(grown)
        whole = self._drafted.joined(self._branch.tokens, self._branch.reach)
        nodes = self._policy.size(whole.reach[1:], self._context)
        self._promised = whole.expected(nodes)
        kept = whole.most_probable(nodes)
        return grown if kept is self._drafted else kept.on(self.device)

    def verify(self) -> None:
        logits = self._target.verify(self._tree)
        self._chosen = self._output.choose(logits, self._tree, self._output.new_tokens)
        if self._output.observer:
            self._output.observer.verified(self._tree, logits)

    def accept(self) -> None:
        self._accepted = accept(self._tree, self._chosen)
        self._target.commit(self._accepted.path)
        self._drafter.commit(self._accepted)
        if self._output.observer:
            self._output.observer.accepted(self._accepted.path)

    def read(self) -> tuple[int, list[int]]:
        self._emitted = [*self._accepted.tokens.tolist(), int(self._accepted.bonus)]
        return len(self._tree) - 1, self._emitted

    # --- rounds that do not speculate ---

    @property
    def _must_catch_up(self) -> bool:
        """Whether the draft has fallen so far behind that it reads what came, so that coming back finds no holes."""
        return self._drafter.unread > BEHIND * self._slots.path

    def _lacks_room(self, more: int) -> bool:
        room = self._drafter.room
        return room is not None and room < self._drafter.unread + more

    # --- what its steps cost ---

    def _measured_verification(self) -> Curve | None:
        """Seconds of verifications behind a prompt of this length; None if they are known. The prompt is not read yet.

        What the cache holds of earlier prompts stays.
        """
        context, known = self._output.prompt_tokens, isinstance(self._policy, PricedTree)
        if known and context <= LONGER * self._policy.costs.verify_curve.longest:
            return None
        cache, slots = self._target.cache, [count for count in SLOTS if count <= self._slots.verify]

        def run(rows: int, length: int) -> float:
            cache.length = length
            tree = DraftTree.chain(torch.zeros(rows, dtype=torch.long, device=self.device))
            return self._seconds_of(lambda: self._target.verify(tree))

        with self._output.setting_up(), cache.provisional():
            cache.require(context + max(slots))
            contexts = min(SHORT, context), context
            with unchanged(*(cache.buffer[..., start : start + max(slots), :] for start in contexts)):
                return measure_curve(run, slots, contexts)

    def _set_costs(self, verify: Curve) -> None:
        """Let the policy know them, and those of drafting behind the prompt that was just read."""
        if isinstance(self._policy, PricedTree):
            self._policy.costs.verify_curve = verify
            return

        def run(depth: int, nodes: int) -> float:
            with self._drafter.rehearsal():
                return self._seconds_of(lambda: self._drafter.propose(Growth(nodes, depth, threshold=0.0)))

        with self._output.setting_up():
            costs = Costs(verify, measure_drafting(run))
        self._policy = PricedTree(self._config.tree, costs, self._config.retrieval.every_n_steps)

    def _seconds_of(self, step: Callable[[], object]) -> float:
        began = time.perf_counter()
        step()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - began

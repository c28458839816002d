"""How large a tree the next round drafts, how much of it is verified, and whether to speculate at all.

One number decides: the price of a second in tokens. At the best ratio of tokens to time every part of a round earns
its own time at that price (Dinkelbach's method for ratios), so a node is kept if the probability that it is accepted
exceeds price x seconds of one more slot, and a level is drafted if what it is expected to add exceeds price x seconds
of a level. The price is the rate at which tokens come now, and never less than that of autoregressive decoding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from specextend.config import TreeConfig
from specextend.policy.calibration import Calibration
from specextend.policy.costs import Costs
from specextend.trees.growth import Growth
from specextend.trees.host_tree import HostTree

RATE_MEMORY = 0.5 ** (1 / 32)  # weight of the last round's tokens and seconds when the next one is known
GAIN_ROUNDS = 24  # that the mean of what speculating gained goes over
FIRST_GAIN, FIRST_ROUNDS = 0.5, 4  # tokens per round that speculating is believed to gain, as if so many had shown it
HOPE = 0.5  # of what was believed before a prompt is left after it
MOST_GAIN = 2.0  # tokens
FIRST_PAUSE, LONGEST_PAUSE = 8, 128  # rounds without speculation until it is tried again
FIRST_PAUSE_WITHOUT_HOPE = 24  # where speculating did not pay for earlier prompts
SETTLED = 16  # rounds of speculation after which the next pause is a short one again
TRIAL, TRIAL_SHARE = 3, 0.7  # first rounds of speculation, and what of a plain round draft and slots may each cost
INTEREST = 0.01  # tokens of every round that trials may lose: this share of autoregressive speed, and no more
MOST_CREDIT = 4.0  # tokens that speculating has gained and that later trials may lose
MOST_DEBT = 1.5  # tokens that it may have lost, whatever it promises, before it pauses
NEAR = 32  # tokens of context between which verifications cost the same
FIRST_SHARE = 0.6  # of a level's probability that the next one is believed to hold before that is known


@dataclass(frozen=True)
class Outcome:
    """A finished round, as a policy learns from it.

    Attributes:
        drafted: the draft's own tree, None if it drafted nothing.
        passes: rows of each level that the draft ran on, the root's not counted; None if it did not run.
        branch: [m] log-probabilities of the lookup branch.
        promised: draft tokens that the verified tree was expected to have accepted.
        verified: slots.
        tokens: the target's, the bonus token last.
        seconds: by stage.
        context: tokens before the newest one.
    """

    drafted: HostTree | None
    passes: Sequence[int] | None
    branch: NDArray[np.float64]
    promised: float
    verified: int
    tokens: list[int]
    seconds: dict[str, float]
    context: int


class Policy(Protocol):
    """Decides about rounds; what it decides changes how fast the output comes, never what it is."""

    @property
    def price(self) -> float:
        """Tokens per second that everything in a round must earn; 0 where nobody asks."""

    def begin(self) -> None:
        """A new prompt: forget what was learned from the last one's text."""

    def plan(self, context: int) -> Growth | None:
        """The tree that the draft grows in a round behind `context` tokens; None: it drafts nothing."""

    def spares(self, branch: NDArray[np.float64]) -> bool:
        """Whether a branch with these log-probabilities [m] leaves the draft too little to be worth its time."""

    def size(self, reach: NDArray[np.float64], context: int) -> int:
        """How many of the nodes with these log-probabilities are verified, the most probable ones."""

    def learn(self, outcome: Outcome) -> None:
        """Take notice of a finished round."""


class FixedTree:
    """The same bounds in every round: the paper's tree, or whatever was asked for."""

    price = 0.0

    def __init__(self, config: TreeConfig):
        self._growth = Growth.of(config)

    def begin(self) -> None:
        pass

    def plan(self, context: int) -> Growth | None:
        return self._growth

    def spares(self, branch: NDArray[np.float64]) -> bool:
        return False

    def size(self, reach: NDArray[np.float64], context: int) -> int:
        return len(reach)

    def learn(self, outcome: Outcome) -> None:
        pass


class PricedTree:
    """Trees that earn their time.

    Args:
        config: most nodes and levels; the rest of it is a fixed tree's.
        refresh_every: rounds that share the time of a refresh.
    """

    def __init__(self, config: TreeConfig, costs: Costs, refresh_every: int):
        self._bounds = config.nodes, config.max_depth
        self.costs, self._refresh_every = costs, refresh_every
        self._hope, self._gained = FIRST_GAIN, []
        self.begin()

    def begin(self) -> None:
        self.calibration = Calibration()
        self._tokens = self._seconds = 0.0
        if self._gained:  # earlier prompts say how hopefully the next one begins, and nothing else of it
            self._hope = HOPE * self._hope + (1 - HOPE) * float(np.mean(self._gained))
        self._gain, self._tried, self._gained = self._hope, FIRST_ROUNDS, []
        self._wait, self._pause, self._speculated = 0, FIRST_PAUSE, 0
        if self._hope <= 0:
            self._wait = self._pause = FIRST_PAUSE_WITHOUT_HOPE
        self._slots: tuple[int, NDArray[np.float64]] = -NEAR - 1, np.empty(0)
        self._balance = 0.0  # tokens that speculating has gained, or lost
        self._share, self._price, self._rows = FIRST_SHARE, 0.0, 1.0
        self._mass = FIRST_SHARE ** np.arange(1, self._bounds[1] + 1)  # tokens accepted of a draft's tree, by depth
        self._drafting = self.costs.draft(2, 2)  # seconds that such a tree takes

    @property
    def price(self) -> float:
        return self._price

    def plan(self, context: int) -> Growth | None:
        self._balance += INTEREST
        self._set_price(context)  # whether or not the draft pauses: the branch has its price, too
        if self._wait:
            self._wait -= 1
            return None
        nodes = self._bounds[0]
        self._slots = context, self.costs.verify(nodes + 1, context)
        verify = self._slots[1]
        slot = self.costs.cheapest_slot(verify)
        level = self.costs.level + self.costs.row * self._rows
        nodes, depth = self._bounds_of_trial(verify, level, context) if self._speculated < TRIAL else self._bounds
        return Growth(
            nodes, depth, threshold=self._price * level / self._share,
            floor=min(self._price * slot, 0.99), calibration=self.calibration,
        )  # fmt: skip

    def _bounds_of_trial(self, verify: NDArray[np.float64], level: float, context: int) -> tuple[int, int]:
        """Nodes and levels of a tree that costs little, for rounds of which nobody knows what they are worth."""
        may_cost = TRIAL_SHARE * self.costs.plain(context)
        nodes = int(np.searchsorted(verify - verify[0], may_cost, side="right")) - 1
        most_nodes, most_levels = self._bounds
        if level * most_levels > may_cost:  # a level may seem to cost nothing
            most_levels = 1 + int(may_cost / level)
        return min(max(nodes, 1), most_nodes), most_levels

    def spares(self, branch: NDArray[np.float64]) -> bool:
        if not len(branch):
            return False
        left = self._mass.copy()  # what the draft finds where the branch is wrong
        left[: len(branch)] *= 1 - np.exp(branch[: len(left)])
        return float(left.sum()) < self._price * self._drafting

    def earned(self, branch: NDArray[np.float64], context: int) -> float:
        """Tokens that nodes with these log-probabilities, falling, gain beyond the time of their slots at most."""
        return float(self._gains(branch, context).max())

    def size(self, reach: NDArray[np.float64], context: int) -> int:
        # costs are a staircase: look at every size, never stop at the first that does not pay
        return int(self._gains(np.sort(reach)[::-1], context).argmax())

    def loses(self, reach: NDArray[np.float64], context: int) -> float:
        """Tokens that verifying every slot loses against verifying as many of these nodes as pay."""
        seconds = self._verify(context)
        whole = float(np.exp(reach).sum()) - self._price * float(seconds[-1] - seconds[0])
        return self.earned(np.sort(reach)[::-1], context) - whole

    def _gains(self, reach: NDArray[np.float64], context: int) -> NDArray[np.float64]:
        """Tokens that verifying 0, 1, 2, ... nodes gains beyond the time of their slots."""
        reach = reach[: self._bounds[0]]
        seconds = self._verify(context)[: len(reach) + 1]
        return np.cumsum(np.append(0.0, np.exp(reach))) - self._price * (seconds - seconds[0])

    def _verify(self, context: int) -> NDArray[np.float64]:
        """Seconds of verifying 1, 2, ... slots; of the last context that was asked for, where this is near it."""
        if abs(context - self._slots[0]) > NEAR:
            self._slots = context, self.costs.verify(self._bounds[0] + 1, context)
        return self._slots[1]

    def learn(self, outcome: Outcome) -> None:
        context, tokens, drafted = outcome.context, len(outcome.tokens), outcome.drafted
        self.costs.learn(outcome.seconds, outcome.passes, slots=outcome.verified, context=context)
        if outcome.verified == 1 and outcome.passes is None:
            return  # as cheap as can be: this is what autoregressive decoding is compared with
        levels, rows = len(outcome.passes or ()), sum(outcome.passes or ())
        took = self._seconds_of(outcome.verified, outcome.passes, context)
        self._tokens = RATE_MEMORY * self._tokens + tokens
        self._seconds = RATE_MEMORY * self._seconds + took
        worth = took / self.costs.plain(context)
        self._balance = min(self._balance + tokens - worth, MOST_CREDIT)
        if drafted is None:
            return
        self._learn_shape(drafted.depth, np.exp(drafted.reach), levels, rows)
        self._learn_acceptance(drafted, outcome.tokens)
        gain = tokens - worth - self.earned(outcome.branch, context)
        self._gained.append(min(max(gain, -MOST_GAIN), MOST_GAIN))
        # what a tree promises is less noisy than what comes of it, and slower to notice that the text has changed
        self._learn_gain(gain + (1.0 + outcome.promised - tokens) / 2)

    def _set_price(self, context: int) -> None:
        plain = self.costs.plain(context)
        first = 8  # rounds of autoregressive decoding that the rate begins with
        rate = (self._tokens + first) / (self._seconds + first * plain)
        self._price = max(rate, 1 / plain)

    def _seconds_of(self, verified: int, passes: Sequence[int] | None, context: int) -> float:
        """What a round costs by all that is known; its own clock would tell of the machine's moods, too."""
        verify = self.costs.verifying(verified, context)
        if passes is None:
            return verify + self.costs.rest(False)
        draft = self.costs.draft(len(passes), sum(passes))
        return verify + draft + self.costs.rest(True) + self.costs.refresh / self._refresh_every

    def _learn_gain(self, gain: float) -> None:
        """Whether the next rounds speculate, after one that gained `gain` tokens over autoregressive decoding."""
        gain = min(max(gain, -MOST_GAIN), MOST_GAIN)  # one round is not to outweigh ten others
        self._tried, self._speculated = min(self._tried + 1, GAIN_ROUNDS), self._speculated + 1
        if self._speculated == SETTLED:
            self._pause = FIRST_PAUSE
        self._gain += (gain - self._gain) / self._tried
        if self._gain <= 0 or self._balance < -MOST_DEBT:
            # soon again at first, for a text begins as it does not go on; then when the debt is paid
            owed = math.ceil((-MOST_DEBT - self._balance) / INTEREST)
            self._wait, self._pause = min(max(self._pause, owed), LONGEST_PAUSE), min(2 * self._pause, LONGEST_PAUSE)
            self._gain, self._tried, self._speculated = 0.0, 0, 0  # the next round of speculation decides
            self.calibration.fade(self._wait)

    def _learn_shape(self, depth, reach, levels: int, rows: int) -> None:
        """What a draft's tree holds by depth and takes, how much of a level the next one holds, and its rows."""
        mass = np.bincount(depth, weights=reach)[1:]
        seen = np.zeros_like(self._mass)
        seen[: len(mass)] = mass[: len(seen)]
        self._mass = 0.9 * self._mass + 0.1 * seen
        self._drafting = 0.9 * self._drafting + 0.1 * self.costs.draft(levels, rows)
        if len(mass) > 1:
            self._share = 0.9 * self._share + 0.1 * min(float(mass[1:].sum() / mass[:-1].sum()), 1.0)
        if levels > 0:
            self._rows = 0.9 * self._rows + 0.1 * rows / levels

    def _learn_acceptance(self, tree: HostTree, tokens: list[int]) -> None:
        """The verdict on every node below an accepted one, those that were not verified included."""
        parents, ids = tree.parents, tree.tokens
        at, asked, answers = 0, [], []
        for token in tokens:
            children = np.flatnonzero(parents == at)
            asked.append(children)
            answers.append(ids[children] == token)
            if not answers[-1].any():
                break
            at = int(children[answers[-1].argmax()])
        nodes = np.concatenate(asked)
        self.calibration.learn(tree.logprobs[nodes], np.concatenate(answers))

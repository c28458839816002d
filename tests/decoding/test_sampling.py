"""Verification: the longest matching path, and exactly the target's distribution, greedy and sampled."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2
from torch import Tensor

from specextend.config import SamplingConfig, SpecExtendConfig, TreeConfig
from specextend.decoding.eager import EagerBackend
from specextend.decoding.loop import decode
from specextend.decoding.output import Output
from specextend.decoding.sampling import Sampler, chooser, filtered, greedy
from specextend.drafting.drafter import Drafter
from specextend.drafting.retrieval import NoRetrieval
from specextend.errors import ConfigError
from specextend.trees.acceptance import Accepted, accept
from specextend.trees.growth import Growth
from specextend.trees.tree import DraftTree

# ---- accepting


def random_tree(draws: list[float], vocab: int) -> DraftTree:
    """A tree in which the children of a node are different tokens; a node that would be one too many is left out."""
    parents, tokens = [-1], [0]
    for draw in draws:
        parent = int(draw * len(parents))
        taken = {token for token, above in zip(tokens, parents, strict=True) if above == parent}
        free = [token for token in range(vocab) if token not in taken]
        if free:
            parents.append(parent)
            tokens.append(free[int(draw * 1000) % len(free)])
    return DraftTree.from_parents(torch.tensor(tokens), torch.tensor(parents))


def follow(tree: DraftTree, chosen: list[int]) -> list[int]:
    """The path of accepted nodes, one step at a time."""
    path = [0]
    while True:
        here = path[-1]
        below = [n for n in range(1, len(tree)) if tree.parents[n] == here and tree.tokens[n] == chosen[here]]
        if not below:
            return path
        path.append(below[0])


@settings(max_examples=200)
@given(st.lists(st.floats(0, 1, exclude_max=True), max_size=40), st.integers(2, 4), st.randoms(use_true_random=False))
def test_accept_keeps_the_longest_matching_path(draws, vocab, random):
    tree = random_tree(draws, vocab)
    chosen = [random.randrange(vocab) for _ in range(len(tree))]
    accepted = accept(tree, torch.tensor(chosen))
    path = follow(tree, chosen)
    assert accepted.path.tolist() == path
    assert accepted.tokens.tolist() == [int(tree.tokens[n]) for n in path[1:]]
    assert int(accepted.bonus) == chosen[path[-1]]


def test_match_below_a_rejected_node_is_not_accepted():
    # root 0 -> 1 -> 2; the target wants 9 after the root and 2 after the 1
    tree = DraftTree.from_parents(torch.tensor([0, 1, 2]), torch.tensor([-1, 0, 1]))
    accepted = accept(tree, torch.tensor([9, 2, 3]))
    assert accepted.path.tolist() == [0] and accepted.tokens.tolist() == [] and int(accepted.bonus) == 9


def test_root_is_accepted_whatever_its_token():
    accepted = accept(DraftTree.root(torch.tensor(5)), torch.tensor([3]))
    assert accepted.path.tolist() == [0] and int(accepted.bonus) == 3


# ---- the target's rule


def naive_filtered(logits: list[float], sampling: SamplingConfig) -> list[float]:
    """Probabilities after temperature, top-k and then nucleus, token by token.

    Of tokens tied at the k-th place all stay; of tokens tied at the edge of the nucleus those with lower ids do.
    """
    scaled = [logit / sampling.temperature for logit in logits]
    kept = list(range(len(scaled)))
    if sampling.top_k:
        kth = sorted(scaled, reverse=True)[min(sampling.top_k, len(scaled)) - 1]
        kept = [token for token in kept if scaled[token] >= kth]
    kept.sort(key=lambda token: -scaled[token])
    weights = {token: math.exp(scaled[token] - scaled[kept[0]]) for token in kept}
    total, mass, nucleus = sum(weights.values()), 0.0, []
    for token in kept:
        if mass / total >= sampling.top_p and sampling.top_p < 1:
            break
        nucleus.append(token)
        mass += weights[token]
    return [weights[token] / mass if token in nucleus else 0.0 for token in range(len(logits))]


@settings(max_examples=300)
@given(
    st.lists(st.integers(-12, 12).map(lambda n: n / 4), min_size=1, max_size=12),
    st.sampled_from([0.25, 0.5, 1.0, 2.0]),
    st.sampled_from([1.0, 0.97, 0.83, 0.61, 0.37, 0.01]),
    st.integers(0, 14),
)
def test_filtered_equals_a_naive_implementation(logits, temperature, top_p, top_k):
    sampling = SamplingConfig(temperature, top_p, top_k)
    ours = filtered(torch.tensor([logits, logits[::-1]]), sampling).softmax(-1)
    for row, given_ in zip(ours.tolist(), (logits, logits[::-1]), strict=True):
        assert row == pytest.approx(naive_filtered(given_, sampling), abs=1e-6)


def test_tokens_tied_at_the_kth_place_all_stay():
    kept = filtered(torch.tensor([[1.0, 3.0, 1.0, 0.0]]), SamplingConfig(1.0, top_k=2)).isfinite()
    assert kept.tolist() == [[True, True, True, False]]


def test_of_tokens_tied_at_the_edge_of_the_nucleus_the_lower_ids_stay():
    kept = filtered(torch.zeros(1, 4), SamplingConfig(1.0, top_p=0.5)).isfinite()
    assert kept.tolist() == [[True, True, False, False]]


def test_most_probable_token_always_stays():
    for sampling in (SamplingConfig(1.0, top_p=1e-9), SamplingConfig(1.0, top_k=1), SamplingConfig(1e-3)):
        probabilities = filtered(torch.tensor([[0.1, 2.0, 0.3]]), sampling).softmax(-1)
        assert probabilities.tolist() == [[0, 1, 0]]


@pytest.mark.parametrize("temperature", [1e-3, 1e-38])
def test_temperature_near_zero_is_the_argmax(temperature):
    logits = torch.tensor([[60.0, 70.0, 69.0], [-70.0, -80.0, -60.0]])
    chosen = Sampler(SamplingConfig(temperature), 2)(logits, at_depths(0, 1), 0)
    assert chosen.tolist() == [1, 2]


def test_largest_seed_is_a_seed():
    assert Sampler(SamplingConfig(1.0, seed=2**63 - 1), 1)(torch.zeros(1, 9), at_depths(0), 0) < 9


def at_depths(*depth: int) -> DraftTree:
    """Nodes at these depths, whatever their tokens."""
    zeros = torch.zeros(len(depth), dtype=torch.long)
    return DraftTree(zeros, zeros - 1, torch.tensor(depth), torch.eye(len(depth), dtype=torch.bool))


def test_sampler_noise_does_not_depend_on_how_many_rows_are_asked_for():
    sampling = SamplingConfig(1.0, seed=11)
    logits = torch.randn(20, 50, generator=torch.Generator().manual_seed(0))
    one_by_one, at_once, in_rounds = Sampler(sampling, 1), Sampler(sampling, 20), Sampler(sampling, 9)
    singly = [int(one_by_one(logits[n : n + 1], at_depths(0), n)) for n in range(20)]
    assert at_once(logits, at_depths(*range(20)), 0).tolist() == singly
    first, chosen = 0, []
    for kept, depth in ((1, 5), (4, 6), (1, 1), (6, 9), (8, 8)):  # looks `depth` rows ahead, keeps fewer
        ahead = torch.arange(depth).clamp(max=20 - first - 1)
        chosen += in_rounds(logits[first + ahead], at_depths(*ahead.tolist()), first).tolist()[:kept]
        first += kept
    assert chosen == singly


def test_tree_nodes_of_one_depth_share_their_noise():
    sampler, logits = Sampler(SamplingConfig(1.0, seed=1), 2), torch.zeros(3, 1000)
    chosen = sampler(logits, at_depths(0, 1, 1), 5).tolist()
    assert chosen[1] == chosen[2] != chosen[0]


def test_seed_decides_the_sample():
    logits, nodes = torch.zeros(8, 1000), at_depths(*range(8))
    draws = [Sampler(SamplingConfig(1.0, seed=seed), 8)(logits, nodes, 0).tolist() for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


def test_temperature_zero_is_the_argmax():
    choose = chooser(SamplingConfig())
    assert choose is greedy
    logits = torch.tensor([[0.1, 0.3, 0.2], [5.0, 1.0, 5.0]])
    assert choose(logits, at_depths(0, 1), 7).tolist() == [1, 0], "a tie goes to the lower id"


@pytest.mark.parametrize(
    "setting",
    [
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": math.nan},
        {"top_k": -1},
        {"seed": -1},
        {"seed": 2**63},
    ],
)
def test_sampling_settings_out_of_range_are_refused(setting):
    (name,) = setting
    with pytest.raises(ConfigError, match=name):
        SamplingConfig(**setting)


# ---- the joint distribution of what comes out

VOCAB, START = 5, 0


class MarkovTarget:
    """Logits after a token are a row of a table [V, V]: the exact distribution of any continuation is known."""

    def __init__(self, table: Tensor):
        self.table, self.model = table, SimpleNamespace(device=table.device)

    def prefill(self, prompt: Tensor, room: int, known: int = 0, on_block=None) -> Tensor:
        return self.table[prompt[-1:]]

    def verify(self, tree: DraftTree) -> Tensor:
        return self.table[tree.tokens]

    def commit(self, path: Tensor) -> None:
        pass


class FixedDrafter(Drafter):
    """Proposes the same shape and tokens below whatever root; sometimes right, since some tokens are likely."""

    def __init__(self, parents: list[int], tokens: list[int]):
        self._tree = DraftTree.from_parents(torch.tensor([START, *tokens]), torch.tensor([-1, *parents]))

    def prefill(self, prompt: Tensor, first: Tensor, room: int, known: int = 0, on_block=None) -> None:
        self._root = first

    def propose(self, growth: Growth) -> DraftTree:
        tokens = self._tree.tokens.clone()
        tokens[0] = self._root
        return DraftTree(tokens, self._tree.parents, self._tree.depth, self._tree.ancestors)

    def commit(self, accepted: Accepted) -> None:
        self._root = accepted.bonus


DRAFTS = {
    "chain": FixedDrafter([0, 1, 2], [1, 1, 0]),
    "bushy": FixedDrafter([0, 0, 0, 1, 1, 2, 4], [1, 2, 4, 2, 0, 1, 3]),
}
RULES = {
    "temperature": SamplingConfig(0.9),
    "cold": SamplingConfig(0.4),
    "top-p": SamplingConfig(1.0, top_p=0.75),
    "top-k": SamplingConfig(1.2, top_k=2),
    "both": SamplingConfig(1.5, top_p=0.9, top_k=3),
}


def markov_table() -> Tensor:
    return torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(8)) * 1.2


def run(method: str, target: MarkovTarget, drafter, sampling: SamplingConfig, new_tokens: int = 3) -> Output:
    output = Output(torch.tensor([START]), new_tokens, frozenset(), (), str, choose=chooser(sampling, depth=3))
    drafter = drafter if method == "speculative" else Drafter()
    for _ in decode(EagerBackend(target, drafter, NoRetrieval(), SpecExtendConfig(tree=TreeConfig(7, 3))), output):
        pass
    return output


def exact_distribution(table: Tensor, sampling: SamplingConfig) -> dict[tuple[int, ...], float]:
    after = [naive_filtered(row, sampling) for row in table.tolist()]
    return {
        (a, b, c): after[START][a] * after[a][b] * after[b][c] for a, b, c in itertools.product(range(VOCAB), repeat=3)
    }


def p_value(counts: Counter, exact: dict, total: int) -> float:
    """Chi-square test; cells expected fewer than 5 times are pooled."""
    assert all(exact[cell] > 0 for cell in counts), "an impossible continuation was drawn"
    large = [cell for cell, p in exact.items() if p * total >= 5]
    observed = [counts[cell] for cell in large]
    expected = [exact[cell] * total for cell in large]
    rest = total - sum(expected)
    if rest > 5:
        observed, expected = [*observed, total - sum(observed)], [*expected, rest]
    statistic = sum((o - e) ** 2 / e for o, e in zip(observed, expected, strict=True))
    return float(chi2.sf(statistic, len(expected) - 1))


@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("rule", RULES)
def test_joint_distribution_of_the_first_three_tokens_is_the_targets(rule, draft):
    target, total = MarkovTarget(markov_table()), 6000
    outputs = [run("speculative", target, DRAFTS[draft], replace(RULES[rule], seed=seed)) for seed in range(total)]
    assert any(one.rounds[0].accepted == 2 for one in outputs) and any(not one.rounds[0].accepted for one in outputs)
    counts = Counter(tuple(one.token_ids) for one in outputs)
    assert p_value(counts, exact_distribution(target.table, RULES[rule]), total) > 1e-3


def test_chi_square_notices_a_wrong_rule():
    # guards the test above: a temperature 8 % off fails it
    target, total = MarkovTarget(markov_table()), 6000
    wrong = SamplingConfig(0.97)
    outputs = [run("speculative", target, DRAFTS["bushy"], replace(wrong, seed=seed)) for seed in range(total)]
    counts = Counter(tuple(one.token_ids) for one in outputs)
    assert p_value(counts, exact_distribution(target.table, RULES["temperature"]), total) < 1e-3


@pytest.mark.parametrize("draft", DRAFTS)
def test_speculative_draws_what_autoregressive_draws_seed_by_seed(draft):
    target = MarkovTarget(markov_table())
    for seed in range(60):
        sampling = SamplingConfig(0.9, seed=seed)
        expected = run("autoregressive", target, None, sampling, 12).token_ids
        assert run("speculative", target, DRAFTS[draft], sampling, 12).token_ids == expected


@pytest.mark.parametrize("draft", DRAFTS)
def test_greedy_output_is_the_only_one_possible(draft):
    target, expected, newest = MarkovTarget(markov_table()), [], START
    for _ in range(12):
        newest = int(target.table[newest].argmax())
        expected.append(newest)
    for seed in range(3):
        assert run("speculative", target, DRAFTS[draft], SamplingConfig(seed=seed), 12).token_ids == expected

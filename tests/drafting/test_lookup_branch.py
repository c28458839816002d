"""A branch out of the text itself: the longest earlier match, what it promises, and how it joins a tree."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from specextend.config import SpecExtendConfig, TreeConfig
from specextend.drafting.lookup_branch import LONGEST_MATCH, LookupBranch
from specextend.errors import ConfigError
from specextend.trees.host_tree import HostTree
from specextend.trees.tree import DraftTree

TEXTS = st.lists(st.integers(0, 3), min_size=1, max_size=60)


def matches(text: list[int]) -> dict[int, int]:
    """By place of what followed: how many tokens before it are the newest ones, most that count."""
    found = {}
    for after in range(1, len(text)):
        length = 0
        while length < min(after, LONGEST_MATCH) and text[after - 1 - length] == text[-1 - length]:
            length += 1
        if length:
            found[after] = length
    return found


@given(TEXTS, TEXTS)
def test_a_branch_is_what_followed_a_match_and_the_longest_of_the_latest_places(begins, goes_on):
    branch = LookupBranch(5)
    branch.begin(begins)
    branch.extend(goes_on)
    text = begins + goes_on
    found, known = branch.look(), matches(text)
    if not known:
        assert not found.tokens
        return
    assert known[branch._after] == branch._match
    assert branch._match >= min(max(known.values()), 3)  # no n-gram that is looked for is overlooked
    latest = max(after for after, length in known.items() if length >= min(max(known.values()), 3))
    assert branch._match >= known[latest]
    if found.tokens:
        endless = [*text]
        for index in range(len(found.tokens)):
            endless.append(endless[branch._after + index])
        assert list(found.tokens) == endless[len(text) :] and len(found.tokens) == len(found.reach) <= 5
        assert (np.diff(found.reach) <= 0).all() and (found.reach < 0).all()


@given(TEXTS, TEXTS)
def test_text_that_comes_piece_by_piece_is_known_as_text_that_comes_at_once(begins, goes_on):
    at_once, by_piece = LookupBranch(4), LookupBranch(4)
    at_once.begin(begins + goes_on)
    by_piece.begin(begins)
    by_piece.extend(goes_on)
    assert (at_once._after, at_once._match) == (by_piece._after, by_piece._match)


@given(st.lists(st.tuples(st.integers(0, 60), TEXTS, TEXTS), min_size=1, max_size=4))
def test_a_text_that_begins_like_the_last_is_known_as_if_there_had_been_no_other(prompts):
    branch, text = LookupBranch(4), []
    for shared, begins, goes_on in prompts:
        text = text[:shared] + begins
        fresh = LookupBranch(4)
        for one in (branch, fresh):
            one.begin(text)
        assert branch._indices == fresh._indices
        for one in (branch, fresh):
            one.extend(goes_on)
        assert branch._indices == fresh._indices and branch.__dict__.keys() == fresh.__dict__.keys()
        assert (branch.look().tokens, branch._after, branch._match) == (fresh.look().tokens, fresh._after, fresh._match)
        text = text + goes_on


def test_what_is_promised_follows_what_came_of_it():
    def expected(text: list[int]) -> float:
        branch = LookupBranch(4)
        branch.begin([0, 1, 2])
        branch.extend(text)
        return float(np.exp(branch.look().reach[0])) if branch.look().tokens else 0.0

    repeats = list(range(7)) * 30
    random = np.random.default_rng(0).integers(0, 6, 210).tolist()
    assert expected(repeats) > 0.9
    assert expected(random + [0, 1, 2, 3]) < 0.4


def test_a_text_that_repeats_itself_is_foretold_beyond_its_end():
    branch = LookupBranch(7)
    branch.begin([5, 6])
    branch.extend([5, 6] * 8)
    assert list(branch.look().tokens) == [5, 6, 5, 6, 5, 6, 5]


def test_a_new_text_forgets_the_last_one():
    branch = LookupBranch(3)
    branch.begin([1, 2, 3] * 20)
    branch.begin([7, 8, 9])
    assert not branch.look().tokens


@st.composite
def trees(draw) -> HostTree:
    count = draw(st.integers(1, 12))
    parents = [-1, *(draw(st.integers(0, node - 1)) for node in range(1, count))]
    steps = [0.0, *(draw(st.floats(-3, -0.01)) for _ in range(1, count))]
    reach = [0.0] * count
    for node in range(1, count):
        reach[node] = reach[parents[node]] + steps[node]
    tokens = [100]
    for node in range(1, count):  # no two children of a node have one token
        taken = [tokens[other] for other in range(1, node) if parents[other] == parents[node]]
        tokens.append(next(token for token in range(20) if token not in taken))
    tree = DraftTree.from_parents(torch.tensor(tokens), torch.tensor(parents))
    return HostTree(tree.tokens.numpy(), np.array(parents), tree.depth.numpy(), np.array(steps), np.array(reach))


def paths(tree: HostTree) -> dict[tuple[int, ...], float]:
    """What leads from the root to every node, and the node's chance."""
    return {
        tuple(tree.tokens[row].tolist()): chance
        for row, chance in zip(tree.ancestors(), tree.reach.tolist(), strict=True)
    }


@given(trees(), st.lists(st.tuples(st.integers(0, 4), st.floats(-2, -0.01)), max_size=6), st.integers(0, 18))
def test_a_branch_joins_a_tree_without_a_node_twice_and_parents_outrank_their_children(tree, branch, nodes):
    tokens, steps = [token for token, _ in branch], [step for _, step in branch]
    whole = tree.joined(tokens, np.cumsum(steps))
    own = {tuple([100, *tokens[: end + 1]]) for end in range(len(tokens))}
    assert paths(whole).keys() == paths(tree).keys() | own and len(paths(whole)) == len(whole)
    assert all(paths(whole)[path] >= chance - 1e-12 for path, chance in paths(tree).items())
    for end, hope in enumerate(np.cumsum(steps)):
        assert paths(whole)[tuple([100, *tokens[: end + 1]])] >= hope - 1e-12
    assert (whole.reach[1:] <= whole.reach[whole.parents[1:]]).all()
    kept = whole.most_probable(nodes)
    assert len(kept) == min(nodes + 1, len(whole)) and (kept.parents[1:] < np.arange(1, len(kept))).all()
    assert paths(kept).items() <= paths(whole).items()
    assert sorted(kept.reach, reverse=True) == sorted(whole.reach, reverse=True)[: len(kept)]
    drafted = kept.on(torch.device("cpu"))
    again = DraftTree.from_parents(drafted.tokens, drafted.parents)
    assert torch.equal(again.ancestors, drafted.ancestors) and torch.equal(again.depth, drafted.depth)


def test_a_branch_is_a_matter_of_priced_trees():
    with pytest.raises(ConfigError, match="priced trees alone"):
        TreeConfig(lookup_branch=True)


def test_text_that_repeats_itself_is_decoded_in_few_rounds_whatever_the_draft_says(make_model, opposed, make_engine):
    """The draft is always wrong, and pauses; the branch goes on without it."""
    target = make_model("gqa")
    tree = TreeConfig(8, 6, 0.0, rule="price", lookup_branch=True)
    engine = make_engine(target, opposed(target), SpecExtendConfig.specextend(draft_cache="full", tree=tree))
    prompt = torch.tensor([3, 1, 4, 1, 5] * 6)

    def again(logits_processor_input, scores):
        """The target is made to say the text again."""
        place = logits_processor_input.shape[1] % 5
        wanted = torch.full_like(scores, -torch.inf)
        wanted[:, [3, 1, 4, 1, 5][place]] = 0.0
        return wanted

    result = engine.generate(prompt, 60, processors=[again])
    assert result.token_ids == [3, 1, 4, 1, 5] * 12
    assert len(result.rounds) < 40 and max(one.accepted for one in result.rounds) >= 3

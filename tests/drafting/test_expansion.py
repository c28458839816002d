"""Draft trees: ancestors at every depth, and the OPT-Tree expansion against a straight one without pruning."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from specextend.config import TreeConfig
from specextend.drafting.expansion import Level, grow
from specextend.errors import ConfigError
from specextend.trees.growth import Growth
from specextend.trees.tree import DraftTree

PARENTS = st.lists(st.floats(0, 1, exclude_max=True), max_size=60).map(
    lambda draws: [-1] + [int(draw * node) for node, draw in enumerate(draws, start=1)]
)


def walk_up(parents: list[int], node: int) -> set[int]:
    """The node and its ancestors, by recursion."""
    return {node} | (walk_up(parents, parents[node]) if parents[node] >= 0 else set())


@given(PARENTS)
def test_ancestors_and_depth_are_right_at_every_depth(parents):
    tree = DraftTree.from_parents(torch.arange(len(parents)), torch.tensor(parents))
    for node in range(len(parents)):
        path = walk_up(parents, node)
        assert set(tree.ancestors[node].nonzero()[:, 0].tolist()) == path
        assert int(tree.depth[node]) == len(path) - 1


def test_ancestors_of_a_deep_chain_with_siblings_hold_no_siblings():
    # at depth 7 a node has 7 ancestors; the authors' public code lets it see 17 to 20
    # two children per level, the first of which goes on
    parents = [-1] + [max(0, 2 * ((node - 1) // 2) - 1) for node in range(1, 15)]
    tree = DraftTree.from_parents(torch.arange(15), torch.tensor(parents))
    assert tree.depth.tolist() == [0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7]
    assert tree.ancestors.sum(-1).tolist() == [depth + 1 for depth in tree.depth.tolist()]


def test_root_tree_is_one_node_that_sees_itself():
    tree = DraftTree.root(torch.tensor(42))
    assert len(tree) == 1 and tree.tokens.tolist() == [42] and tree.parents.tolist() == [-1]
    assert tree.depth.tolist() == [0] and tree.ancestors.tolist() == [[True]]


# ---- growing


class ScriptedDraft:
    """A draft whose distribution after a path of tokens is fixed by `table(path)` [V], probabilities.

    As an `expand` it keeps what `grow` hands out and checks `Level` on the way.
    """

    def __init__(self, table):
        self.table = table
        self.levels: list[Level] = []
        self._paths: list[list[tuple[int, ...]]] = [[()]]

    def logprobs(self, path: tuple[int, ...]) -> Tensor:
        return self.table(path).log()

    def __call__(self, level: Level) -> Tensor:
        self.levels.append(level)
        above = self._paths[-1]
        paths = [(*above[parent], token) for parent, token in zip(level.parents, level.tokens.tolist(), strict=True)]
        handed = list(itertools.chain(*self._paths[1:], paths))
        assert level.depth == len(self._paths)
        assert level.visible.shape == (len(paths), len(handed))
        assert len(set(handed)) == len(handed), "a node was handed out twice"
        for row, path in zip(level.visible.tolist(), paths, strict=True):
            assert [handed[i] for i, seen in enumerate(row) if seen] == [path[: n + 1] for n in range(len(path))]
        self._paths.append(paths)
        return torch.stack([self.logprobs(path) for path in paths])


def straight_opt_tree(draft: ScriptedDraft, config: TreeConfig) -> tuple[list[float], int]:
    """OPT-Tree as the paper has it: probabilities of the kept paths, descending, and the levels looked at.

    Every level keeps the best `nodes` children of the whole level before; nothing is pruned in between.
    """
    seen: dict[tuple[int, ...], float] = {}
    level = {(): 1.0}
    expected, depth = 0.0, 0
    while depth < config.max_depth:
        depth += 1
        children = {}
        for path, probability in level.items():
            after = draft.logprobs(path).double().exp()
            children |= {(*path, token): probability * float(p) for token, p in enumerate(after)}
        level = dict(sorted(children.items(), key=lambda item: -item[1])[: config.nodes])
        seen |= level
        best = sorted(seen.values(), reverse=True)[: config.nodes]
        gain, expected = sum(best) - expected, sum(best)
        if gain < config.threshold or not level:
            break
    return best, depth


def random_table(vocab: int, sharpness: float, seed: int):
    """Independent random distributions per path; each path has its own."""

    def table(path):
        generator = torch.Generator().manual_seed(hash((seed, *path)) % 2**31)
        return (torch.randn(vocab, generator=generator, dtype=torch.double) * sharpness).softmax(-1)

    return table


def path_probabilities(tree: DraftTree, draft: ScriptedDraft) -> list[float]:
    """Of every node but the root, from the draft itself."""
    tokens, probabilities = tree.tokens.tolist(), []
    for node in range(1, len(tree)):
        path = [tokens[n] for n in sorted(walk_up(tree.parents.tolist(), node)) if n]
        steps = [float(draft.logprobs(tuple(path[:n]))[path[n]].exp()) for n in range(len(path))]
        probabilities.append(float(torch.tensor(steps, dtype=torch.double).prod()))
    return probabilities


def check_tree(tree: DraftTree, config: TreeConfig) -> None:
    parents, tokens = tree.parents.tolist(), tree.tokens.tolist()
    assert parents[0] == -1 and all(0 <= parent < node for node, parent in enumerate(parents) if node)
    assert 1 <= len(tree) - 1 <= config.nodes
    assert int(tree.depth.max()) <= config.max_depth
    assert [len(walk_up(parents, node)) - 1 for node in range(len(tree))] == tree.depth.tolist()
    assert len({(parents[n], tokens[n]) for n in range(1, len(tree))}) == len(tree) - 1, "a child occurs twice"


def grow_from(draft: ScriptedDraft, config: TreeConfig) -> DraftTree:
    return grow(torch.tensor(0), draft.logprobs(())[None], draft, Growth.of(config))


@settings(max_examples=150)
@given(
    vocab=st.integers(1, 7),
    sharpness=st.sampled_from([0.1, 1.0, 3.0, 8.0]),
    seed=st.integers(0, 10**6),
    nodes=st.integers(1, 30),
    max_depth=st.integers(1, 5),
    threshold=st.sampled_from([0.0, 0.2, 0.7]),
)
def test_grown_tree_holds_the_most_probable_paths(vocab, sharpness, seed, nodes, max_depth, threshold):
    draft, config = ScriptedDraft(random_table(vocab, sharpness, seed)), TreeConfig(nodes, max_depth, threshold)
    tree = grow_from(draft, config)
    check_tree(tree, config)
    best, depth = straight_opt_tree(draft, config)
    assert sorted(path_probabilities(tree, draft), reverse=True) == pytest.approx(best, rel=1e-9)
    assert len(draft.levels) <= depth - 1, "a level was run that the stop rule forbids"


@settings(max_examples=100)
@given(
    sharpness=st.sampled_from([0.1, 1.0, 3.0, 8.0]),
    seed=st.integers(0, 10**6),
    nodes=st.integers(1, 30),
    max_depth=st.integers(1, 5),
    floor=st.sampled_from([0.02, 0.1, 0.3, 0.9]),
)
def test_nodes_hardly_ever_reached_are_left_out_and_no_others(sharpness, seed, nodes, max_depth, floor):
    draft = ScriptedDraft(random_table(5, sharpness, seed))
    tree = grow_from(draft, TreeConfig(nodes, max_depth, 0, floor))
    best, _ = straight_opt_tree(draft, TreeConfig(nodes, max_depth, 0))
    wanted = [probability for probability in best if probability >= floor]
    assert sorted(path_probabilities(tree, draft), reverse=True) == pytest.approx(wanted, rel=1e-9)


@settings(max_examples=60)
@given(vocab=st.integers(1, 5), nodes=st.integers(1, 40), max_depth=st.integers(1, 6), kind=st.integers(0, 2))
def test_ties_never_lose_a_parent(vocab, nodes, max_depth, kind):
    tables = (
        lambda path: torch.full((vocab,), 1 / vocab, dtype=torch.double),  # all children of a level alike
        lambda path: torch.eye(vocab, dtype=torch.double)[len(path) % vocab],  # chains of probability 1, siblings 0
        lambda path: torch.tensor([0.5, 0.5] if vocab > 1 and len(path) % 2 else [1.0, 0.0], dtype=torch.double),
    )
    draft, config = ScriptedDraft(tables[kind]), TreeConfig(nodes, max_depth, 0)
    tree = grow_from(draft, config)
    check_tree(tree, config)
    best, _ = straight_opt_tree(draft, config)
    assert sum(path_probabilities(tree, draft)) == pytest.approx(sum(best))


def test_certain_chain_is_followed_to_the_last_level():
    chain = ScriptedDraft(lambda path: torch.eye(6, dtype=torch.double)[(len(path) + 1) % 6])
    tree = grow_from(chain, TreeConfig(nodes=5, max_depth=5, threshold=0.7))
    assert tree.tokens.tolist() == [0, 1, 2, 3, 4, 5] and tree.depth.tolist() == [0, 1, 2, 3, 4, 5]


def test_log_probabilities_rounded_above_zero_keep_parents_before_children():
    after = torch.tensor([[1e-7, -20.0, -30.0]])  # a float32 log-softmax may do this
    tree = grow(torch.tensor(1), after, lambda level: after.expand(len(level.tokens), 3), Growth(3, 4, 0))
    check_tree(tree, Growth(3, 4, 0))
    assert tree.tokens.tolist() == [1, 0, 0, 0] and tree.parents.tolist() == [-1, 0, 1, 2]


@pytest.mark.parametrize("threshold, levels", [(0.0, 4), (0.5, 4), (0.52, 3), (0.63, 3), (0.65, 2), (0.81, 1), (5, 1)])
def test_growing_stops_when_a_level_adds_less_than_the_threshold(threshold, levels):
    # a chain of certainty 0.8: its levels add 0.8, 0.64, 0.512, 0.41
    chain = ScriptedDraft(lambda path: torch.tensor([0.8, 1e-30], dtype=torch.double))
    tree = grow_from(chain, TreeConfig(nodes=40, max_depth=4, threshold=threshold))
    assert len(chain.levels) == levels - 1, "the last level is looked at, not run"
    assert int(tree.depth.max()) == levels, "the level that adds too little still belongs to the tree"


@pytest.mark.parametrize("nodes", [1, 2, 50, 200])
def test_tree_is_filled_when_there_are_enough_paths(nodes):
    tree = grow_from(ScriptedDraft(random_table(30, 1.0, 0)), TreeConfig(nodes, 10, 0))
    assert len(tree) == nodes + 1


def test_vocabulary_smaller_than_the_tree_is_no_trouble():
    tree = grow_from(ScriptedDraft(random_table(2, 1.0, 0)), TreeConfig(50, 3, 0))
    assert len(tree) == 1 + 2 + 4 + 8


@pytest.mark.parametrize(
    "setting",
    [{"nodes": 0}, {"max_depth": 0}, {"threshold": -0.1}, {"threshold": float("nan")}, {"min_probability": 1.0}],
)
def test_tree_settings_out_of_range_are_refused(setting):
    (name,) = setting
    with pytest.raises(ConfigError, match=name):
        TreeConfig(**setting)

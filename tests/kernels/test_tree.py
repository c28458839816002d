"""Trees grown, judged and compacted by kernels against the definitions in plain PyTorch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from specextend.config import TreeConfig  # noqa: E402
from specextend.drafting.expansion import Level, grow  # noqa: E402
from specextend.kernels.tree import TreeBuffers, TreeNodes  # noqa: E402
from specextend.kernels.tree_attention import pack_mask  # noqa: E402
from specextend.policy.calibration import Calibration  # noqa: E402
from specextend.trees.acceptance import accept  # noqa: E402
from specextend.trees.growth import Growth  # noqa: E402
from specextend.trees.host_tree import HostTree  # noqa: E402
from specextend.trees.tree import DraftTree  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Draft:
    """Logits that are a function of the path so far, whatever the order in which nodes are handed out."""

    def __init__(self, vocab: int, sharpness: float, seed: int):
        self.vocab, self._sharpness, self._seed = vocab, sharpness, seed
        self._paths: list[tuple[int, ...]] = [()]

    def root(self) -> torch.Tensor:
        return self._logits([()])

    def level(self, tokens: torch.Tensor, below: torch.Tensor) -> torch.Tensor:
        steps = zip(tokens.tolist(), below.tolist(), strict=True)
        self._paths = [(*self._paths[parent], token) for token, parent in steps]
        return self._logits(self._paths)

    def _logits(self, paths) -> torch.Tensor:
        rows = []
        for path in paths:
            generator = torch.Generator().manual_seed(hash((self._seed, *path)) % 2**31)
            rows.append(torch.randn(self.vocab, generator=generator) * self._sharpness)
        return torch.stack(rows).to(DEVICE)


def by_kernels(config: TreeConfig, draft: Draft, buffers: TreeBuffers | None = None) -> TreeBuffers:
    buffers = buffers or TreeBuffers(config, draft.vocab, DEVICE)
    buffers.sprout()
    for level in range(config.max_depth):
        logits = draft.level(buffers.level_tokens, buffers.below) if level else draft.root()
        buffers.add_level(logits, level)
    buffers.finish(torch.tensor(7, device=DEVICE))
    return buffers


def by_definition(config: TreeConfig, draft: Draft) -> DraftTree:
    def expand(level: Level) -> torch.Tensor:
        return draft.level(level.tokens, level.parents).log_softmax(-1)

    return grow(torch.tensor(7, device=DEVICE), draft.root().log_softmax(-1), expand, Growth.of(config))


def as_tree(found: TreeBuffers) -> DraftTree:
    """The used nodes of a tree; raises where bits, depths or order contradict the parents."""
    kept = found.used.bool().nonzero()[:, 0]
    place = {int(node): index for index, node in enumerate(kept)}
    parents = torch.tensor([place[int(above)] if above >= 0 else -1 for above in found.parents[kept]])
    tree = DraftTree.from_parents(found.tokens[kept].cpu(), parents)
    assert all(above < index for index, above in enumerate(parents.tolist()))
    assert torch.equal(tree.depth, found.depth[kept].cpu().long())
    every = torch.zeros(len(kept), found.slots, dtype=torch.bool)
    every[:, kept.cpu()] = tree.ancestors
    assert torch.equal(found.ancestor_bits[kept].cpu(), pack_mask(every))
    return tree


def paths(tree: DraftTree) -> set[tuple[int, ...]]:
    return {tuple(tree.tokens[row].tolist()) for row in tree.ancestors}


CASES = [
    (TreeConfig(12, 4, 0.1), 40, 2.0),
    (TreeConfig(50, 4, 0.0), 300, 1.0),
    (TreeConfig(50, 10, 0.7), 300, 4.0),
    (TreeConfig(12, 8, 0.35, 0.06), 97, 3.0),
    (TreeConfig(1, 3, 0.0), 20, 1.0),
    (TreeConfig(127, 2, 0.0), 200, 1.0),
]


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("config", "vocab", "sharpness"), CASES)
def test_the_tree_is_that_of_the_definition(config, vocab, sharpness, seed):
    wanted = by_definition(config, Draft(vocab, sharpness, seed))
    found = as_tree(by_kernels(config, Draft(vocab, sharpness, seed)))
    assert paths(found) == paths(wanted) and len(found) == len(wanted)


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(lambda vocab: torch.randn(vocab) * 3, id="as a model's"),
        pytest.param(lambda vocab: torch.zeros(vocab), id="all equal"),
        pytest.param(lambda vocab: torch.arange(vocab).remainder(2000).div(50).floor(), id="many equal"),
        pytest.param(lambda vocab: torch.arange(vocab) / 100.0, id="rising: a chunk holds them all"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_children_are_the_most_probable_the_first_of_equals_first(row, dtype):
    torch.manual_seed(0)
    vocab, width = 9001, 50
    logits = row(vocab).to(DEVICE, dtype)[None]
    buffers = TreeBuffers(TreeConfig(width, 1, 0.0), vocab, DEVICE)
    buffers.sprout()
    buffers.add_level(logits, 0)
    wanted = logits[0].sort(descending=True, stable=True).indices[:width]
    assert set(buffers.child_tokens[0, :width].tolist()) == set(wanted.tolist())
    scores = logits[0].double().log_softmax(-1)[buffers.child_tokens[0, :width].long()]
    torch.testing.assert_close(buffers.child_scores[0, :width].double(), scores, atol=2e-3, rtol=1e-4)


@pytest.mark.parametrize("seed", range(4))
def test_verdict_and_compaction_are_those_of_the_definition(seed):
    found = by_kernels(TreeConfig(20, 5, 0.0), Draft(30, 6.0, seed))
    tree = as_tree(found)
    chosen = torch.randint(0, 30, (found.slots,), generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    agreed = (
        tree.ancestors[int(tree.depth.argmax())].nonzero()[:, 0][: 2 + seed].to(DEVICE)
    )  # the target follows so far
    chosen[found.parents[agreed[1:]].long()] = found.tokens[agreed[1:]]

    wanted = accept(tree, chosen.cpu())
    length = torch.tensor(11, device=DEVICE)
    found.accept(chosen, length)
    count = len(wanted.path)
    assert count > 1 and int(found.count) == count and int(length) == 11 + count
    assert found.path[:count].tolist() == wanted.path.tolist()
    assert found.emitted[:count].tolist() == [*wanted.tokens.tolist(), int(wanted.bonus)]
    assert int(found.newest) == int(wanted.path[-1])

    keys, values = torch.randn(2, 3, 2, 60, 16, device=DEVICE)
    before = keys.clone(), values.clone()
    found.compact(keys, values)
    for part, old in zip((keys, values), before, strict=True):
        expected = old.clone()
        expected[:, :, 11 : 11 + count] = old[:, :, 11 + wanted.path]
        assert torch.equal(part, expected)


def test_one_set_of_buffers_serves_tree_after_tree():
    config = TreeConfig(12, 4, 0.1)
    buffers = by_kernels(config, Draft(40, 2.0, 0))
    again, fresh = by_kernels(config, Draft(40, 2.0, 1), buffers), by_kernels(config, Draft(40, 2.0, 1))
    for name in ("tokens", "parents", "depth", "used", "ancestor_bits"):
        assert torch.equal(getattr(again, name), getattr(fresh, name)), name


@pytest.mark.parametrize("seed", range(3))
def test_calibrated_trees_are_those_of_the_definition_and_stand_in_the_sheet(seed):
    random = np.random.default_rng(seed)
    calibration, config = Calibration(), TreeConfig(12, 4, 0.0, rule="price")
    for _ in range(30):
        p = random.uniform(0.02, 0.98, 20)
        calibration.learn(np.log(p), random.uniform(size=20) < p**2)
    growth = Growth(12, 4, 0.02, 0.01, calibration)

    def expand(level: Level) -> torch.Tensor:
        return draft.level(level.tokens, level.parents).log_softmax(-1)

    draft = Draft(97, 3.0, seed)
    wanted = grow(torch.tensor(7, device=DEVICE), draft.root().log_softmax(-1), expand, growth)

    buffers = TreeBuffers(config, 97, DEVICE)
    buffers.bounds.copy_(torch.tensor([growth.threshold, np.log(growth.floor), *calibration.table]))
    found = by_kernels(config, Draft(97, 3.0, seed), buffers)
    assert paths(as_tree(found)) == paths(wanted)

    assert found.look() == bool(found.sheet[0] > 0) and torch.equal(found.seen, found.sheet.cpu())
    levels, sheet = int(found.sheet[1]), found.sheet[2:].view(5, -1).cpu()
    assert sheet[1].tolist() == found.parents.tolist()
    rows = sheet[:, sheet[4] > -torch.inf]
    assert levels == int(wanted.depth.max()) or levels == int(wanted.depth.max()) + 1  # the last one may add nothing
    assert rows[0, 1:].tolist() == as_tree(found).tokens[1:].tolist()  # the root is known
    rows[0, 0] = 7
    scores = {tuple(wanted.tokens[row].tolist()): at for at, row in enumerate(wanted.ancestors)}
    for at, row in enumerate(as_tree(found).ancestors):
        same = scores[tuple(rows[0][row].long().tolist())]
        assert rows[2, at] == wanted.depth[same]
        torch.testing.assert_close(
            rows[3:, at], torch.stack((wanted.logprobs, wanted.reach))[:, same], atol=1e-4, rtol=1e-4
        )


def test_a_part_of_a_tree_holds_its_most_probable_nodes_and_shares_the_verdict():
    config, draft = TreeConfig(15, 4, 0.0, rule="price"), Draft(97, 3.0, 0)
    buffers = TreeBuffers(config, 97, DEVICE)
    buffers.bounds.copy_(torch.tensor([0.0, -torch.inf, *Calibration().table]))
    whole = by_kernels(config, draft, buffers)
    part = TreeNodes(6, 0, DEVICE, verdict=whole)
    wanted = HostTree.of(by_definition(TreeConfig(15, 4, 0.0), Draft(97, 3.0, 0))).most_probable(5)
    part.put(wanted.tokens, wanted.parents, wanted.depth, wanted.ancestor_bits())
    assert paths(as_tree(part)) == paths(wanted.on(DEVICE)) and len(as_tree(part)) == 6
    chosen, length = part.tokens[[1, *range(1, 6)]].clone(), torch.tensor(20, device=DEVICE)
    part.accept(chosen, length)
    assert int(whole.count) == int(part.count) == int(length) - 20 >= 2
    count = int(whole.count)
    part.append(torch.tensor([3], device=DEVICE), length)
    assert int(whole.count) == count + 1 and int(whole.emitted[count]) == 3 and int(length) == 21 + count


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.integers(1, 70), st.integers(0, 5))
def test_a_tree_that_the_host_puts_there_is_that_tree(seed, count, empty):
    random = np.random.default_rng(seed)
    parents = np.array([-1, *(int(random.integers(0, node)) for node in range(1, count))])
    tree = DraftTree.from_parents(torch.from_numpy(random.integers(0, 2**40, count)), torch.from_numpy(parents))
    nodes = TreeNodes(count + empty, 0, DEVICE)
    places = np.arange(nodes.slots)
    nodes.put(places, places - 1, places, [(2 << place) - 1 for place in places.tolist()])  # what stood there before
    none = np.zeros(count)
    host = HostTree(tree.tokens.numpy(), parents, tree.depth.numpy(), none, none)
    nodes.put(host.tokens, host.parents, host.depth, host.ancestor_bits())
    assert nodes.used.tolist() == [1] * count + [0] * empty
    assert torch.equal(nodes.tokens[:count].cpu(), tree.tokens) and nodes.parents[:count].tolist() == parents.tolist()
    assert torch.equal(nodes.depth[:count].cpu().long(), tree.depth)
    assert torch.equal(nodes.ancestor_bits[:count, : -(-count // 32)].cpu(), pack_mask(tree.ancestors))

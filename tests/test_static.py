"""Rounds of static shape against the loop that looks at every value, on plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specextend import static
from specextend.config import RetrievalConfig, SpecExtendConfig, TreeConfig
from specextend.static import StaticRound
from specextend.tree import DraftTree, Level, grow
from specextend.verify import accept

VOCAB = 97


def table(vocab: int, sharpness: float, seed: int):
    """Log-probabilities of a draft by path: a function of the path alone."""

    def logprobs(path: tuple[int, ...]) -> torch.Tensor:
        generator = torch.Generator().manual_seed(hash((seed, *path)) % 2**31)
        return (torch.randn(vocab, generator=generator) * sharpness).log_softmax(-1)

    return logprobs


def dynamic_tree(draft, config: TreeConfig) -> DraftTree:
    paths = [()]

    def expand(level: Level) -> torch.Tensor:
        nonlocal paths
        above = paths if level.depth > 1 else [()]
        paths = [
            (*above[parent], token) for token, parent in zip(level.tokens.tolist(), level.parents.tolist(), strict=True)
        ]
        return torch.stack([draft(path) for path in paths])

    return grow(torch.tensor(0), draft(())[None], expand, config)


def static_tree(draft, config: TreeConfig) -> static.StaticTree:
    known: list[tuple[int, ...]] = []  # path of every slot handed out so far

    def expand(tokens: torch.Tensor, depth: int, visible: torch.Tensor) -> torch.Tensor:
        fresh = []
        for token, sight in zip(tokens.tolist(), visible.tolist(), strict=True):
            above = [slot for slot, seen in enumerate(sight[: len(known)]) if seen]
            fresh.append((*(known[above[-1]] if above else ()), token))
            assert len(fresh[-1]) == depth
        known.extend(fresh)
        return torch.stack([draft(path) for path in fresh])

    return static.grow(torch.tensor(0), draft(())[None], expand, config)


@settings(max_examples=80)
@given(
    sharpness=st.sampled_from([0.3, 1.0, 3.0, 8.0]),
    seed=st.integers(0, 10**6),
    nodes=st.integers(1, 20),
    max_depth=st.integers(1, 5),
    threshold=st.sampled_from([0.0, 0.2, 0.7]),
    floor=st.sampled_from([0.0, 0.05, 0.3]),
)
def test_static_tree_is_the_tree(sharpness, seed, nodes, max_depth, threshold, floor):
    draft, config = table(30, sharpness, seed), TreeConfig(nodes, max_depth, threshold, floor)
    wanted, found = dynamic_tree(draft, config), static_tree(draft, config).as_tree()
    assert torch.equal(found.tokens, wanted.tokens) and torch.equal(found.parents, wanted.parents)
    assert torch.equal(found.depth, wanted.depth) and torch.equal(found.ancestors, wanted.ancestors)


@settings(max_examples=80)
@given(seed=st.integers(0, 10**6), depth=st.integers(1, 5), vocab=st.integers(2, 6))
def test_static_verdict_is_the_verdict(seed, depth, vocab):
    config = TreeConfig(12, depth, 0)
    tree = static_tree(table(max(vocab, 12), 1.0, seed), config)
    chosen = torch.randint(0, vocab, (len(tree.tokens),), generator=torch.Generator().manual_seed(seed))
    wanted, found = accept(tree.as_tree(), chosen), static.accept(tree, chosen, depth)
    count = int(found.count)
    assert found.path[:count].tolist() == wanted.path.tolist() and len(found.path) == min(depth + 1, len(tree.tokens))
    assert found.emitted[:count].tolist() == [*wanted.tokens.tolist(), int(wanted.bonus)]


@pytest.fixture
def rounds_of(make_engine):
    """rounds_of(target, draft, config, prompt, new_tokens): tokens round by round, by `StaticRound`."""

    def run(target, draft, config, prompt, new_tokens):
        engine = make_engine(target, draft, config)
        with torch.inference_mode():
            captured, first = StaticRound.after_prefill(
                engine._target, engine._drafter, prompt, new_tokens + 200, static.PlainStaticAttention(), config
            )
            rounds = [[first]]
            while sum(map(len, rounds)) < new_tokens:
                if config.draft_cache == "retrieval" and (len(rounds) - 1) % config.retrieval.every_n_steps == 0:
                    captured.refresh()
                captured.run()
                rounds.append(captured.read())
        return rounds

    return run


@pytest.mark.parametrize("draft_cache", ["full", "retrieval"])
@pytest.mark.parametrize("kind", ["mha", "gqa"])
@pytest.mark.parametrize("length", [3, 40, 300])
def test_static_rounds_are_the_rounds_of_the_loop(
    kind, length, draft_cache, make_model, perturbed, make_engine, make_prompt, rounds_of
):
    target, prompt = make_model(kind), make_prompt(length)
    draft = perturbed(target, 0.3)
    config = SpecExtendConfig(
        flash_prefill=True, hybrid_tree_attention=True, draft_cache=draft_cache,
        tree=TreeConfig(12, 4, 0.1), retrieval=RetrievalConfig(8, 4, 2),
    )  # fmt: skip
    wanted = make_engine(target, draft, config).generate(prompt, 60)
    rounds = rounds_of(target, draft, config, prompt, 60)
    assert [token for tokens in rounds for token in tokens][:60] == wanted.token_ids
    assert [len(tokens) - 1 for tokens in rounds[1:-1]] == [one.accepted for one in wanted.rounds[:-1]]

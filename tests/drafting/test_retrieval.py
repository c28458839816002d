"""Cross-model retrieval against a direct computation from full attention weights and from drafts run from scratch."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from specextend.config import RetrievalConfig, SpecExtendConfig, TreeConfig
from specextend.drafting.retrieval import (
    CrossModelRetrieval,
    NoRetrieval,
    StreamingWindow,
    chunk_scores,
    num_chunks,
    retriever,
)
from specextend.drafting.small_lm import ClassicDrafter
from specextend.errors import ConfigError
from specextend.modeling.attention import DenseAttention, HybridAttention
from specextend.modeling.cache import DraftCache, KVCache
from specextend.modeling.target import Target
from specextend.trees.acceptance import Accepted
from specextend.trees.growth import Growth
from specextend.trees.tree import DraftTree

CPU = torch.device("cpu")
ROUTES = {"dense": DenseAttention(), "hybrid": HybridAttention()}


# ---- the attention row


def make_target(model, route: str, block: int | None) -> Target:
    cache = KVCache(model.config, torch.float32, CPU)
    return Target(model, cache, prefill_attention=ROUTES[route], tree_attention=ROUTES[route], prefill_block=block)


def last_row(hf_twin, model, tokens: Tensor) -> Tensor:
    """Head mean of the last layer's attention of the last token, from transformers' full attention weights."""
    weights = hf_twin(model, "eager")(tokens[None], output_attentions=True).attentions[-1]
    return weights[0, :, -1].mean(0)


def random_tree(nodes: int, seed: int) -> DraftTree:
    generator = torch.Generator().manual_seed(seed)
    parents = [-1] + [int(torch.randint(max(0, n - 3), n, (1,), generator=generator)) for n in range(1, nodes)]
    return DraftTree.from_parents(torch.randint(0, 97, (nodes,), generator=generator), torch.tensor(parents))


@pytest.mark.parametrize("block", [None, 16])
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("kind", ["mha", "gqa", "qwen3", "dynamic"])
def test_attention_row_equals_full_attention_weights_after_prefill_and_every_commit(
    kind, route, block, make_model, make_engine, make_prompt, hf_twin
):
    model = make_model(kind)
    make_engine(model)  # makes dynamic rope exact, as a user's engine does
    target, tokens = make_target(model, route, block), make_prompt(60 if kind != "dynamic" else 30)
    target.prefill(tokens, 60)
    torch.testing.assert_close(target.attention_row(), last_row(hf_twin, model, tokens), atol=2e-6, rtol=1e-4)
    for seed, nodes in enumerate((9, 1, 14)):
        tree = random_tree(nodes, seed)
        target.verify(tree)
        deepest = int(tree.depth.argmax())
        path = tree.ancestors[deepest].nonzero()[:, 0]
        target.commit(path)
        tokens = torch.cat((tokens, tree.tokens[path]))
        row = target.attention_row()
        assert row.dtype == torch.float32 and float(row.sum()) == pytest.approx(1, abs=1e-5)
        torch.testing.assert_close(row, last_row(hf_twin, model, tokens), atol=2e-6, rtol=1e-4)
    assert len(tokens) > 38, "no path was longer than its root"


def test_attention_row_of_a_path_that_ends_early_is_its_last_tokens(make_model, make_prompt, hf_twin):
    model, tokens = make_model("gqa"), make_prompt(40)
    target, tree = make_target(model, "hybrid", None), random_tree(12, 0)
    target.prefill(tokens, 20)
    target.verify(tree)
    target.commit(torch.tensor([0]))  # everything drafted was rejected
    tokens = torch.cat((tokens, tree.tokens[:1]))
    torch.testing.assert_close(target.attention_row(), last_row(hf_twin, model, tokens), atol=2e-6, rtol=1e-4)


# ---- chunks


@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=100), st.integers(1, 40))
def test_chunk_scores_are_plain_means(attention, chunk_size):
    scores = chunk_scores(torch.tensor(attention), chunk_size)
    chunks = [attention[start : start + chunk_size] for start in range(0, len(attention), chunk_size)]
    assert scores.tolist() == pytest.approx([sum(chunk) / len(chunk) for chunk in chunks], abs=1e-5)
    assert scores.dtype == torch.float32 and len(scores) == num_chunks(len(attention), chunk_size)


@settings(max_examples=150)
@given(
    length=st.integers(1, 200),
    newer=st.integers(0, 12),
    chunk_size=st.integers(1, 40),
    extra=st.integers(0, 8),
    sink=st.integers(0, 3),
    recent=st.integers(1, 3),
    seed=st.integers(0, 10**6),
)
def test_retrieval_keeps_sink_recent_and_the_best_chunks(length, newer, chunk_size, extra, sink, recent, seed):
    # the target has committed `newer` tokens the draft has not read yet
    attention = torch.rand(length + newer, generator=torch.Generator().manual_seed(seed))
    config = RetrievalConfig(chunk_size, sink + recent + extra, 1, sink, recent)
    positions = CrossModelRetrieval(config).select(lambda: attention, length).tolist()
    assert positions == sorted(set(positions)) and positions[0] >= 0 and positions[-1] == length - 1

    count = num_chunks(length, chunk_size)
    means = [float(attention[:length][c * chunk_size : (c + 1) * chunk_size].mean()) for c in range(count)]
    forced = {c for c in range(count) if c < sink or c >= count - recent}
    free = sorted((c for c in range(count) if c not in forced), key=lambda c: -means[c])
    expected = forced | set(free[: config.top_k - len(forced)])
    assert {position // chunk_size for position in positions} == expected
    assert len(positions) == sum(min(chunk_size, length - c * chunk_size) for c in expected), "a chunk is not whole"


def test_chunk_with_the_highest_mean_wins_not_the_one_with_the_highest_token():
    attention = torch.tensor([0.5, 0, 0, 0, 0.2, 0.2, 0.2, 0.2, 0, 0])
    positions = CrossModelRetrieval(RetrievalConfig(4, 2, 1)).select(lambda: attention, 10)
    assert positions.tolist() == [4, 5, 6, 7, 8, 9]


def test_newest_chunk_is_kept_though_nothing_attends_to_it():
    attention = torch.cat((torch.ones(64), torch.zeros(3)))
    positions = CrossModelRetrieval(RetrievalConfig(8, 1, 1)).select(lambda: attention, 67)
    assert positions.tolist() == [64, 65, 66]


def test_scores_finer_than_half_precision_still_rank():
    # summed in fp16 these chunks are all alike
    attention = torch.full((512 * 4,), 1e-4)
    attention[300 * 4 : 301 * 4] *= 1.0001
    positions = CrossModelRetrieval(RetrievalConfig(4, 2, 1)).select(lambda: attention, 2048)
    assert positions.tolist() == [*range(1200, 1204), *range(2044, 2048)]


@given(st.integers(1, 200), st.integers(1, 40), st.integers(2, 8), st.integers(0, 3))
def test_streaming_keeps_the_first_and_the_newest_chunks_and_asks_for_no_attention(length, chunk_size, top_k, sink):
    config = RetrievalConfig(chunk_size, max(top_k, sink + 1), 1, sink)
    positions = StreamingWindow.of_size(config).select(lambda: pytest.fail("attention was computed"), length).tolist()
    count, first = num_chunks(length, chunk_size), min(max(sink, 1), config.top_k - 1)
    newest = config.top_k - first
    expected = [p for p in range(length) if p // chunk_size < first or p // chunk_size >= count - newest]
    assert positions == expected and positions[-1] == length - 1
    assert len({p // chunk_size for p in positions}) == min(count, config.top_k)


def test_streaming_window_of_a_single_chunk_is_the_newest():
    assert StreamingWindow(RetrievalConfig(8, 1, 1)).select(lambda: None, 20).tolist() == [16, 17, 18, 19]


@pytest.mark.parametrize("kind, due", [("full", []), ("streaming", [0, 3, 6]), ("retrieval", [0, 3, 6])])
def test_refresh_is_due_before_the_first_round_and_every_n_after(kind, due):
    one = retriever(kind, RetrievalConfig(chunk_size=8, top_k=4, every_n_steps=3))
    assert [rounds for rounds in range(8) if one.is_due(rounds, 33)] == due
    assert isinstance(one, {"full": NoRetrieval, "streaming": StreamingWindow, "retrieval": CrossModelRetrieval}[kind])


@pytest.mark.parametrize("kind", ["streaming", "retrieval"])
def test_a_context_that_fits_is_taken_whole_once(kind):
    one = retriever(kind, RetrievalConfig(chunk_size=8, top_k=4, every_n_steps=3))
    assert [rounds for rounds in range(8) if one.is_due(rounds, 32)] == [0]
    attention = torch.rand(32)
    assert one.select(lambda: attention, 32).tolist() == list(range(32))


@pytest.mark.parametrize(
    "setting, message",
    [
        ({"chunk_size": 0}, "retrieval chunk_size is 0"),
        ({"every_n_steps": 0}, "retrieval every_n_steps is 0"),
        ({"sink": -1}, "sink is -1"),
        ({"recent": 0}, "retrieval recent is 0; give a whole number from 1"),
        ({"top_k": 3, "sink": 2, "recent": 2}, "retrieval top_k is 3; it must hold sink \\+ recent = 4"),
    ],
)
def test_retrieval_settings_out_of_range_are_refused(setting, message):
    with pytest.raises(ConfigError, match=message):
        RetrievalConfig(**setting)


# ---- the draft's working cache


class Listener:
    """Logits [T, V] of every forward pass of a draft."""

    def __init__(self, model):
        self.logits: list[Tensor] = []
        model.lm_head.register_forward_hook(lambda module, args, output: self.logits.append(output))


def make_drafter(model, working: int | None, tree: TreeConfig, route: str = "hybrid", window: int = 0):
    config = SpecExtendConfig(
        flash_prefill=route == "hybrid" or window > 0,
        hybrid_tree_attention=route == "hybrid",
        draft_cache="retrieval" if working else "full",
        draft_window=window,
        tree=tree,
        retrieval=RetrievalConfig(chunk_size=working or 1, top_k=1),
    )
    return ClassicDrafter(model, config, 97)


def from_scratch(hf_twin, model, tokens: Tensor) -> Tensor:
    """Logits [V] after `tokens` at positions 0..m-1, by transformers alone."""
    return hf_twin(model)(tokens[None]).logits[0, -1]


CHAIN = TreeConfig(nodes=4, max_depth=4, threshold=0)
POSITIONS = torch.tensor([0, 1, 2, 3, 40, 41, 42, 43, 88, 89])


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("kind", ["mha", "gqa", "qwen3", "llama3", "yarn"])
def test_draft_on_its_working_cache_is_the_draft_run_from_scratch_on_the_kept_tokens(
    kind, route, make_model, perturbed, make_prompt, hf_twin
):
    # one layer: keys and values of a token do not depend on what stands before it
    model = perturbed(make_model(kind, num_hidden_layers=1), 0)
    drafter, prompt, first = make_drafter(model, 40, CHAIN, route), make_prompt(90), torch.tensor(5)
    heard = Listener(model)
    drafter.prefill(prompt, first, 30)
    assert not heard.logits
    drafter.refresh(POSITIONS)
    tree = drafter.propose(Growth.of(CHAIN))
    kept = torch.cat((prompt[POSITIONS], first[None]))
    torch.testing.assert_close(heard.logits[0][0], from_scratch(hf_twin, model, kept), atol=1e-4, rtol=1e-4)

    # the next round: accepted tokens, and the bonus token, continue after the kept ones
    accepted = Accepted(torch.tensor([0, 1]), tree.tokens[1:2], torch.tensor(17))
    drafter.commit(accepted)
    heard.logits.clear()
    drafter.propose(Growth.of(CHAIN))
    kept = torch.cat((kept, tree.tokens[1:2], torch.tensor([17])))
    torch.testing.assert_close(heard.logits[0][0], from_scratch(hf_twin, model, kept), atol=1e-4, rtol=1e-4)

    # after a refresh those very tokens may be kept again; both are in the full cache
    drafter.commit(Accepted(torch.tensor([0]), tree.tokens[:0], torch.tensor(23)))
    positions = torch.tensor([8, 9, 89, 90, 91, 92])
    assert drafter.context == 93
    drafter.refresh(positions)
    heard.logits.clear()
    drafter.propose(Growth.of(CHAIN))
    everything = torch.cat((prompt, first[None], tree.tokens[1:2], torch.tensor([17])))
    kept = torch.cat((everything[positions], torch.tensor([23])))
    torch.testing.assert_close(heard.logits[0][0], from_scratch(hf_twin, model, kept), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("working", [None, 40])
@pytest.mark.parametrize("route", ROUTES)
def test_every_tree_node_continues_the_kept_tokens_and_its_own_ancestors(
    route, working, make_model, perturbed, make_prompt, hf_twin
):
    model = perturbed(make_model("gqa", num_hidden_layers=1), 0)
    model.lm_head.weight.mul_(2.5)  # sharp enough to go deep, flat enough to branch
    tree_config = TreeConfig(24, 4, 0)
    drafter, prompt, first = make_drafter(model, working, tree_config, route), make_prompt(90), torch.tensor(5)
    heard = Listener(model)
    drafter.prefill(prompt, first, 30)
    context = prompt
    if working:
        drafter.refresh(POSITIONS)
        context = prompt[POSITIONS]
    tree = drafter.propose(Growth.of(tree_config))
    twin, context = hf_twin(model), torch.cat((context, first[None]))
    handed = torch.cat(heard.logits)  # the root's row, then those of every level
    branching = 0
    for node in range(len(tree)):
        path = tree.tokens[tree.ancestors[node].nonzero()[1:, 0]]
        expected = twin(torch.cat((context, path))[None]).logits[0, -1]
        nearest = (handed - expected).abs().amax(-1).min()
        if int(tree.depth[node]) < int(tree.depth.max()):  # the last level was not run
            assert nearest < 1e-4, f"nobody was run on {path.tolist()}"
        branching += int((tree.parents == node).sum()) > 1
    assert branching >= 2 and int(tree.depth.max()) >= 3


def test_deep_draft_keeps_first_layer_keys_as_if_computed_from_scratch(make_model, perturbed, make_prompt):
    model = perturbed(make_model("gqa", num_hidden_layers=3), 0)
    drafter, prompt = make_drafter(model, 40, CHAIN), make_prompt(90)
    drafter.prefill(prompt, torch.tensor(5), 30)
    drafter.refresh(POSITIONS)
    fresh = make_drafter(model, None, CHAIN)
    fresh.prefill(prompt[POSITIONS], torch.tensor(5), 30)
    torch.testing.assert_close(drafter.cache.working.keys(0), fresh.cache.working.keys(0), atol=1e-5, rtol=1e-5)
    difference = (drafter.cache.working.keys(2) - fresh.cache.working.keys(2)).abs().max()
    assert difference > 0.1, "deeper layers have seen the whole context, and keep that"


@pytest.mark.parametrize("window", [0, 8])
def test_draft_prefill_gives_what_transformers_gives_under_the_window(
    window, make_model, perturbed, make_prompt, hf_twin
):
    # layer 1's keys show what layer 0 attended to
    model = perturbed(make_model("gqa"), 0)
    drafter, prompt = make_drafter(model, 40, CHAIN, window=window), make_prompt(50)
    drafter.prefill(prompt, torch.tensor(5), 30)
    distance = torch.arange(50)[:, None] - torch.arange(50)[None]
    visible = (distance >= 0) & (distance < (window or 50))
    twin = hf_twin(model, "eager")
    states = twin.model.layers[0](
        twin.model.embed_tokens(prompt[None]),
        attention_mask=torch.where(visible, 0.0, -math.inf)[None, None],
        position_embeddings=twin.model.rotary_emb(torch.empty(0), torch.arange(50)[None]),
    )
    layer = twin.model.layers[1]
    keys = layer.self_attn.k_proj(layer.input_layernorm(states)).view(1, 50, 2, 16).transpose(1, 2)
    torch.testing.assert_close(drafter.cache.full.keys(1), keys, atol=1e-4, rtol=1e-4)


def test_working_cache_stays_as_it_is_between_refreshes(make_model, make_engine, make_prompt, monkeypatch):
    refreshed = []
    refresh = DraftCache.refresh
    monkeypatch.setattr(
        DraftCache, "refresh", lambda self, positions: (refreshed.append(positions.tolist()), refresh(self, positions))
    )
    target = make_model("gqa")
    config = SpecExtendConfig.specextend(tree=TreeConfig(8, 3, 0), retrieval=RetrievalConfig(8, 4, 3))
    result = make_engine(target, make_model("gqa", seed=1), config).generate(make_prompt(200), 30)
    assert len(refreshed) == math.ceil(len(result.rounds) / 3) > 3
    assert all(len(positions) <= 32 for positions in refreshed)
    assert all(positions == sorted(positions) for positions in refreshed)
    # the newest token of the draft's context is in every one: prompt, then everything before the pending tokens
    emitted = [199]
    for one in result.rounds[:-1]:
        emitted.append(emitted[-1] + len(one.tokens))
    newest = [199, *(200 + emitted[n - 1] - 199 for n in range(1, len(result.rounds)))]
    assert [positions[-1] for positions in refreshed] == newest[::3]


def test_target_keeps_its_absolute_positions_while_the_draft_renumbers(make_model, make_engine, make_prompt):
    target, seen = make_model("gqa", seed=3), []
    hook = target.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
    )
    config = SpecExtendConfig.specextend(
        tree=TreeConfig(8, 3, 0), retrieval=RetrievalConfig(8, 2, 1), prefill_block=500
    )
    result = make_engine(target, make_model("gqa", seed=1), config).generate(make_prompt(200), 6)
    hook.remove()
    starts, at = [0], 200
    for one in result.rounds:
        starts.append(at)
        at += one.accepted + 1
    assert [int(positions.min()) for positions in seen] == starts
    assert all(int(positions.max()) <= int(positions.min()) + 3 for positions in seen[1:])


# ---- nothing leaks into the next prompt


@pytest.mark.parametrize("draft_cache", ["full", "streaming", "retrieval"])
def test_prompt_after_another_runs_as_on_a_fresh_engine(draft_cache, make_model, perturbed, make_engine, make_prompt):
    target = make_model("gqa")
    draft = perturbed(target, 0.01)
    config = SpecExtendConfig.specextend(
        draft_cache=draft_cache, tree=TreeConfig(12, 4, 0), retrieval=RetrievalConfig(8, 6, 2), draft_window=64
    )
    used = make_engine(target, draft, config)
    used.generate(make_prompt(600, seed=1), 20)
    for length in (200, 30, 500):
        prompt = make_prompt(length, seed=2)
        fresh = make_engine(target, draft, config).generate(prompt, 20)
        again = used.generate(prompt, 20)
        assert [(r.tokens, r.drafted, r.accepted) for r in again.rounds] == [
            (r.tokens, r.drafted, r.accepted) for r in fresh.rounds
        ]
        assert fresh.accepted_per_round > 0

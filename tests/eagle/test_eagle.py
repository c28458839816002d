"""EAGLE heads against straight-line implementations written from the published facts, which share no code with ours.

The references work on raw tensors under the checkpoints' own key names, one pair after the other, without a cache.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import backend_of
from safetensors.torch import save_file
from torch import Tensor

from eagle import weights as weights_module
from eagle.drafter import EagleDrafter
from eagle.entry import load_pair
from eagle.models import retrieval_of
from eagle.weights import load_head, save_head
from specextend.config import RetrievalConfig, SpecExtendConfig, TreeConfig
from specextend.errors import ConfigError, ModelError
from specextend.modeling.features import FeatureTap
from specextend.trees.acceptance import Accepted
from specextend.trees.growth import Growth

ROOT = Path(__file__).parents[2]
HIDDEN, HEADS, FFN, VOCAB, DRAFT_VOCAB, LAYERS = 64, 4, 96, 97, 40, 6
FEATURE_LAYERS = (2, 3, 3)  # 2, L // 2 and L - 3 of six layers
D = HIDDEN // HEADS


# ---- checkpoints, written by hand


def random(*shape: int, seed: int, scale: float = 0.15) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def block_weights(kv_heads: int, width: int, prefix: str = "layers.0.") -> dict[str, Tensor]:
    return {
        f"{prefix}self_attn.q_proj.weight": random(HIDDEN, width, seed=1),
        f"{prefix}self_attn.k_proj.weight": random(kv_heads * D, width, seed=2),
        f"{prefix}self_attn.v_proj.weight": random(kv_heads * D, width, seed=3),
        f"{prefix}self_attn.o_proj.weight": random(HIDDEN, HIDDEN, seed=4),
        f"{prefix}mlp.gate_proj.weight": random(FFN, HIDDEN, seed=5),
        f"{prefix}mlp.up_proj.weight": random(FFN, HIDDEN, seed=6),
        f"{prefix}mlp.down_proj.weight": random(HIDDEN, FFN, seed=7),
        f"{prefix}post_attention_layernorm.weight": 1 + random(HIDDEN, seed=8),
    }


def eagle1_weights(kv_heads: int, *, bias: bool = True, embedding: bool = True) -> dict[str, Tensor]:
    weights = block_weights(kv_heads, HIDDEN) | {"fc.weight": random(HIDDEN, 2 * HIDDEN, seed=9)}
    weights |= {"fc.bias": random(HIDDEN, seed=10)} if bias else {}
    return weights | ({"embed_tokens.weight": random(VOCAB, HIDDEN, seed=11, scale=1.0)} if embedding else {})


def eagle3_weights(kv_heads: int, *, prefix: str = "midlayer.", draft_vocab: int = DRAFT_VOCAB) -> dict[str, Tensor]:
    ids = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(0))[:draft_vocab].sort().values
    known = torch.zeros(VOCAB, dtype=torch.bool)
    known[ids] = True
    return block_weights(kv_heads, 2 * HIDDEN, prefix) | {
        f"{prefix}hidden_norm.weight": 1 + random(HIDDEN, seed=12),
        f"{prefix}input_layernorm.weight": 1 + random(HIDDEN, seed=13),
        "fc.weight": random(HIDDEN, 3 * HIDDEN, seed=14),
        "norm.weight": 1 + random(HIDDEN, seed=15),
        "lm_head.weight": random(draft_vocab, HIDDEN, seed=16, scale=0.6),
        **({"d2t": ids - torch.arange(draft_vocab), "t2d": known} if draft_vocab < VOCAB else {}),
    }


def head_config(kv_heads: int, **changes) -> dict:
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": HIDDEN,
        "intermediate_size": FFN, "num_attention_heads": HEADS, "num_key_value_heads": kv_heads,
        "num_hidden_layers": 1, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "vocab_size": VOCAB,
        "bos_token_id": 1, "eos_token_id": 2,
    } | changes  # fmt: skip


def write_checkpoint(directory: Path, weights: dict[str, Tensor], config: dict, *, binary: bool = False) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    if binary:
        torch.save(weights, directory / "pytorch_model.bin")
    else:
        save_file(weights, directory / "model.safetensors")
    return directory


# ---- straight-line references


class Reference:
    """One head on lists of pairs. `weights` use the `layers.0.` names; `target` gives what the head does not store."""

    def __init__(self, weights: dict[str, Tensor], target, kv_heads: int, norm_before_residual: bool = False):
        self.w = {name.replace("midlayer.", "layers.0."): weight for name, weight in weights.items()}
        self.embedding = self.w.get("embed_tokens.weight", target.get_input_embeddings().weight)
        self.lm_head, self.kv_heads = target.lm_head.weight, kv_heads
        self.is_eagle3 = "layers.0.hidden_norm.weight" in self.w
        self.norm_before_residual = norm_before_residual

    def state(self, feature: Tensor) -> Tensor:
        return self.w["fc.weight"] @ feature if self.is_eagle3 else feature

    def output(self, pairs: list[tuple[int, Tensor]]) -> Tensor:
        """The block's output [H] for the last of `pairs` (token, state), which stand at positions 0, 1, ..."""
        entries = [self._entry(token, state) for token, state in pairs]
        query = self._heads("q", entries[-1], HEADS, len(pairs) - 1)
        attended = []
        for head in range(HEADS):
            kv = head // (HEADS // self.kv_heads)
            keys = torch.stack([self._heads("k", entry, self.kv_heads, n)[kv] for n, entry in enumerate(entries)])
            values = torch.stack([self._project("v", entry).view(self.kv_heads, D)[kv] for entry in entries])
            attended.append(((keys @ query[head]) / D**0.5).softmax(0) @ values)
        attended = self.w["layers.0.self_attn.o_proj.weight"] @ torch.cat(attended)
        residual = entries[-1] if not self.is_eagle3 else pairs[-1][1]
        if self.norm_before_residual:
            residual = rms(pairs[-1][1], self.w["layers.0.hidden_norm.weight"])
        hidden = residual + attended
        normed = rms(hidden, self.w["layers.0.post_attention_layernorm.weight"])
        gate, up, down = (self.w[f"layers.0.mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
        return hidden + down @ (torch.nn.functional.silu(gate @ normed) * (up @ normed))

    def logprobs(self, hidden: Tensor) -> Tensor:
        if self.is_eagle3:
            return (self.w["lm_head.weight"] @ rms(hidden, self.w["norm.weight"])).log_softmax(0)
        return (self.lm_head @ hidden).log_softmax(0)

    def target_id(self, token: int) -> int:
        return token + int(self.w["d2t"][token]) if "d2t" in self.w else token

    def _entry(self, token: int, state: Tensor) -> Tensor:
        embedding = self.embedding[token]
        if self.is_eagle3:
            normed = (
                rms(embedding, self.w["layers.0.input_layernorm.weight"]),
                rms(state, self.w["layers.0.hidden_norm.weight"]),
            )
            return torch.cat(normed)
        return self.w["fc.weight"] @ torch.cat((embedding, state)) + self.w.get("fc.bias", torch.zeros(HIDDEN))

    def _project(self, name: str, entry: Tensor) -> Tensor:
        return self.w[f"layers.0.self_attn.{name}_proj.weight"] @ entry

    def _heads(self, name: str, entry: Tensor, heads: int, position: int) -> Tensor:
        """[heads, D] rotated to `position`, pair by pair of dimensions, base 10000."""
        out = self._project(name, entry).view(heads, D).clone()
        for i in range(D // 2):
            angle = torch.tensor(position * 10000.0 ** (-2 * i / D))
            first, second = out[:, i].clone(), out[:, i + D // 2].clone()
            out[:, i] = first * angle.cos() - second * angle.sin()
            out[:, i + D // 2] = second * angle.cos() + first * angle.sin()
        return out


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean() + 1e-5).sqrt() * weight


def features_of(hf_model, ids: Tensor, is_eagle3: bool) -> Tensor:
    """[N, F] by transformers' own `output_hidden_states`."""
    states = hf_model(ids[None], output_hidden_states=True).hidden_states
    return torch.cat([states[layer][0] for layer in FEATURE_LAYERS], -1) if is_eagle3 else states[-1][0]


# ---- fixtures


@pytest.fixture(scope="session")
def target_of(make_model):
    return lambda kv_heads, seed=0: make_model("gqa", seed, num_hidden_layers=LAYERS, num_key_value_heads=kv_heads)


WEIGHTS = {
    "eagle1": lambda: eagle1_weights(HEADS),
    "eagle1-shared-no-bias": lambda: eagle1_weights(2, bias=False, embedding=False),
    "eagle3": lambda: eagle3_weights(HEADS),
    "eagle3-gqa": lambda: eagle3_weights(2, prefix="layers.0."),
    "eagle3-whole-vocabulary": lambda: eagle3_weights(2, draft_vocab=VOCAB),
}


def kv_heads_of(weights: dict[str, Tensor]) -> int:
    return next(weight.shape[0] // D for name, weight in weights.items() if name.endswith("k_proj.weight"))


@pytest.fixture
def engine_of(make_engine):
    """engine_of(target, head, config)"""
    return lambda target, head, config: make_engine(target, head, config, drafter=partial(EagleDrafter, target=target))


@pytest.fixture
def load(tmp_path, target_of):
    """load(kind): (head, reference, target) of a checkpoint written for the occasion."""

    def make(kind: str, **config):
        weights = WEIGHTS[kind]()
        kv_heads = kv_heads_of(weights)
        target = target_of(kv_heads)
        directory = write_checkpoint(tmp_path / kind, weights, head_config(kv_heads, **config), binary="-" not in kind)
        return load_head(directory, target), Reference(weights, target, kv_heads), target

    return make


class Spy(EagleDrafter):
    """Remembers each level it expanded and what it answered."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.levels: list = []

    def _expand(self, level):
        answer = super()._expand(level)
        self.levels.append((level, answer))
        return answer


# ---- forward passes


@pytest.mark.parametrize("kept", [None, [0, 1, 2, 3, 8, 9, 10, 11, 12, 13]], ids=["full", "retrieved"])
@pytest.mark.parametrize("kind", WEIGHTS)
def test_every_level_of_every_round_is_what_a_straight_line_gives(kind, kept, load, engine_of, hf_twin, make_prompt):
    head, reference, target = load(kind)
    tree = TreeConfig(nodes=6, max_depth=3, threshold=0)
    config = SpecExtendConfig(draft_cache="retrieval" if kept else "full", tree=tree)
    drafter = Spy(head, config, VOCAB, target=target)
    engine_target = backend_of(engine_of(target, head, config))._target
    engine_target._tap = drafter.tap
    prompt, first = make_prompt(15), torch.tensor(5)
    hf = hf_twin(target)

    engine_target.prefill(prompt, 200)
    drafter.prefill(prompt, first, 200)
    known = [*prompt.tolist(), int(first)]
    working = None
    for _ in range(3):
        cached = drafter.context
        if kept and working is None:  # one refresh; later pairs are appended behind what was kept
            drafter.refresh(torch.tensor(kept))
            working = list(kept)
        drafter.levels.clear()
        draft = drafter.propose(Growth.of(tree))

        features = features_of(hf, torch.tensor(known[:-1]), reference.is_eagle3)
        fresh = list(range(cached, len(known) - 1))
        working = (working + fresh) if kept else list(range(len(known) - 1))
        pairs = [(known[i + 1], reference.state(features[i])) for i in working]
        hidden = {(): reference.output(pairs)}  # by path of target ids below the root
        paths = [()]
        assert len(drafter.levels) == tree.max_depth - 1
        for level, answer in drafter.levels:
            paths = [
                (*paths[parent], reference.target_id(token))
                for token, parent in zip(level.tokens.tolist(), level.parents.tolist(), strict=True)
            ]
            for path, logprobs in zip(paths, answer, strict=True):
                chain = [(token, hidden[path[:n]]) for n, token in enumerate(path)]
                hidden[path] = reference.output(pairs + chain)
                torch.testing.assert_close(logprobs, reference.logprobs(hidden[path]), atol=2e-4, rtol=1e-3)

        # pretend that the target accepted the deepest path of the tree
        engine_target.verify(draft)
        path = draft.ancestors[int(draft.depth.argmax())].nonzero()[:, 0]
        accepted = Accepted(path, draft.tokens[path[1:]], torch.tensor(7))
        engine_target.commit(path)
        drafter.commit(accepted)
        known += [*accepted.tokens.tolist(), 7]


def test_norm_before_residual_of_the_speculators_format(tmp_path, target_of, engine_of, hf_twin, make_prompt):
    weights, target = eagle3_weights(2, prefix="layers.0."), target_of(2)
    config = {
        "speculators_model_type": "eagle3", "draft_vocab_size": DRAFT_VOCAB, "norm_before_residual": True,
        "transformer_layer_config": head_config(2),
    }  # fmt: skip
    head = load_head(write_checkpoint(tmp_path / "head", weights, config), target)
    reference = Reference(weights, target, 2, norm_before_residual=True)
    ids = make_prompt(9)
    features = features_of(hf_twin(target), ids, True)
    drafter = EagleDrafter(head, SpecExtendConfig(tree=TreeConfig(4, 1, 0)), VOCAB, target=target)
    engine_target = backend_of(engine_of(target, head, SpecExtendConfig()))._target
    engine_target._tap = drafter.tap
    engine_target.prefill(ids, 50)
    drafter.prefill(ids, torch.tensor(3), 50)
    drafter.propose(Growth(4, 1, 0))
    pairs = [(token, reference.state(feature)) for token, feature in zip([*ids[1:].tolist(), 3], features, strict=True)]
    torch.testing.assert_close(drafter._hidden[0], reference.output(pairs), atol=2e-4, rtol=1e-3)


def test_tap_reads_the_stream_that_enters_the_final_norm(target_of, engine_of, make_prompt):
    target = target_of(2)
    engine = engine_of(target, None, SpecExtendConfig(drafting="none"))
    end, normed = FeatureTap(target, [LAYERS]), FeatureTap(target, None)
    for tap in (end, normed):
        backend_of(engine)._target._tap = tap
        backend_of(engine)._target.prefill(make_prompt(6), 10)
    torch.testing.assert_close(target.model.norm(end.take()), normed.take())


def test_tap_is_silent_outside_of_the_target_that_owns_it(load, engine_of, make_prompt):
    head, _, target = load("eagle3")
    engine = engine_of(target, head, SpecExtendConfig(tree=TreeConfig(4, 2, 0)))
    engine.autoregressive(make_prompt(5), 4)
    assert not backend_of(engine)._drafter.tap._runs
    assert not any(layer._forward_pre_hooks for layer in target.model.layers)


# ---- lossless


TREE = TreeConfig(nodes=30, max_depth=4, threshold=0)
SETTINGS = {
    "standard": SpecExtendConfig.standard(tree=TREE),
    "specextend": SpecExtendConfig.specextend(tree=TREE, retrieval=RetrievalConfig(8, 6, 2)),
    "streaming": SpecExtendConfig(draft_cache="streaming", tree=TREE, retrieval=RetrievalConfig(8, 6, 2)),
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("kind", WEIGHTS)
def test_output_is_the_targets_whatever_the_head_and_the_prompt(kind, setting, load, engine_of, make_prompt):
    head, _, target = load(kind)
    engine = engine_of(target, head, SETTINGS[setting])
    accepted = 0
    for length in (2100, 120, 2, 1) if kind in ("eagle1", "eagle3-gqa") else (120, 2, 1):  # descending: nothing leaks
        prompt = make_prompt(length)
        result = engine.generate(prompt, 60)  # several refreshes
        assert result.token_ids == engine.autoregressive(prompt, 60).token_ids
        accepted += sum(one.accepted for one in result.rounds)
    assert accepted > 0  # otherwise nothing was tried


@pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the models here are on the CPU; bench_gpu compares on a GPU")
@pytest.mark.parametrize("kind", ["eagle1", "eagle3-gqa"])
def test_captured_rounds_are_the_rounds_of_the_loop(kind, load, engine_of, make_prompt, monkeypatch):
    pytest.importorskip("triton")

    monkeypatch.setattr(weights_module, "pack_linears", lambda head: None)  # the kernels read plain weights
    head, _, target = load(kind)
    draft_cache = "full" if kind == "eagle1" else "retrieval"
    config = SpecExtendConfig(
        flash_prefill=True, hybrid_tree_attention=True, draft_cache=draft_cache,
        tree=TreeConfig(4, 3, 0.0), retrieval=RetrievalConfig(8, 3, 2),
    )  # fmt: skip
    eager, fresh = engine_of(target, head, config), engine_of(target, head, config)
    monkeypatch.setattr("specextend.engine.why_not_captured", lambda *_: None)
    graphs = engine_of(target, head, config)
    assert (eager.backend, graphs.backend) == ("eager", "graphs")
    for length in (40, 11):  # a second prompt finds the buffers as the first left them
        wanted, found = (engine.generate(make_prompt(length), 5) for engine in (eager, graphs))
        assert found.token_ids == wanted.token_ids
        assert [one.accepted for one in found.rounds] == [one.accepted for one in wanted.rounds]
    longer = torch.cat((make_prompt(11), torch.tensor(found.token_ids), make_prompt(3, seed=1)))
    wanted, found = (engine.generate(longer, 3) for engine in (fresh, graphs))
    assert not wanted.cached_tokens and found.cached_tokens > 11 and found.token_ids == wanted.token_ids
    assert [one.accepted for one in found.rounds] == [one.accepted for one in wanted.rounds]


# ---- checkpoints


@pytest.mark.parametrize("kind", WEIGHTS)
def test_a_saved_head_comes_back_in_the_published_layout(kind, load, tmp_path, monkeypatch):
    monkeypatch.setattr(weights_module, "pack_linears", lambda model: None)
    head, _, target = load(kind)
    save_head(head, tmp_path / "again")
    again = load_head(tmp_path / "again", target)
    own = "lm_head." if kind.startswith("eagle3") else "lm_head_of_the_target"
    for name, weight in head.state_dict().items():
        if not name.startswith(("embed_tokens.", "lm_head.")) or name.startswith(own):
            assert torch.equal(again.state_dict()[name], weight.to(torch.bfloat16).float()), name
    assert again.entering == head.entering
    assert (again.target_ids is None) == (head.target_ids is None)
    assert head.target_ids is None or torch.equal(again.target_ids, head.target_ids)


def bad(weights: dict[str, Tensor], **changes) -> dict[str, Tensor]:
    changed = {name.replace("__", "."): weight for name, weight in changes.items()}
    return {name: weight for name, weight in (weights | changed).items() if weight is not None}


FAULTS = {
    "asked for the other": (eagle1_weights(2), {}, "eagle3", "EAGLE-1 head.*EAGLE-3 was asked.*ask for eagle1"),
    "asked for the one": (eagle3_weights(2), {}, "eagle1", "EAGLE-3 head.*EAGLE-1 was asked.*ask for eagle3"),
    "hidden size": (eagle1_weights(2), {"hidden_size": 128}, None, "hidden size 128.*is 64"),
    "vocabulary": (eagle1_weights(2), {"vocab_size": 96}, None, "vocabulary 96.*is 97"),
    "missing": (
        bad(eagle1_weights(2), layers__0__mlp__up_proj__weight=None),
        {},
        None,
        "1 weights are missing.*up_proj",
    ),
    "unexpected": (
        bad(eagle1_weights(2), layers__1__x=torch.ones(2)),
        {},
        None,
        "1 weights are unexpected.*layers.1.x",
    ),
    "shape": (bad(eagle3_weights(2), fc__weight=torch.ones(64, 128)), {}, None, r"fc.weight \[64, 128\].*\[64, 192\]"),
    "kv heads": (eagle1_weights(2), {"num_key_value_heads": 4}, None, "wrong shape"),
    "d2t": (bad(eagle3_weights(2), d2t=torch.full((40,), 90)), {}, None, "d2t names target ids 90 to 129.*97 tokens"),
    "t2d": (bad(eagle3_weights(2), t2d=torch.ones(97, dtype=torch.bool)), {}, None, "t2d.*do not belong together"),
    "layers": (eagle3_weights(2), {"eagle_aux_hidden_state_layer_ids": [2, 16, 29]}, None, "layers .2, 16, 29.*has 6"),
    "nan": (
        bad(eagle1_weights(2), fc__weight=torch.full((64, 128), torch.nan)),
        {},
        None,
        r"1 weights hold NaN or infinity.*fc\.weight",
    ),
    "int8": (
        bad(eagle1_weights(2), fc__weight=torch.ones(64, 128, dtype=torch.int8)),
        {},
        None,
        r"stored as torch\.int8 .fc\.weight.: it is quantized",
    ),
    "no head": ({"model.embed_tokens.weight": torch.ones(97, 64)}, {}, None, "no EAGLE head.*model.embed_tokens"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_head_that_does_not_fit_fails_at_load_with_one_line(fault, target_of, tmp_path):
    weights, config, kind, message = FAULTS[fault]
    directory = write_checkpoint(tmp_path / "head", weights, head_config(2, **config))
    with pytest.raises(ModelError, match=message) as error:
        load_head(directory, target_of(2), kind)
    assert "\n" not in str(error.value)


def test_broken_or_missing_weights_fail_with_one_line(target_of, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.json").write_text(json.dumps(head_config(2)))
    with pytest.raises(ModelError, match="no weights"):
        load_head(empty, target_of(2))
    (empty / "pytorch_model.bin").write_bytes(b"not a checkpoint")
    with pytest.raises(ModelError, match="cannot be read"):
        load_head(empty, target_of(2))


def test_a_pickle_that_would_run_code_is_refused(target_of, tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    write_checkpoint(tmp_path / "head", {"fc.weight": Evil()}, head_config(2), binary=True)
    with pytest.raises(ModelError, match="cannot be read"):
        load_head(tmp_path / "head", target_of(2))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model_name", "vicuna_7b", "--head", "eagle3"], "no eagle3 head of vicuna_7b is known, only eagle1"),
        (["--head", "eagle2"], "'eagle2' is unknown"),
        (["--draft_model", "nowhere"], "does not exist"),
    ],
)
@pytest.mark.xdist_group("warm")
def test_mistakes_on_the_command_line_are_one_line_and_status_2(flags, message, warm):
    done = warm.run(str(ROOT / "run_eagle.py"), *flags)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("positions, chunks", [(1024, 32), (2048, 64), (32768, 64), (16, 1)])
def test_the_working_cache_is_no_larger_than_what_a_head_has_seen(positions, chunks):
    head = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=positions))
    assert retrieval_of(head) == RetrievalConfig(32, chunks, 8)


def test_a_folder_may_be_given_as_head_but_not_twice():
    folder = str(ROOT / "specextend" / "models" / "bundled" / "eagle1")
    arguments = {"model_name": "bundled", "dtype": "auto", "device": "cpu"}
    loaded = load_pair(argparse.Namespace(**arguments, head=folder))
    assert loaded.draft_id == "bundled/eagle1" and loaded.preset.retrieval.top_k == 32
    with pytest.raises(ConfigError, match="both name a head"):
        load_pair(argparse.Namespace(**arguments, head=folder, draft_model=folder))


# ---- training


@pytest.fixture
def training_heads():
    from scripts.train import heads

    return heads


@pytest.mark.parametrize("starts", [range(7), range(1, 7, 3)], ids=["all", "strided"])
@pytest.mark.parametrize("kind", ["eagle1", "eagle3"])
def test_training_time_test_is_the_chain_that_drafting_makes(kind, starts, load, hf_twin, make_prompt, training_heads):
    head, reference, target = load(kind)
    head.config._attn_implementation = training_heads.UNROLLED
    ids = make_prompt(10)
    features = features_of(hf_twin(target), ids, reference.is_eagle3)
    first, *later = training_heads.unroll(head, ids[None], features[None], torch.tensor(starts), 3)
    assert first.shape[1] == 9 and [step.shape[1] for step in later] == [len(starts)] * 2
    states = [reference.state(feature) for feature in features]
    committed = [(int(ids[i + 1]), states[i]) for i in range(9)]
    for index in range(9):
        torch.testing.assert_close(first[0, index], reference.output(committed[: index + 1]), atol=1e-3, rtol=1e-3)
    for chain, start in enumerate(starts):
        pairs = committed[: start + 1]
        for step, outputs in enumerate(later, start=1):
            pairs = [*pairs, (int(ids[start + step + 1]), reference.output(pairs))]
            torch.testing.assert_close(outputs[0, chain], reference.output(pairs), atol=1e-3, rtol=1e-3)


def test_chains_begin_at_every_offset_and_end_within_the_row(training_heads):
    assert training_heads.chain_starts(29, 5, 1).tolist() == list(range(25))  # pair 24 + 4 is the last of 29
    seen = {tuple(training_heads.chain_starts(29, 5, 4).tolist()) for _ in range(200)}
    assert seen == {tuple(range(offset, offset + 24, 4)) for offset in range(4)}


@pytest.mark.parametrize("kind", ["eagle1", "eagle3"])
def test_loss_of_a_head_is_the_weighted_sum_over_its_steps(kind, load, hf_twin, make_prompt, training_heads):
    from scripts.train.settings import Settings

    head, reference, target = load(kind)
    head.config._attn_implementation = training_heads.UNROLLED
    ids, model = make_prompt(8), hf_twin(target)
    final = model(ids[None], output_hidden_states=True).hidden_states[-1][0]
    wanted = (model.lm_head(final) / 0.8).softmax(-1)
    committed = [
        (int(token), reference.state(feature))
        for token, feature in zip(ids[1:], features_of(model, ids, reference.is_eagle3), strict=False)
    ]

    def distance(pairs: list) -> Tensor:
        index, hidden = len(pairs), reference.output(pairs)
        expected = wanted[index]
        if reference.is_eagle3:
            expected = expected[[reference.target_id(token) for token in range(DRAFT_VOCAB)]]
        divergence = (expected * (expected.log() - reference.logprobs(hidden))).sum()
        error = (hidden - final[index]).abs()
        regression = torch.where(error < 1, error.square() / 2, error - 0.5).mean()
        return divergence + (0.0 if reference.is_eagle3 else regression)

    total = torch.stack([distance(committed[: i + 1]) for i in range(7)]).mean()
    chains = [committed[: start + 1] for start in range(5)]
    for weight in (0.8, 0.64):
        chains = [[*pairs, (int(ids[len(pairs) + 1]), reference.output(pairs))] for pairs in chains]
        total = total + weight * torch.stack([distance(pairs) for pairs in chains]).mean()
    settings = Settings(eagle_steps=3, eagle_stride=1, teacher_temperature=0.8)
    loss = training_heads.head_objective({kind: head}, model, settings, pairs=7)(ids[None], torch.tensor(0))
    torch.testing.assert_close(loss, total, atol=1e-3, rtol=1e-3)

"""What the tests share: tiny random models, engines around them, a toy tokenizer; one thread, repeatable properties.

Factories are session fixtures, so that they may be used in hypothesis tests and keep the models they made.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import os
from collections.abc import Callable, Iterator

if not os.path.exists("/dev/nvidia0"):
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, which transformers may do

import pytest
import quick_interpreter
import torch
from hypothesis import HealthCheck, settings
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from warm_process import WarmProcesses

from specextend.config import SpecExtendConfig, override
from specextend.drafting.small_lm import ClassicDrafter
from specextend.engine import SpecExtend, default_config
from specextend.modeling.attention import NAME
from specextend.modeling.prefixes import PrefixLimits
from specextend.models.loading import LoadedModels, load_models
from specextend.models.presets import Preset

torch.set_num_threads(1)


if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    quick_interpreter.hasten()
settings.register_profile(
    "suite", deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
settings.load_profile("suite")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of an xdist group stay together: xdist 3.8 writes the group into a name that pytest 9.2 does not read."""
    for item in items:
        name = getattr(item, "_nodeid", item.nodeid)
        if name != item.nodeid:
            item._id = type(item._id).parse(name)


VOCAB = 97
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
    "initializer_range": 0.2,  # ten times the usual: logits are spread, and no two are near each other
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
THETA = {"rope_theta": 10000.0}
KINDS = {
    "mha": ("llama", {"num_key_value_heads": 4}),
    "gqa": ("llama", {}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "mistral": ("mistral", {"sliding_window": None}),
    "linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0} | THETA}),
    "llama3": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
            | THETA
        },
    ),
    "yarn": (
        "llama",
        {
            "rope_parameters": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 1024} | THETA,
        },
    ),
    # most prompts are longer than 64 tokens, where the frequencies begin to change
    "dynamic": (
        "llama",
        {"max_position_embeddings": 64, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0} | THETA},
    ),
}


@functools.cache
def _build(kind: str, seed: int, changes: tuple) -> PreTrainedModel:
    family, settings_ = KINDS[kind]
    config = AutoConfig.for_model(family, **(SIZES | settings_ | dict(changes)))
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    model.set_attn_implementation(NAME)
    return model


def _copy(model: PreTrainedModel, attention: str) -> PreTrainedModel:
    config = copy.deepcopy(model.config)
    config._attn_implementation = attention
    twin = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    twin.load_state_dict(model.state_dict())
    return twin


class ToyTokenizer:
    """Two letters per token, its digits in the alphabet: 0 is "aa", 1 is "ab", 96 is "jg"."""

    chat_template = None

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return "".join(chr(ord("a") + token // 10) + chr(ord("a") + token % 10) for token in ids)


@pytest.fixture(scope="session")
def make_model() -> Callable[..., PreTrainedModel]:
    """make_model(kind, seed, **config changes): a random model with our attention; equal requests share one model."""
    return lambda kind="gqa", seed=0, **changes: _build(kind, seed, tuple(sorted(changes.items())))


@pytest.fixture(scope="session")
def hf_twin() -> Callable[..., PreTrainedModel]:
    """hf_twin(model, attention="sdpa"): a fresh copy that transformers runs by itself."""
    return lambda model, attention="sdpa": _copy(model, attention)


@pytest.fixture(scope="session")
def perturbed() -> Callable[..., PreTrainedModel]:
    """perturbed(model, scale, seed): a copy with noise of `scale` standard deviations on every matrix."""

    def make(model: PreTrainedModel, scale: float, seed: int = 0) -> PreTrainedModel:
        noisy = _copy(model, NAME)
        generator = torch.Generator().manual_seed(seed)
        for weight in noisy.parameters():
            if weight.ndim == 2:
                weight.add_(torch.randn(weight.shape, generator=generator) * weight.std() * scale)
        return noisy

    return make


@pytest.fixture(scope="session")
def opposed() -> Callable[..., PreTrainedModel]:
    """opposed(model): a copy that ranks tokens the other way round, so that its best guess is the model's worst."""

    def make(model: PreTrainedModel) -> PreTrainedModel:
        contrary = _copy(model, NAME)
        contrary.lm_head.weight.neg_()
        return contrary

    return make


@pytest.fixture(scope="session")
def make_engine() -> Callable[..., SpecExtend]:
    """make_engine(target, draft, config, eos=..., limit=..., tokenizer=...): an engine around models held in hand."""

    def make(
        target: PreTrainedModel,
        draft: PreTrainedModel | None = None,
        config: SpecExtendConfig | None = None,
        *,
        eos: tuple[int, ...] = (),
        limit: int = 8192,
        tokenizer=None,
        drafter: Callable = ClassicDrafter,
        prefix_reuse: bool | PrefixLimits = True,
    ) -> SpecExtend:
        models = LoadedModels(
            name="tiny",
            preset=Preset("tiny", "tiny", None),
            target=target,
            draft=draft,
            tokenizer=tokenizer or ToyTokenizer(),
            eos_token_ids=frozenset(eos),
            limit=limit,
            vocab_size=VOCAB,
            device=torch.device("cpu"),
            dtype=target.dtype,
            target_id="tiny",
            draft_id="tiny",
            drafter=drafter,
        )
        return SpecExtend(models, config, prefix_reuse=prefix_reuse)

    return make


def backend_of(engine: SpecExtend):
    """The backend that an engine speculates with, for tests that look inside."""
    return engine._method


@pytest.fixture(scope="session")
def make_prompt() -> Callable[..., torch.Tensor]:
    """make_prompt(length, seed): random token ids [N]."""
    return lambda length, seed=0: torch.randint(0, VOCAB, (length,), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="session")
def hf_generate(hf_twin) -> Callable[..., list[int]]:
    """hf_generate(model, prompt, new_tokens): what transformers' own greedy `generate` continues the prompt with."""

    def generate(model: PreTrainedModel, prompt: torch.Tensor, new_tokens: int, attention: str = "sdpa") -> list[int]:
        twin = hf_twin(model, attention)  # fresh: transformers' dynamic rope remembers the longest prompt it has seen
        ids = twin.generate(
            prompt[None],
            attention_mask=torch.ones_like(prompt)[None],
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
        )
        return ids[0, len(prompt) :].tolist()

    return generate


@pytest.fixture(scope="session")
def bundled_models() -> LoadedModels:
    """The pair that ships with the project, in fp32 on the CPU; tests that ask for it fail when it is missing."""
    return load_models("bundled", dtype="float32", device="cpu")


@pytest.fixture(scope="session")
def bundled_engine(bundled_models) -> SpecExtend:
    """SpecExtend around the bundled pair, with a fixed tree: its rounds do not depend on how fast they run."""
    tree = {"nodes": 12, "max_depth": 8, "threshold": 0.35, "min_probability": 0.06}
    return SpecExtend(bundled_models, override(default_config(bundled_models), {"tree": tree}))


@pytest.fixture(scope="session")
def warm() -> Iterator[WarmProcesses]:
    """Processes that have imported everything; whoever asks for them is of the xdist group "warm", which starts one."""
    with WarmProcesses() as processes:
        yield processes

"""`SpecExtend`: a loaded pair of models with one setting, ready for any number of prompts, from any thread.

All switches are resolved here, once, into objects; nothing below asks what is on. Generations of one `LoadedModels`
take turns, whichever engine or thread asks for them.
"""

from __future__ import annotations

import gc
import importlib.util
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import LogitsProcessor

from specextend.config import SamplingConfig, SpecExtendConfig, TreeConfig, override, prefill_block
from specextend.data.templates import Message, encode_chat, encode_prompt
from specextend.decoding.backend import Backend
from specextend.decoding.eager import EagerBackend
from specextend.decoding.hugging_face import HuggingFace
from specextend.decoding.loop import decode
from specextend.decoding.observer import Observer
from specextend.decoding.output import Generation, Output, Round
from specextend.decoding.prefixes import NoReuse, PrefixReuse, why_not_reused
from specextend.decoding.processors import ProcessedChooser
from specextend.decoding.sampling import chooser
from specextend.decoding.session import Session
from specextend.decoding.text import TextStream, TokenDecoder
from specextend.drafting.drafter import Drafter, TreeDrafter
from specextend.drafting.prompt_lookup import PromptLookup
from specextend.drafting.retrieval import retriever
from specextend.drafting.self_speculation import HierarchicalDrafter, SelfDrafter, SparseTarget
from specextend.drafting.small_lm import ClassicDrafter
from specextend.errors import CapacityError, ConfigError, InputError, ModelError
from specextend.methods import name_of
from specextend.modeling.attention import attention
from specextend.modeling.cache import KVCache
from specextend.modeling.features import FeatureTap
from specextend.modeling.packed import return_freed_memory
from specextend.modeling.prefixes import PrefixLimits
from specextend.modeling.rope import make_exact
from specextend.modeling.target import Target
from specextend.models.loading import LoadedModels, load_models

if TYPE_CHECKING:  # Triton may be missing
    from specextend.decoding.graphs import CapturedSteps

GREEDY = SamplingConfig()
MAX_SLOTS = 128  # of a tree whose verification is captured, the root included
OnRound = Callable[[Output, Round | None], None]
OnBlock = Callable[[str, int], None]
Prompt = str | Tensor | Sequence[int]


class SpecExtend:
    """Lossless long-input speculative decoding of one target with one draft.

    Args:
        models: as `load_models` gives them.
        config: None takes SpecExtend with all of its parts, with the preset's tree for the device.
        cache: the target's KV cache, shared by engines that take turns; None makes one.
        eager: never capture CUDA graphs, which a GPU does by default where the models allow it.
        prefix_reuse: a prompt that begins like an earlier one is read from where they part; with limits for what is
            kept of earlier ones. False reads every prompt whole, as measurements of a prefill must.
    Attributes:
        why_not_reused: why prefixes are not, None where they are.
    """

    def __init__(
        self, models: LoadedModels, config: SpecExtendConfig | None = None, *, cache: KVCache | None = None,
        eager: bool = False, prefix_reuse: bool | PrefixLimits = True,
    ):  # fmt: skip
        self._models: LoadedModels | None = models
        self._eager, self._prefix_reuse = eager, prefix_reuse
        if not isinstance(config, SpecExtendConfig | None):
            raise ConfigError(f"config is {config!r}; give a SpecExtendConfig, or None for all parts of SpecExtend")
        self.config = default_config(models) if config is None else config
        make_exact(models.target)
        if models.ranks > 1 and self.config.tree.rule == "price":
            raise ConfigError("processes that share a target cannot price trees: their clocks do not agree")
        self._cache = cache or KVCache(models.target.config, models.dtype, models.device)
        drafter = _build_drafter(models, self.config, self._cache)
        self._reads_hidden_states = drafter is not None and drafter.tap is not None
        self.why_eager = "it was asked for" if eager else why_not_captured(models, self.config, drafter)
        self.why_not_reused = why_not_reused(models) if prefix_reuse else "it was turned off"
        limits = prefix_reuse if isinstance(prefix_reuse, PrefixLimits) else PrefixLimits() if prefix_reuse else None
        apart = NoReuse(self._cache, limits)
        self._prefixes: NoReuse | None = apart
        alone = SpecExtendConfig.specextend(
            drafting="none", draft_cache="full", prefill_block=self.config.prefill_block
        )
        self._baseline: Backend | None = self._backend(alone, Drafter(), apart)
        if self.config.drafting == "hugging_face":
            if models.ranks > 1:
                raise ConfigError("transformers' own loop has no cache for a sharded target; choose another method")
            self._method: Backend | HuggingFace | None = HuggingFace(models.target)
        else:
            if drafter and not self.why_not_reused:
                self._prefixes = PrefixReuse(self._cache, drafter, limits)
            self._method = self._backend(self.config, drafter, self._prefixes) if drafter else None

    @classmethod
    def from_pretrained(
        cls,
        target: str = "bundled",
        *,
        draft: str | None = None,
        config: SpecExtendConfig | None = None,
        dtype: str = "auto",
        device: str = "auto",
        eager: bool = False,
        prefix_reuse: bool | PrefixLimits = True,
        **settings,
    ) -> SpecExtend:
        """Load `target` (a preset's name, a directory or a hub id) and its draft.

        Args:
            settings: fields of `config` (None: the default) that are to be different, those of its tree and its
                retrieval nested: draft_cache="full", tree={"nodes": 20}, retrieval={"top_k": 16}.
        """
        override(SpecExtendConfig(), settings)  # a mistake shows before anything is loaded
        models = load_models(target, draft=draft, dtype=dtype, device=device)
        return cls(models, override(config or default_config(models), settings), eager=eager, prefix_reuse=prefix_reuse)

    def with_config(
        self, config: SpecExtendConfig | None = None, *, prefix_reuse: bool | PrefixLimits | None = None, **settings
    ) -> SpecExtend:  # fmt: skip
        """The same models, and the same memory for the target's cache, under another setting.

        Args:
            config, prefix_reuse: None takes this engine's.
            settings: as for `from_pretrained`.
        """
        config = override(config or self.config, settings)
        reuse = self._prefix_reuse if prefix_reuse is None else prefix_reuse
        return SpecExtend(self.models, config, cache=self._cache, eager=self._eager, prefix_reuse=reuse)

    def close(self) -> None:
        """Let go of models, caches and graphs, after what another thread is generating; safe to call again.

        Memory comes back once no other engine (`with_config`) and nobody else holds the same models.
        """
        if self._models is None:
            return
        lock, device = self._models.lock, self._models.device
        with nullcontext() if lock.is_mine() else lock():  # a stream left open in this thread ends here
            self._models = self._cache = self._method = self._baseline = self._prefixes = None
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return_freed_memory()

    def __enter__(self) -> SpecExtend:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def backend(self) -> str:
        """Who computes the steps of a round: "graphs" (captured CUDA graphs) or "eager" (plain PyTorch)."""
        return "eager" if self.why_eager else "graphs"

    @property
    def models(self) -> LoadedModels:
        """What decodes."""
        self._require_open()
        return self._models

    @property
    def cache_bytes(self) -> int:
        """Bytes the target's key/value cache holds now; it grows with the longest prompt so far."""
        return self._cache.nbytes if self._models is not None else 0

    @property
    def prefix_bytes(self) -> int:
        """Bytes of the prefixes kept beside what the caches hold, the target's and the draft's."""
        return self._prefixes.nbytes if self._models is not None else 0

    @property
    def reads_hidden_states(self) -> bool:
        """Whether the draft reads the target's hidden states, as EAGLE heads do."""
        return self._reads_hidden_states

    @property
    def limit(self) -> int:
        """Prompt plus new tokens the target can hold."""
        return self.models.limit

    def max_prompt_tokens(self, max_new_tokens: int) -> int:
        """Longest prompt, in tokens, that leaves room for `max_new_tokens`."""
        return self.limit - max_new_tokens

    def encode(self, text: str) -> Tensor:
        """Token ids [N] of `text` as a prompt, in the model's conversation template where it has one."""
        if not text.strip():
            raise InputError("the prompt is empty; give at least one word")
        ids = encode_prompt(text, self.models.preset.template, self.models.tokenizer)
        return torch.tensor(ids, device=self.models.device)

    def encode_chat(self, messages: Sequence[Message], **options) -> Tensor:
        """Token ids [N] of a conversation, written as the model expects it, up to where the assistant answers.

        A model without a conversation template, as the bundled one, reads the contents with blank lines between them.

        Args:
            options: what else the model's own chat template reads, as `tools`.
        """
        ids = encode_chat(messages, self.models.preset.template, self.models.tokenizer, **options)
        if not any(message["content"].strip() for message in messages):
            raise InputError("the messages are empty; give at least one word")
        return torch.tensor(ids, device=self.models.device)

    def generate(
        self,
        prompt: Prompt,
        max_new_tokens: int = 256,
        *,
        sampling: SamplingConfig = GREEDY,
        stop: Sequence[str] = (),
        processors: Sequence[LogitsProcessor] = (),
        until: Callable[[list[int]], bool] | None = None,
        eos_token_ids: Collection[int] | None = None,
        on_round: OnRound | None = None,
        on_block: OnBlock | None = None,
        observer: Observer | None = None,
        prefix_scope: str | None = None,
        key_values: Tensor | None = None,
    ) -> Generation:
        """Continue `prompt` (text, or token ids [N]) by speculative decoding.

        Args:
            processors: transformers' logits processors, applied to the target before `sampling`.
            until: asked after every token, with all new ones, whether to end there.
            eos_token_ids: any of them ends the answer and is its last token; None: the model's own, (): nothing does.
            on_round: called with the output so far after the prefill (round None) and after every round; what it
                raises ends the generation.
            on_block: called before every block of the prefill with who reads, "target" or "draft", and the tokens it
                has read; what it raises ends the generation, and what was read is known to the next prompt.
            observer: told of every step; costs time.
            prefix_scope: what is read here is known again to prompts of the same scope alone, so that nobody learns
                from how fast an answer comes what others have asked.
            key_values: [2, L, 1, H_kv, n, D] the target's keys (rotated) and values of the prompt's first n < N tokens,
                computed elsewhere; they are believed, and never taken for what a later prompt begins with. For an EAGLE
                head the target reads those tokens again whose hidden states the head lacks.
        """
        with self.models.lock():
            output = self._begin(prompt, max_new_tokens, sampling, stop, processors, until)
            if eos_token_ids is not None:
                output.eos_token_ids = frozenset(eos_token_ids)
            output.observer, output.on_block = observer, on_block
            output.prefix_scope, output.given = prefix_scope, key_values
            return self._finish(self._speculate(output), output, on_round)

    def key_values(self, tokens: int) -> Tensor:
        """A copy [2, L, 1, H_kv, n, D] of the target's keys and values of the context's first `tokens`.

        For `on_round`, where the context is `output.context` tokens; outside of it another prompt may be there.
        """
        return self._cache.buffer[..., :tokens, :].clone()

    def chat(self, messages: Sequence[Message], max_new_tokens: int = 256, **options) -> Generation:
        """Answer a conversation, [{"role": "user", "content": "..."}, ...]; options as for `generate`."""
        return self.generate(self.encode_chat(messages), max_new_tokens, **options)

    def session(self, messages: Sequence[Message] = (), **options) -> Session:
        """A conversation, `messages` what was said before; options as for `generate`, for every question."""
        return Session(self.chat, messages, **options)

    def autoregressive(
        self,
        prompt: Prompt,
        max_new_tokens: int = 256,
        *,
        sampling: SamplingConfig = GREEDY,
        stop: Sequence[str] = (),
        processors: Sequence[LogitsProcessor] = (),
        until: Callable[[list[int]], bool] | None = None,
        on_round: OnRound | None = None,
        on_block: OnBlock | None = None,
    ) -> Generation:
        """Continue `prompt` by the target alone: our fastest such decoding, whatever the setting; the baseline.

        It always reads the whole prompt, and leaves no prefix behind.
        """
        with self.models.lock():
            output = self._begin(prompt, max_new_tokens, sampling, stop, processors, until, depth=0)
            output.on_block = on_block
            return self._finish(decode(self._baseline, output), output, on_round)

    def stream(
        self, prompt: Prompt, max_new_tokens: int = 256, *, sampling=GREEDY, stop=(), prefix_scope: str | None = None
    ) -> Iterator[str]:  # fmt: skip
        """The text of `generate`, piece by piece as rounds finish; closing the iterator ends the generation.

        Between the first piece and its end no other generation of these models begins.
        """
        with self.models.lock():
            output = self._begin(prompt, max_new_tokens, sampling, stop)
            output.prefix_scope = prefix_scope
            text = TextStream(output.decode, output.stop)
            for _ in self._speculate(output):
                yield text.push(output.token_ids, last=output.finished)
                self._require_open()

    @contextmanager
    def steps_after(self, prompt: Prompt, max_new_tokens: int) -> Iterator[CapturedSteps]:
        """The captured steps in the state that `generate` leaves behind, to be run and timed one by one."""
        if self.backend != "graphs":
            raise ConfigError(f"there are no captured steps: {self.why_eager}")
        self.generate(prompt, max_new_tokens)
        with self.models.lock():
            yield self._method.steps()

    def _require_open(self) -> None:
        if self._models is None:
            raise InputError("this engine is closed; make another with SpecExtend.from_pretrained")

    def _speculate(self, output: Output) -> Iterator[Round | None]:
        if self._method is None:
            raise ModelError(f"{self.models.name} was loaded without a draft model; name one", setting="draft_model")
        if isinstance(self._method, HuggingFace):
            return self._method.decode(output)
        return decode(self._method, output)

    def _backend(self, config: SpecExtendConfig, drafter: Drafter, prefixes: NoReuse) -> Backend:
        """Who computes the steps of a setting; all of its switches are resolved here."""
        models, captured = self.models, not self.why_eager
        target = _build_target(models, config, self._cache, drafter.tap, fused=captured)
        parts = target, drafter, retriever(config.draft_cache, config.retrieval), config, prefixes
        if not captured:
            return EagerBackend(*parts)
        from specextend.decoding.graphs import GraphBackend
        from specextend.decoding.priced_graphs import PricedGraphs

        is_priced = config.tree.rule == "price" and isinstance(drafter, TreeDrafter)
        return (PricedGraphs if is_priced else GraphBackend)(*parts)

    def _begin(
        self, prompt: Prompt, max_new_tokens: int, sampling: SamplingConfig, stop: Sequence[str],
        processors: Sequence[LogitsProcessor] = (), until: Callable[[list[int]], bool] | None = None,
        depth: int | None = None,
    ) -> Output:  # fmt: skip
        """Check the request against the models before anything runs."""
        if not isinstance(max_new_tokens, int) or isinstance(max_new_tokens, bool) or max_new_tokens < 1:
            raise ConfigError(
                f"{max_new_tokens!r} new tokens are asked for; give an integer of at least 1", setting="max_new_tokens"
            )
        stop = _checked_stop(stop)
        if not isinstance(sampling, SamplingConfig):
            raise ConfigError(f"sampling is {sampling!r}; give a SamplingConfig")
        ids = self.encode(prompt) if isinstance(prompt, str) else self._checked_ids(prompt)
        if self.max_prompt_tokens(max_new_tokens) < 1:
            raise CapacityError(
                f"{max_new_tokens} new tokens are asked for, but {self.models.name} holds {self.limit} positions, the "
                f"prompt's included; ask for at most {self.limit - 1}",
                setting="max_new_tokens",
            )
        if len(ids) > self.max_prompt_tokens(max_new_tokens):
            raise CapacityError(
                f"the prompt has {len(ids)} tokens and {max_new_tokens} more are asked for, but {self.models.name} "
                f"holds {self.limit} positions; use at most {self.max_prompt_tokens(max_new_tokens)} prompt tokens, or "
                "fewer new ones",
                setting="prompt_tokens",
            )
        if self.models.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.models.device)
        output = Output(
            prompt=ids,
            max_new_tokens=max_new_tokens,
            eos_token_ids=self.models.eos_token_ids,
            stop=stop,
            decode=TokenDecoder(self.models.tokenizer),
            until=until,
            choose=chooser(sampling, self.config.slots.path - 1 if depth is None else depth),
        )
        if processors:
            output.choose = ProcessedChooser(output.choose, processors, ids, output.ends_with)
        return output

    def _checked_ids(self, prompt: Tensor | Sequence[int]) -> Tensor:
        """Token ids [N] on the device; InputError for anything that is not a row of ids which the target knows."""
        ids = torch.as_tensor(prompt, device=self.models.device)
        if ids.ndim != 1 or not len(ids):
            raise InputError(f"a prompt is a non-empty row of token ids; given is one of shape {list(ids.shape)}")
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise InputError(f"a prompt is a row of integers; given is one of {ids.dtype}")
        lowest, highest, known = int(ids.min()), int(ids.max()), self.models.target.config.vocab_size
        if lowest < 0 or highest >= known:
            wrong = lowest if lowest < 0 else highest
            raise InputError(f"the prompt holds token id {wrong}; {self.models.name} knows 0 to {known - 1}")
        return ids.long()

    def _finish(self, loop: Iterator[Round | None], output: Output, on_round: OnRound | None) -> Generation:
        for round_ in loop:
            if on_round is not None:
                on_round(output, round_)
        cuda = self.models.device.type == "cuda"
        return output.result(torch.cuda.max_memory_allocated(self.models.device) if cuda else None)


def why_not_captured(models: LoadedModels, config: SpecExtendConfig, drafter: Drafter | None) -> str | None:
    """Why rounds cannot be captured as CUDA graphs, None where they can."""
    if models.device.type != "cuda":
        return f"{models.device.type} has no CUDA graphs"
    if models.ranks > 1:
        return "the target is shared by several processes"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    from specextend.modeling.llama_blocks import is_supported

    if not is_supported(models.target):
        return f"the kernels do not compute what {models.name} computes"
    if config.drafting == "hugging_face":
        return "transformers' own loop is not captured"
    if config.slots.verify > MAX_SLOTS:
        return f"trees of more than {MAX_SLOTS} slots are not captured"
    return None if drafter is None or drafter.can_capture else f"{name_of(config)}'s draft cannot be captured"


def _checked_stop(stop: Sequence[str]) -> tuple[str, ...]:
    if isinstance(stop, str) or stop is None or not all(isinstance(one, str) for one in stop):
        raise ConfigError(f"stop is {stop!r}; give a sequence of strings, as ['###']")
    if "" in stop:
        raise ConfigError("a stop string is empty; give at least one character")
    return tuple(stop)


def default_config(models: LoadedModels) -> SpecExtendConfig:
    """All parts of SpecExtend, with the retrieval of the preset and the tree of the device."""
    return SpecExtendConfig.specextend(tree=default_tree(models), retrieval=models.preset.retrieval)


def default_tree(models: LoadedModels) -> TreeConfig:
    """Trees priced by their time; the paper's where several processes share the target."""
    return TreeConfig() if models.ranks > 1 else TreeConfig.priced()


def _build_target(
    models: LoadedModels, config: SpecExtendConfig, cache: KVCache, tap: FeatureTap | None = None, *, fused: bool
) -> Target:
    if fused and config.flash_prefill:
        from specextend.modeling.fused_prefill import FusedPrefillTarget

        make = FusedPrefillTarget
    else:
        make = models.make_target
    return make(
        models.target,
        cache,
        prefill_attention=attention(hybrid=config.flash_prefill),
        tree_attention=attention(hybrid=config.hybrid_tree_attention),
        prefill_block=prefill_block(config, models.device),
        tap=tap,
    )


def _build_drafter(models: LoadedModels, config: SpecExtendConfig, cache: KVCache) -> Drafter | None:
    """The drafter of `config.drafting`; None where nobody drafts, or the model that should was not loaded."""

    def make(setting: SpecExtendConfig) -> Drafter:
        drafter = models.drafter(models.draft, setting, models.vocab_size)
        if isinstance(drafter, ClassicDrafter):
            drafter.clamp_ids(models.target.config.vocab_size)
        return drafter

    match config.drafting:
        case "none":
            return Drafter()
        case "lookup":
            return PromptLookup(config.tree.max_depth)
        case "self":
            return SelfDrafter(SparseTarget(models.target, cache, config), config.tree.max_depth)
        case "model" if models.draft is not None:
            return make(config)
        case "hierarchy" if models.draft is not None:
            small = make(HierarchicalDrafter.config_of_small(config))
            return HierarchicalDrafter(small, SparseTarget(models.target, cache, config), config)
    return None

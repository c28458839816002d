"""`SpecExtend`: a loaded pair of models with one setting, ready for any number of prompts, from any thread.

All switches are resolved here, once, into objects; nothing below asks what is on. Generations of one `LoadedModels`
take turns, whichever engine or thread asks for them.
"""

from __future__ import annotations

import gc
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor
from transformers import LogitsProcessor

from specextend.config import SamplingConfig, SpecExtendConfig, TreeConfig, override, prefill_block
from specextend.data.templates import Message, encode_chat, encode_prompt
from specextend.decoding.hugging_face import hugging_face, plain_twin
from specextend.decoding.loop import autoregressive, speculative
from specextend.decoding.output import Generation, Output, Round
from specextend.decoding.processors import ProcessedTarget
from specextend.decoding.sampling import chooser, greedy
from specextend.decoding.text import TextStream
from specextend.drafting.drafter import Drafter, TreeDrafter
from specextend.drafting.prompt_lookup import PromptLookup
from specextend.drafting.retrieval import retriever
from specextend.drafting.self_speculation import HierarchicalDrafter, SelfDrafter, SparseTarget
from specextend.errors import CapacityError, ConfigError, InputError, ModelError
from specextend.modeling.attention import attention
from specextend.modeling.cache import KVCache
from specextend.modeling.features import FeatureTap
from specextend.modeling.packed import return_freed_memory
from specextend.modeling.rope import make_exact
from specextend.modeling.target import Target
from specextend.models.loading import LoadedModels, load_models

GREEDY = SamplingConfig()
MAX_SLOTS = 128  # of a tree whose verification is captured
Observer = Callable[[Output, Round | None], None]
Prompt = str | Tensor | Sequence[int]
Loop = Callable[[SamplingConfig, Tensor, Output], Iterator[Round | None]]


class SpecExtend:
    """Lossless long-input speculative decoding of one target with one draft.

    Args:
        models: as `load_models` gives them.
        config: None takes SpecExtend with all of its parts, with the preset's tree for the device.
        cache: the target's KV cache, shared by engines that take turns; None makes one.
        eager: never capture CUDA graphs, which a GPU does by default where the models allow it.
    """

    def __init__(
        self, models: LoadedModels, config: SpecExtendConfig | None = None, *, cache: KVCache | None = None,
        eager: bool = False,
    ):  # fmt: skip
        self._models: LoadedModels | None = models
        self._eager = eager
        self.config = config or default_config(models)
        make_exact(models.target)
        self._cache = cache or KVCache(models.target.config, models.dtype, models.device)
        self._drafter = _build_drafter(models, self.config, self._cache)
        captures = not eager and can_capture(models)
        tap = self._drafter and self._drafter.tap
        self._target = _build_target(models, self.config, self._cache, tap, fused=captures)
        flash = SpecExtendConfig.specextend(prefill_block=self.config.prefill_block)
        self._baseline = _build_target(models, flash, self._cache, fused=captures)
        self._retriever = retriever(self.config.draft_cache, self.config.retrieval)
        self._speculative, self._autoregressive = self._loops(captures)

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
        **settings,
    ) -> SpecExtend:
        """Load `target` (a preset's name, a directory or a hub id) and its draft.

        Args:
            settings: fields of `config` (None: the default) that are to be different, those of its tree and its
                retrieval nested: draft_cache="full", tree={"nodes": 20}, retrieval={"top_k": 16}.
        """
        override(SpecExtendConfig(), settings)  # a mistake shows before anything is loaded
        models = load_models(target, draft=draft, dtype=dtype, device=device)
        return cls(models, override(config or default_config(models), settings), eager=eager)

    def with_config(self, config: SpecExtendConfig | None = None, **settings) -> SpecExtend:
        """The same models, and the same memory for the target's cache, under another setting.

        Args:
            config: None takes this engine's.
            settings: as for `from_pretrained`.
        """
        config = override(config or self.config, settings)
        return SpecExtend(self.models, config, cache=self._cache, eager=self._eager)

    def close(self) -> None:
        """Let go of models, caches and graphs, after what another thread is generating; safe to call again.

        Memory comes back once no other engine (`with_config`) and nobody else holds the same models.
        """
        if self._models is None:
            return
        lock, device = self._models.lock, self._models.device
        with nullcontext() if lock.is_mine() else lock():  # a stream left open in this thread ends here
            self._models = self._cache = self._drafter = self._target = self._baseline = None
            self._speculative = self._autoregressive = None
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return_freed_memory()

    def __enter__(self) -> SpecExtend:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

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

    def encode_chat(self, messages: Sequence[Message]) -> Tensor:
        """Token ids [N] of a conversation, written as the model expects it, up to where the assistant answers.

        A model without a conversation template, as the bundled one, reads the contents with blank lines between them.
        """
        ids = encode_chat(messages, self.models.preset.template, self.models.tokenizer)
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
        on_round: Observer | None = None,
    ) -> Generation:
        """Continue `prompt` (text, or token ids [N]) by speculative decoding.

        Args:
            processors: transformers' logits processors, applied to the target before `sampling`.
            until: asked after every token, with all new ones, whether to end there.
            on_round: called with the output so far after the prefill (round None) and after every round; what it
                raises ends the generation.
        """
        with self.models.lock():
            loop, output = self._speculate(prompt, max_new_tokens, sampling, stop, processors, until)
            return self._finish(loop, output, on_round)

    def chat(self, messages: Sequence[Message], max_new_tokens: int = 256, **options) -> Generation:
        """Answer a conversation, [{"role": "user", "content": "..."}, ...]; options as for `generate`."""
        return self.generate(self.encode_chat(messages), max_new_tokens, **options)

    def autoregressive(
        self,
        prompt: Prompt,
        max_new_tokens: int = 256,
        *,
        sampling: SamplingConfig = GREEDY,
        stop: Sequence[str] = (),
        on_round: Observer | None = None,
    ) -> Generation:
        """Continue `prompt` by the target alone: our fastest such loop, whatever the setting; the baseline."""
        with self.models.lock():
            ids, output = self._begin(prompt, max_new_tokens, stop, 1)
            return self._finish(self._autoregressive(sampling, ids, output), output, on_round)

    def stream(self, prompt: Prompt, max_new_tokens: int = 256, *, sampling=GREEDY, stop=()) -> Iterator[str]:
        """The text of `generate`, piece by piece as rounds finish; closing the iterator ends the generation.

        Between the first piece and its end no other generation of these models begins.
        """
        with self.models.lock():
            loop, output = self._speculate(prompt, max_new_tokens, sampling, stop)
            text = TextStream(output.decode, stop)
            for _ in loop:
                yield text.push(output.token_ids, last=output.finished)
                self._require_open()

    def _require_open(self) -> None:
        if self._models is None:
            raise InputError("this engine is closed; make another with SpecExtend.from_pretrained")

    def _speculate(
        self,
        prompt: Prompt,
        max_new_tokens: int,
        sampling: SamplingConfig,
        stop: Sequence[str],
        processors: Sequence[LogitsProcessor] = (),
        until: Callable[[list[int]], bool] | None = None,
    ) -> tuple[Iterator[Round | None], Output]:
        if self._speculative is None:
            raise ModelError(f"{self.models.name} was loaded without a draft model; name one with --draft_model")
        ids, output = self._begin(prompt, max_new_tokens, stop, self.config.tree.nodes + 1, until)
        if processors:
            return self._processed(ProcessedTarget(self._target, chooser(sampling), processors), ids, output), output
        return self._speculative(sampling, ids, output), output

    def _processed(self, target: ProcessedTarget, ids: Tensor, output: Output) -> Iterator[Round | None]:
        """The plain loops: captured rounds know no processors."""
        if self._drafter is None:
            return autoregressive(target, greedy, ids, output)
        return speculative(target, self._drafter, self._retriever, greedy, ids, output)

    def _loops(self, captures: bool) -> tuple[Loop | None, Loop]:
        """How this engine decodes: by its method, None where the draft it needs was not loaded, and the baseline."""
        decode, drafter = self._baseline_loop(captures), self._drafter
        if self.config.drafting == "none":
            return decode, decode
        if self.config.drafting == "hugging_face":
            if self.models.ranks > 1:
                raise ConfigError("transformers' own loop has no cache for a sharded target; choose another --method")
            twin = plain_twin(self.models.target)
            return lambda sampling, ids, output: hugging_face(twin, chooser(sampling), ids, output), decode
        if drafter is None:
            return None, decode
        tree = self.config.tree
        fits = isinstance(drafter, TreeDrafter) and tree.nodes < MAX_SLOTS and self.config.hybrid_tree_attention
        if captures and fits and drafter.can_capture:
            from specextend.decoding.graphs import CapturedSpeculation

            return CapturedSpeculation(self._target, drafter, self._retriever, tree), decode

        def speculate(sampling, ids, output):
            return speculative(self._target, drafter, self._retriever, chooser(sampling), ids, output)

        return speculate, decode

    def _baseline_loop(self, captures: bool) -> Loop:
        if captures:
            from specextend.decoding.graphs import CapturedDecoding

            return CapturedDecoding(self._baseline)
        return lambda sampling, ids, output: autoregressive(self._baseline, chooser(sampling), ids, output)

    def _begin(
        self, prompt: Prompt, max_new_tokens: int, stop: Sequence[str], slots: int,
        until: Callable[[list[int]], bool] | None = None,
    ) -> tuple[Tensor, Output]:  # fmt: skip
        """Check the request against the models before anything runs."""
        if max_new_tokens < 1:
            raise ConfigError(f"max_gen_len is {max_new_tokens}; it must be at least 1")
        if "" in stop:
            raise ConfigError("a stop string is empty; give at least one character")
        ids = self.encode(prompt) if isinstance(prompt, str) else torch.as_tensor(prompt, device=self.models.device)
        if ids.ndim != 1 or not len(ids):
            raise InputError(f"a prompt is a non-empty row of token ids; given is one of shape {list(ids.shape)}")
        if self.max_prompt_tokens(max_new_tokens) < 1:
            raise CapacityError(
                f"max_gen_len is {max_new_tokens}, but {self.models.name} holds {self.limit} positions, the prompt's "
                f"included; ask for at most {self.limit - 1}"
            )
        if len(ids) > self.max_prompt_tokens(max_new_tokens):
            raise CapacityError(
                f"the prompt has {len(ids)} tokens and {max_new_tokens} more are asked for, but {self.models.name} "
                f"holds {self.limit} positions; use at most {self.max_prompt_tokens(max_new_tokens)} prompt tokens "
                "(--input_len cuts the prompt to fit) or a smaller --max_gen_len"
            )
        if self.models.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.models.device)
        tokenizer = self.models.tokenizer  # a result may outlive the engine: it holds on to no more than this
        output = Output(
            prompt_tokens=len(ids),
            max_new_tokens=max_new_tokens,
            extra_slots=max_new_tokens + slots,
            eos_token_ids=self.models.eos_token_ids,
            stop=tuple(stop),
            decode=lambda tokens: tokenizer.decode(tokens, skip_special_tokens=True),
            synchronize=_synchronizer(self.models.device),
            until=until,
        )
        return ids, output

    def _finish(self, loop: Iterator[Round | None], output: Output, on_round: Observer | None) -> Generation:
        for round_ in loop:
            if on_round is not None:
                on_round(output, round_)
        cuda = self.models.device.type == "cuda"
        return output.result(torch.cuda.max_memory_allocated(self.models.device) if cuda else None)


def can_capture(models: LoadedModels) -> bool:
    """Whether rounds can be captured as CUDA graphs: on one GPU with Triton, for targets the kernels compute."""
    if models.device.type != "cuda" or models.ranks > 1 or importlib.util.find_spec("triton") is None:
        return False
    from specextend.modeling.llama_blocks import is_supported

    return is_supported(models.target)


def default_config(models: LoadedModels) -> SpecExtendConfig:
    """All parts of SpecExtend, with the tree and the retrieval of the preset."""
    return SpecExtendConfig.specextend(tree=default_tree(models), retrieval=models.preset.retrieval)


def default_tree(models: LoadedModels) -> TreeConfig:
    """The paper's tree; on a CPU the preset's own, since a CPU pays for every node where a GPU does not."""
    return (models.preset.cpu_tree if models.device.type == "cpu" else None) or TreeConfig()


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
        return models.drafter(models.draft, setting, models.vocab_size)

    match config.drafting:
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


def _synchronizer(device: torch.device) -> Callable[[], None]:
    return (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)

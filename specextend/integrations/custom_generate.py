"""transformers' own `generate` with SpecExtend as its decoding loop, on a model that is loaded already.

    model.generate(**inputs, custom_generate=specextend.custom_generate, draft_model="bundled", max_new_tokens=64)

The engine runs twins of the models: modules of their own over the same weights, so that the user's stay as they are.
"""

from __future__ import annotations

import copy
import inspect
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.generation import (
    GenerateDecoderOnlyOutput,
    StopStringCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.configuration_utils import GenerationMode

from specextend.config import SamplingConfig, SpecExtendConfig
from specextend.decoding.output import Output, Round
from specextend.engine import SpecExtend
from specextend.errors import ConfigError, InputError, ModelError
from specextend.modeling.attention import NAME
from specextend.modeling.packed import pack_linears
from specextend.models.checkpoints import ARCHITECTURES, find_checkpoint, load_causal_lm, read_config
from specextend.models.loading import LoadedModels, position_limit
from specextend.models.presets import PRESETS, Preset

BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # integers as wide as a float of so many bytes
WARPERS = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper)  # in the order both sides apply them


class CustomGenerate:
    """What `generate(custom_generate=...)` calls; keeps an engine per model, and forgets it with the model."""

    def __init__(self):
        self._engines: WeakKeyDictionary[PreTrainedModel, _Kept] = WeakKeyDictionary()
        self._lock = threading.Lock()

    @torch.no_grad()
    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        *,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        draft_model: PreTrainedModel | str | None = None,
        specextend_config: SpecExtendConfig | None = None,
        seed: int | None = None,
        stop_strings: str | list[str] | None = None,
        **model_kwargs: Any,
    ) -> GenerateDecoderOnlyOutput | Tensor:
        """Continue `input_ids` [1, N] as plain `generate` would: the same tokens greedily, the same law sampled.

        Args:
            draft_model: a causal LM with the target's vocabulary: loaded, a directory, a hub id or a preset's name.
            specextend_config: None takes SpecExtend with all of its parts.
            seed: of the sampling noise, as `SamplingConfig.seed`; None draws one from torch's generator, so that
                `torch.manual_seed` decides as it does for plain `generate`.
            stop_strings: taken here, since `generate` finds no tokenizer for them beside a callable.
        Returns:
            [1, N + new] token ids, or transformers' output object under `return_dict_in_generate`.
        """
        lost = _lost_arguments()
        _refuse(input_ids, generation_config, model_kwargs, lost)
        if stop_strings is not None:
            if lost.get("tokenizer") is None:
                raise InputError("stop_strings need the model's tokenizer: generate(..., tokenizer=tokenizer)")
            stopping_criteria.append(StopStringCriteria(lost["tokenizer"], stop_strings))
        engine = self._engine(model, draft_model, specextend_config)
        processors, sampling = _split(logits_processor, generation_config.do_sample, seed)
        notes = _notes(generation_config, logits_processor[len(processors) :])
        if notes:
            processors = [notes["logits"], *processors, notes["scores"]]
        result = engine.generate(
            input_ids[0],
            generation_config.max_length - input_ids.shape[1],
            sampling=sampling,
            processors=processors,
            until=_Until(input_ids, generation_config.max_length, stopping_criteria),
            on_round=_feeder(lost.get("streamer")),
        )
        if lost.get("streamer") is not None:
            lost["streamer"].end()
        new_ids = torch.tensor([result.token_ids], dtype=input_ids.dtype, device=input_ids.device)
        sequences = torch.cat((input_ids, new_ids), dim=1)
        if not generation_config.return_dict_in_generate:
            return sequences
        wanted = {name: note.rows(len(result.token_ids)) for name, note in notes.items() if note.wanted}
        return GenerateDecoderOnlyOutput(sequences=sequences, **wanted)

    def close(self) -> None:
        """Forget every engine, so that its caches and copies are freed; the next call makes a new one."""
        with self._lock:
            self._engines.clear()

    def _engine(self, model: PreTrainedModel, draft, config: SpecExtendConfig | None) -> SpecExtend:
        """The engine kept for the model, unless a weight, the draft or the setting changed since."""
        _check(model, "the model")
        if isinstance(draft, PreTrainedModel):
            _check(draft, "the draft")
        elif not isinstance(draft, str):
            raise ConfigError(
                f"draft_model is {draft!r}; give a loaded causal LM, a directory, a hub id or a preset's name"
            )
        with self._lock:
            weights = _fingerprint(model), _fingerprint(draft) if isinstance(draft, PreTrainedModel) else None
            kept = self._engines.get(model)
            if kept is None or not kept.serves(weights, draft, config):
                self._engines.pop(model, None)  # freed before the next is made
                engine = SpecExtend(_load(model, draft), config)
                held = ref(draft) if isinstance(draft, PreTrainedModel) else lambda: draft
                kept = self._engines[model] = _Kept(engine, weights, held, config)
            return kept.engine


@dataclass(frozen=True)
class _Kept:
    engine: SpecExtend
    weights: tuple
    draft: Callable[[], object]
    config: SpecExtendConfig | None

    def serves(self, weights: tuple, draft: object, config: SpecExtendConfig | None) -> bool:
        same_draft = self.draft() == draft if isinstance(draft, str) else self.draft() is draft
        return self.weights == weights and same_draft and self.config == config


# --- the models ---------------------------------------------------------------------------------------------------


def _load(model: PreTrainedModel, draft: PreTrainedModel | str) -> LoadedModels:
    name = model.name_or_path or type(model).__name__
    if isinstance(draft, str):
        directory = find_checkpoint(PRESETS[draft].draft or draft if draft in PRESETS else draft)
        small = load_causal_lm(directory, read_config(directory), dtype=model.dtype, device=model.device)
    else:
        if draft.device != model.device:
            raise ModelError(f"the model is on {model.device}, the draft on {draft.device}; put both on one device")
        small = _twin(draft)
    if small.config.vocab_size < model.config.vocab_size:
        raise ModelError(
            f"the draft knows {small.config.vocab_size} tokens, the model {model.config.vocab_size}; choose a draft "
            "with the model's vocabulary"
        )
    return LoadedModels(
        name=name,
        preset=Preset(name, name, None, cpu_tree=PRESETS["bundled"].cpu_tree),
        target=_twin(model),
        draft=small,
        tokenizer=_NoText(),
        eos_token_ids=frozenset(),  # among the stopping criteria
        limit=position_limit(model.config),
        vocab_size=model.config.vocab_size,
        device=model.device,
        dtype=model.dtype,
        target_id=name,
        draft_id=draft if isinstance(draft, str) else draft.name_or_path,
    )


class _NoText:
    """The tokenizer of an engine that deals in token ids alone."""

    chat_template = None

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return ""


def _check(model: PreTrainedModel, which: str) -> None:
    """ModelError for a model our attention does not compute."""
    if model.config.model_type not in ARCHITECTURES:
        raise ModelError(f"{which} is a {type(model).__name__}; supported are {', '.join(ARCHITECTURES.values())}")
    dtypes = {weight.dtype for weight in model.parameters()}
    if not all(dtype.is_floating_point and dtype.itemsize in BITS for dtype in dtypes):
        raise ModelError(f"{which} is quantized; load it in fp32, fp16 or bf16")
    devices = {str(weight.device) for weight in model.parameters()}
    if len(devices) > 1 or "meta" in devices:
        raise ModelError(f"{which} is spread over {', '.join(sorted(devices))}; load it on one device")


def _twin(model: PreTrainedModel) -> PreTrainedModel:
    """`model` with our attention, in eval mode: modules and parameters of its own over the same memory.

    What joins or packs weights does so to the twin, in a copy. Hence `_fingerprint`.
    """
    weights = {id(weight): nn.Parameter(weight.detach(), requires_grad=False) for weight in model.parameters()}
    twin = copy.deepcopy(model, weights).eval()
    twin.set_attn_implementation(NAME)
    pack_linears(twin)
    return twin


def _fingerprint(model: PreTrainedModel) -> tuple:
    """Where every weight lies and the sum of its bits: what training, loading or merging an adapter changes."""
    weights = [weight.detach() for weight in model.parameters()]
    sums = [weight.view(BITS[weight.dtype.itemsize]).sum(dtype=torch.int64) for weight in weights]
    return tuple(weight.data_ptr() for weight in weights), tuple(torch.stack(sums).tolist())


# --- the request --------------------------------------------------------------------------------------------------


def _lost_arguments() -> dict[str, Any]:
    """`streamer`, `tokenizer` and `assistant_model` as `generate` was given them.

    transformers 5.17 collects them for its own loops and hands a callable none of them
    (`GenerationMixin._extract_generation_mode_kwargs`); they are read where it still has them: in its frame, and in
    that of the `torch.no_grad` around it.
    """
    frame = sys._getframe(1)
    while frame is not None and frame.f_code is not inspect.unwrap(GenerationMixin.generate).__code__:
        frame = frame.f_back
    if frame is None:
        return {}
    return {
        "streamer": frame.f_locals["streamer"],
        "assistant_model": frame.f_locals["assistant_model"],
        "tokenizer": frame.f_back.f_locals.get("kwargs", {}).get("tokenizer"),
    }


def _refuse(input_ids: Tensor, config: GenerationConfig, model_kwargs: dict[str, Any], lost: dict[str, Any]) -> None:
    """ConfigError for what the engine does not do."""
    mode = config.get_generation_mode(lost.get("assistant_model"))
    cache = model_kwargs.get("past_key_values")
    mask = model_kwargs.get("attention_mask")
    faults = {
        f"{mode.value.replace('_', ' ')}: it decodes greedily or samples (num_beams=1, no assistant_model)": (
            mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
        ),
        f"num_return_sequences={config.num_return_sequences}: ask for one, several times": (
            (config.num_return_sequences or 1) > 1
        ),
        f"a batch of {len(input_ids)} prompts: give one at a time": len(input_ids) > 1,
        "an attention_mask with zeros: leave the padding away": mask is not None and not bool(mask.all()),
        "inputs_embeds: give input_ids": model_kwargs.get("inputs_embeds") is not None,
        "past_key_values with contents: give the whole prompt": cache is not None and cache.get_seq_length() > 0,
        "output_attentions and output_hidden_states: they are not kept": bool(
            config.return_dict_in_generate and (config.output_attentions or config.output_hidden_states)
        ),
    }
    for fault, found in faults.items():
        if found:
            raise ConfigError(f"specextend.custom_generate does not take {fault}")


def _split(
    prepared: Sequence[LogitsProcessor], do_sample: bool, seed: int | None
) -> tuple[list[LogitsProcessor], SamplingConfig]:
    """The processors to run, and the sampling that does what the rest, temperature, top-k and top-p at the end, would.

    Sampling by these three alone is then what `SpecExtend.generate` does, token for token, and needs no processor.
    """
    if not do_sample:
        return list(prepared), SamplingConfig()
    if seed is None:
        seed = int(torch.randint(2**63 - 1, ()))
    rest = list(prepared)
    found: dict[type, LogitsProcessor] = {}
    for kind in reversed(WARPERS):
        if rest and type(rest[-1]) is kind:
            found[kind] = rest.pop()
    temperature, top_k, top_p = map(found.get, WARPERS)
    sampling = SamplingConfig(
        temperature=temperature.temperature if temperature else 1.0,
        top_k=top_k.top_k if top_k else 0,
        top_p=top_p.top_p if top_p else 1.0,
        seed=seed,
    )
    return rest, sampling


class _Until:
    """Stopping criteria asked as `generate` asks them: after every token, with the ids [1, n] so far."""

    def __init__(self, prompt: Tensor, max_length: int, criteria: StoppingCriteriaList):
        self._prompt_tokens, self._criteria = prompt.shape[1], criteria
        self._ids = torch.cat((prompt, prompt.new_zeros(1, max_length - prompt.shape[1])), dim=1)

    def __call__(self, token_ids: list[int]) -> bool:
        end = self._prompt_tokens + len(token_ids)
        self._ids[0, end - 1] = token_ids[-1]
        return bool(self._criteria(self._ids[:, :end], None).all())


def _feeder(streamer) -> Callable[[Output, Round | None], None] | None:
    if streamer is None:
        return None

    def feed(output: Output, round_: Round | None) -> None:
        for token in round_.tokens if round_ else output.token_ids:
            streamer.put(torch.tensor([token]))

    return feed


class _Note(LogitsProcessor):
    """Keeps the scores that pass, behind `warpers`, one row per output position."""

    def __init__(self, wanted: bool, warpers: Sequence[LogitsProcessor] = ()):
        self.wanted = wanted
        self._warpers = LogitsProcessorList(warpers)
        self._rows: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.wanted:
            self._rows.append(self._warpers(input_ids, scores.clone()))
        return scores

    def rows(self, tokens: int) -> tuple[Tensor, ...]:
        """[1, V] for each of the first `tokens` positions; those behind the end were for nothing."""
        return tuple(row.clone() for row in self._rows[:tokens])  # outside inference mode: ordinary tensors


def _notes(config: GenerationConfig, warpers: Sequence[LogitsProcessor]) -> dict[str, _Note]:
    """What has to be kept for the output object; nothing without one."""
    wanted = {"logits": config.output_logits, "scores": config.output_scores}
    if not config.return_dict_in_generate or not any(wanted.values()):
        return {}
    return {"logits": _Note(bool(wanted["logits"])), "scores": _Note(bool(wanted["scores"]), warpers)}


custom_generate = CustomGenerate()

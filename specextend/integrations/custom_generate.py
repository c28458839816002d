"""transformers' own `generate` with SpecExtend as its decoding loop, on a model that is loaded already.

    model.generate(**inputs, custom_generate=specextend.custom_generate, assistant_model=draft, max_new_tokens=64)

The engine runs twins of the models (`twin.py`), so that the user's stay as they are. Nothing differs silently from
plain `generate`: a request, a model or a change since the last call is honoured, or refused in one line.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType
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
    PreTrainedTokenizerBase,
    QuantizedCache,
    StoppingCriteriaList,
)
from transformers.generation import (
    GenerateDecoderOnlyOutput,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.streamers import BaseStreamer

from specextend.config import SamplingConfig, SpecExtendConfig
from specextend.decoding.output import Output, Round
from specextend.engine import SpecExtend
from specextend.errors import ConfigError
from specextend.integrations.caches import CacheDoor
from specextend.integrations.drafts import checked, join
from specextend.integrations.fingerprint import fingerprint
from specextend.integrations.rows import Row, are_usual, check_batch, fault_of_mask, rows_of, together
from specextend.integrations.twin import check_model, is_ordinary, make_twin
from specextend.models.checkpoints import one_line
from specextend.models.loading import LoadedModels, position_limit
from specextend.models.presets import Preset

UNDERSTOOD = ("attention_mask", "position_ids", "past_key_values", "inputs_embeds", "use_cache", "logits_to_keep")
WARPERS = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper)  # in the order both sides apply them


class CustomGenerate:
    """What `generate(custom_generate=...)` calls; keeps an engine per model, and forgets it with the model."""

    def __init__(self):
        self._engines: WeakKeyDictionary[PreTrainedModel, _Kept] = WeakKeyDictionary()
        self._lock = threading.Lock()

    @property
    def __signature__(self) -> inspect.Signature:
        """Of the call below. transformers asks for it at the one point where a tokenizer can be given back.

        It takes `tokenizer=` away from every callable, and then finds none for the stop strings and token healing that
        it does itself; a tokenizer that is among the arguments again is handed to both.
        """
        frame = _frame_of(GenerationMixin._extract_generation_mode_kwargs)
        if frame is not None and "tokenizer" in frame.f_locals.get("generation_mode_kwargs", ()):
            frame.f_locals["kwargs"]["tokenizer"] = frame.f_locals["generation_mode_kwargs"]["tokenizer"]
        return inspect.signature(self.__call__)

    @torch.no_grad()
    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        *,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        draft_model: nn.Module | str | None = None,
        assistant_model: nn.Module | str | None = None,
        streamer: BaseStreamer | None = None,
        synced_gpus: bool | None = None,
        specextend_config: SpecExtendConfig | None = None,
        seed: int | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        **model_kwargs: Any,
    ) -> GenerateDecoderOnlyOutput | Tensor:
        """Continue `input_ids` [B, N] as plain `generate` would: the same tokens greedily, the same law sampled.

        What would differ is refused: ConfigError for the request, ModelError for the models. The rows of a batch take
        turns.

        Args:
            draft_model, assistant_model: one of them, a causal LM with the target's vocabulary or an EAGLE head of the
                target's: loaded, a directory, a hub id, or the name of a preset with a draft of its own.
            streamer, synced_gpus: as for `generate`.
            specextend_config: None takes SpecExtend with all of its parts.
            seed: of the sampling noise, as `SamplingConfig.seed`; None draws one from torch's generator, so that
                `torch.manual_seed` decides as it does for plain `generate`. The rows of a batch count on from it.
            tokenizer: for `generate` itself (`stop_strings`, `token_healing`).
        Returns:
            [B, N + new] token ids, or transformers' output object under `return_dict_in_generate`.
        """
        handed = {"streamer": streamer, "assistant_model": assistant_model, "synced_gpus": synced_gpus}
        lost = _lost_arguments() | {name: value for name, value in handed.items() if value is not None}
        mask = model_kwargs.get("attention_mask")
        cache = CacheDoor(model_kwargs.get("past_key_values"), returned=generation_config.return_dict_in_generate)
        _refuse(model, input_ids, generation_config, model_kwargs, lost, cache)
        _check_own(specextend_config, seed)
        check_batch(len(input_ids), generation_config, logits_processor, stopping_criteria, lost["streamer"])
        call = _Call(
            self._engine(model, _one_draft(draft_model, lost["assistant_model"]), specextend_config),
            generation_config, logits_processor, stopping_criteria, lost["streamer"], cache,
        )  # fmt: skip
        rows = list(rows_of(input_ids, mask))
        answers = [call.answer(row, seed) for row in rows]
        if call.streamer is not None:
            call.streamer.end()
        pad = generation_config._pad_token_tensor
        sequences = together(input_ids, answers, 0 if pad is None else int(pad))
        known = cache.fill(rows)
        if not generation_config.return_dict_in_generate:
            return sequences
        return GenerateDecoderOnlyOutput(sequences=sequences, **call.wanted, **known)

    def close(self) -> None:
        """Forget every engine, so that its caches and copies are freed; the next call makes a new one."""
        with self._lock:
            self._engines.clear()

    def _engine(self, model: PreTrainedModel, draft: object, config: SpecExtendConfig | None) -> SpecExtend:
        """The engine kept for the model, unless anything about it, the draft or the setting changed since."""
        check_model(model, "the model")
        draft = checked(draft)
        with self._lock:
            prints = fingerprint(model), fingerprint(draft) if isinstance(draft, nn.Module) else None
            kept = self._engines.get(model)
            if kept is None or not kept.serves(prints, draft, config):
                self._engines.pop(model, None)  # freed before the next is made
                engine = SpecExtend(join(_load(model), draft), config, eager=not is_ordinary(model))
                held = ref(draft) if isinstance(draft, nn.Module) else lambda: draft
                kept = self._engines[model] = _Kept(engine, prints, held, config)
            return kept.engine


@dataclass(frozen=True)
class _Kept:
    engine: SpecExtend
    prints: tuple
    draft: Callable[[], object]
    config: SpecExtendConfig | None

    def serves(self, prints: tuple, draft: object, config: SpecExtendConfig | None) -> bool:
        same_draft = self.draft() == draft if isinstance(draft, str) else self.draft() is draft
        return self.prints == prints and same_draft and self.config == config


class _Call:
    """One call of `generate`, row by row.

    Attributes:
        wanted: what the output object has beside the sequences.
    """

    def __init__(
        self, engine: SpecExtend, config: GenerationConfig, processors: LogitsProcessorList,
        criteria: StoppingCriteriaList, streamer: BaseStreamer | None, cache: CacheDoor,
    ):  # fmt: skip
        self._engine, self._config, self._processors = engine, config, processors
        self._criteria, self.streamer, self._cache = criteria, streamer, cache
        self.wanted: dict[str, tuple[Tensor, ...]] = {}

    def answer(self, row: Row, seed: int | None) -> list[int]:
        """The new tokens of a row."""
        config, end = self._config, self._config.max_length
        processors, sampling = _split(self._processors, config.do_sample, seed, row.index)
        notes = _notes(config, self._processors[len(processors) :])
        processors = row.of(processors)
        if notes:
            processors = [notes["logits"], *processors, notes["scores"]]
        known = self._cache.known(row)
        result = self._engine.generate(
            row.tokens, end - row.padded.shape[1], sampling=sampling, processors=processors,
            until=_Until(row.padded, end, self._criteria, notes.get("scores")), on_round=self._on_round,
            key_values=known,
        )  # fmt: skip
        if known is not None and self._engine.reads_hidden_states:
            self._cache.check(known)
        self.wanted = {name: note.rows(len(result.token_ids)) for name, note in notes.items() if note.wanted}
        return result.token_ids

    def _on_round(self, output: Output, round_: Round | None) -> None:
        if self.streamer is not None:
            for token in round_.tokens if round_ else output.token_ids:
                self.streamer.put(torch.tensor([token]))
        self._cache.listen(self._engine, output, round_)


# --- the models ---------------------------------------------------------------------------------------------------


def _load(model: PreTrainedModel) -> LoadedModels:
    """The model as a target, without a draft yet."""
    name = model.name_or_path or type(model).__name__
    return LoadedModels(
        name=name,
        preset=Preset(name, name, None),
        target=make_twin(model),
        draft=None,
        tokenizer=_NoText(),
        eos_token_ids=frozenset(),  # among the stopping criteria
        limit=position_limit(model.config),
        vocab_size=model.config.vocab_size,
        device=model.device,
        dtype=model.dtype,
        target_id=name,
        draft_id=None,
    )


def _one_draft(draft: object, assistant: object) -> object:
    if draft is not None and assistant is not None:
        raise ConfigError("draft_model and assistant_model both name a draft; give one of them")
    return assistant if draft is None else draft


class _NoText:
    """The tokenizer of an engine that deals in token ids alone."""

    chat_template = None

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return ""


# --- the request --------------------------------------------------------------------------------------------------


def _frame_of(function: Callable) -> FrameType | None:
    """The innermost frame that runs `function`."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code is not inspect.unwrap(function).__code__:
        frame = frame.f_back
    return frame


def _lost_arguments() -> dict[str, Any]:
    """`streamer`, `assistant_model` and `synced_gpus` as `generate` was given them.

    transformers 5.17 collects them for its own loops and hands a callable none of them
    (`GenerationMixin._extract_generation_mode_kwargs`); they are read where it still has them, in its frame. One that
    hands them over is believed instead.
    """
    frame = _frame_of(GenerationMixin.generate)
    names = ("streamer", "assistant_model", "synced_gpus")
    return {name: frame.f_locals.get(name) if frame is not None else None for name in names}


def _refuse(
    model: PreTrainedModel, input_ids: Tensor, config: GenerationConfig, model_kwargs: dict[str, Any],
    lost: dict[str, Any], cache: CacheDoor,
) -> None:  # fmt: skip
    """ConfigError for what the engine does not do."""
    mode = config.get_generation_mode()
    mask, positions = model_kwargs.get("attention_mask"), model_kwargs.get("position_ids")
    unknown = [name for name, value in model_kwargs.items() if name not in UNDERSTOOD and value is not None]
    faults = {
        f"{mode.value.replace('_', ' ')}: it decodes greedily or samples (num_beams=1)": (
            mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
        ),
        "inputs_embeds: give input_ids": model_kwargs.get("inputs_embeds") is not None,
        "a quantized cache, which changes the answer: leave cache_implementation away": (
            isinstance(model_kwargs.get("past_key_values"), QuantizedCache)
        ),
        "output_attentions and output_hidden_states: they are not kept": bool(
            config.return_dict_in_generate and (config.output_attentions or config.output_hidden_states)
        ),
        f"{', '.join(unknown)}: the engine's models are given tokens alone": bool(unknown),
        "synced_gpus: it runs on one device": bool(lost["synced_gpus"]),
        "autocast: load the model in the dtype it should run in": torch.is_autocast_enabled(input_ids.device.type),
        f"an attention_mask of {mask is not None and list(mask.shape)} beside input_ids of {list(input_ids.shape)}: "
        "give equal shapes": mask is not None and mask.shape != input_ids.shape,
    }
    for fault, found in faults.items():
        if found:
            raise ConfigError(f"specextend.custom_generate does not take {fault}")
    fault = fault_of_mask(mask) or cache.fault(input_ids, model.config)
    if fault is None and positions is not None and not are_usual(positions, mask, input_ids):
        fault = "position_ids other than 0, 1, 2, ...: leave them away"
    if fault:
        raise ConfigError(f"specextend.custom_generate does not take {fault}")


def _check_own(config: object, seed: object) -> None:
    """ConfigError for arguments of ours that are not what they should be."""
    if config is not None and not isinstance(config, SpecExtendConfig):
        given = one_line(repr(config), 40)
        raise ConfigError(
            f"specextend_config is {given}; give a specextend.SpecExtendConfig, or None for all its parts"
        )
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise ConfigError(f"seed is {one_line(repr(seed), 40)}; give an integer in 0 .. 2^63 - 1, or None")


def _split(
    prepared: Sequence[LogitsProcessor], do_sample: bool, seed: int | None, row: int
) -> tuple[list[LogitsProcessor], SamplingConfig]:
    """The processors to run, and the sampling that does what the rest, temperature, top-k and top-p at the end, would.

    Sampling by these three alone is then what `SpecExtend.generate` does, token for token, and needs no processor.

    Args:
        row: whose noise it is; the first has that of `seed`.
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
        seed=(seed + row) % 2**63 if seed >= 0 else seed,
    )
    return rest, sampling


class _Until:
    """Stopping criteria asked as `generate` asks them: after every token, with the ids [1, n] and scores so far."""

    def __init__(self, prompt: Tensor, max_length: int, criteria: StoppingCriteriaList, scores: _Note | None):
        self._prompt_tokens, self._criteria = prompt.shape[1], criteria
        self._scores = scores if scores is not None and scores.wanted else None
        self._ids = torch.cat((prompt, prompt.new_zeros(1, max_length - prompt.shape[1])), dim=1)

    def __call__(self, token_ids: list[int]) -> bool:
        end = self._prompt_tokens + len(token_ids)
        self._ids[0, end - 1] = token_ids[-1]
        scores = self._scores and self._scores.rows(len(token_ids))
        return bool(self._criteria(self._ids[:, :end], scores).all())


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

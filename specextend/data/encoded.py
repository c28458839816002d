"""From files, or the built-in text, to prompts of token ids that fit the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from specextend.data.builtin import builtin_text
from specextend.data.prompts import Prompt, cut_to_fit
from specextend.engine import SpecExtend
from specextend.errors import CapacityError, ConfigError

BUILTIN_LENGTH = 4096
CHARACTERS_PER_TOKEN = 32  # no text has more; longer ones than the model holds are refused before they are tokenized
ANSWER_MARKER = 64  # tokens kept at a prompt's end when it is cut: the question, the template's last words


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt ready to run: ids [N], where it came from, and how long it was before it was cut."""

    ids: Tensor
    source: str
    original_tokens: int


def gather_prompts(
    engine: SpecExtend, prompts: Sequence[Prompt] | None, limit: int, length: int | None, max_new_tokens: int
) -> Iterator[EncodedPrompt]:
    """Up to `limit` of `prompts`, or the built-in text, cut to `length` tokens if one is given.

    A prompt that is too long and was not asked to be cut is left as it is: the engine says what is allowed.
    """
    if limit < 1:
        raise ConfigError(f"max_samples is {limit}; it must be at least 1")
    if length is not None and length < 1:
        raise ConfigError(f"input_len is {length}; it must be at least 1")
    if prompts is None:
        yield _builtin(engine, length or max(1, min(BUILTIN_LENGTH, engine.max_prompt_tokens(max_new_tokens))))
        return
    most = CHARACTERS_PER_TOKEN * engine.limit
    for prompt in prompts[:limit]:
        if len(prompt.text) > most:
            raise CapacityError(
                f"{prompt.source} has {len(prompt.text):,} characters; {engine.models.name} holds {engine.limit:,} "
                f"tokens, for which a text may have {most:,}: shorten it"
            )
        ids = engine.encode(prompt.text)
        yield EncodedPrompt(cut_to_fit(ids, length, ANSWER_MARKER) if length else ids, prompt.source, len(ids))


def _builtin(engine: SpecExtend, length: int) -> EncodedPrompt:
    """The beginning of the language reference; plain text is cut at the end, so that the model continues it."""
    text = builtin_text()
    ids = engine.encode(text[: 16 * length])
    tail = ANSWER_MARKER if engine.models.preset.template else 0
    return EncodedPrompt(cut_to_fit(ids, length, tail), "Python language reference (pydoc_data.topics)", len(ids))

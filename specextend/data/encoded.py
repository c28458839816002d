"""From files, or the built-in text, to prompts of token ids that fit the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from specextend.data.builtin import builtin_text
from specextend.data.prompts import cut_to_fit, read_prompts
from specextend.errors import ConfigError

BUILTIN_LENGTH = 4096
ANSWER_MARKER = 64  # tokens kept at a prompt's end when it is cut: the question, the template's last words


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt ready to run: ids [N], where it came from, and how long it was before it was cut."""

    ids: Tensor
    source: str
    original_tokens: int


def gather_prompts(
    input_file: Path | None,
    limit: int,
    length: int | None,
    *,
    encode: Callable[[str], Tensor],
    max_prompt_tokens: int,
    has_template: bool,
) -> Iterator[EncodedPrompt]:
    """Up to `limit` prompts of `input_file`, or the built-in text, cut to `length` tokens if one is given.

    A prompt that is too long and was not asked to be cut is left as it is: the engine says what is allowed.

    Args:
        encode: text -> ids [N], template included.
        max_prompt_tokens: the model's limit, for the built-in text.
        has_template: whether `encode` puts the text into a conversation, whose last words must stay.
    """
    for name, setting, value in (("max_samples", "prompts", limit), ("input_len", "prompt_tokens", length)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}; it must be at least 1", setting=setting)
    if input_file is None:
        tail = ANSWER_MARKER if has_template else 0
        yield _builtin(encode, length or max(1, min(BUILTIN_LENGTH, max_prompt_tokens)), tail)
        return
    for prompt in read_prompts(input_file, limit):
        ids = encode(prompt.text)
        yield EncodedPrompt(cut_to_fit(ids, length, ANSWER_MARKER) if length else ids, prompt.source, len(ids))


def _builtin(encode: Callable[[str], Tensor], length: int, tail: int) -> EncodedPrompt:
    """The beginning of the language reference; plain text is cut at the end, so that the model continues it."""
    ids = encode(builtin_text())
    return EncodedPrompt(cut_to_fit(ids, length, tail), "Python language reference (pydoc_data.topics)", len(ids))

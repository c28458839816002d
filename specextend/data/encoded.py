"""From files, or the built-in text, to prompts of token ids that fit the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from specextend.data.builtin import builtin_text
from specextend.data.prompts import Prompt, cut_to_fit
from specextend.errors import CapacityError, ConfigError

BUILTIN_LENGTH = 4096
CHARACTERS_PER_TOKEN = 32  # no text has more; longer ones than the model holds are refused before they are tokenized
SUMMARY_REQUEST = "\n\nSummarize the text above in less than 200 words."
ANSWER_MARKER = 64  # tokens kept at a prompt's end when it is cut: the question, the template's last words


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt ready to run: ids [N], where it came from, and how long it was before it was cut."""

    ids: Tensor
    source: str
    original_tokens: int


def gather_prompts(
    prompts: Sequence[Prompt] | None,
    limit: int,
    length: int | None,
    *,
    encode: Callable[[str], Tensor],
    max_prompt_tokens: int,
    has_template: bool,
) -> Iterator[EncodedPrompt]:
    """Up to `limit` of `prompts`, or the built-in text, cut to `length` tokens if one is given.

    A prompt that is too long and was not asked to be cut is left as it is: the engine says what is allowed.

    Args:
        encode: text -> ids [N], template included.
        max_prompt_tokens: what the model holds besides the new tokens.
        has_template: whether `encode` puts the text into a conversation, whose last words must stay.
    """
    for name, setting, value in (("max_samples", "prompts", limit), ("input_len", "prompt_tokens", length)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}; it must be at least 1", setting=setting)
    if prompts is None:
        tail = ANSWER_MARKER if has_template else 0
        yield _builtin(encode, length or max(1, min(BUILTIN_LENGTH, max_prompt_tokens)), tail)
        return
    most = CHARACTERS_PER_TOKEN * max(1, max_prompt_tokens)
    for prompt in prompts[:limit]:
        if len(prompt.text) > most:
            raise CapacityError(
                f"{prompt.source} has {len(prompt.text):,} characters; {max_prompt_tokens:,} tokens are left for the "
                f"prompt, for which a text may have {most:,}: shorten it"
            )
        ids = encode(prompt.text)
        yield EncodedPrompt(cut_to_fit(ids, length, ANSWER_MARKER) if length else ids, prompt.source, len(ids))


def _builtin(encode: Callable[[str], Tensor], length: int, tail: int) -> EncodedPrompt:
    """The beginning of the language reference; plain text is cut at the end, so that the model continues it.

    In a conversation, where the end stays (`tail`), the model is asked for a summary there.
    """
    ids = encode(builtin_text() + SUMMARY_REQUEST if tail else builtin_text())
    return EncodedPrompt(cut_to_fit(ids, length, tail), "Python language reference (pydoc_data.topics)", len(ids))

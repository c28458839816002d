"""A generation as a notebook shows it: accepted draft tokens coloured and underlined, then a line of figures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from html import escape
from itertools import groupby
from operator import itemgetter
from typing import Protocol

from specextend.decoding.text import TextStream

_DRAFT = "color:#1a7f37;text-decoration:underline"  # green that reads on white and on black


class Emitted(Protocol):
    """What a round emitted: tokens, of which the first `accepted` were the draft's."""

    tokens: list[int]
    accepted: int


class Shown(Protocol):
    """What is shown of a generation, see `output.Generation`."""

    prompt_tokens: int
    token_ids: list[int]
    text: str
    finish_reason: str
    rounds: list[Emitted]
    decode: Callable[[list[int]], str]
    new_tokens: int
    accepted_per_round: float
    ttft_s: float
    decode_tokens_per_s: float


def to_html(generation: Shown) -> str:
    """The text with its accepted draft tokens marked, and how it went."""
    spans = spans_by_origin(generation.token_ids, generation.rounds, generation.decode)
    marked = "".join(
        f'<span style="{_DRAFT}">{escape(text)}</span>' if drafted else escape(text)
        for text, drafted in cut(spans, len(generation.text))
    )
    figures = (
        f"{generation.new_tokens} tokens ({generation.finish_reason}) after {generation.prompt_tokens}; "
        f"{generation.accepted_per_round:.2f} draft tokens accepted per round; "
        f"first token after {generation.ttft_s:.2f} s, then {generation.decode_tokens_per_s:.1f} tokens/s; "
    )
    legend = f'<span style="{_DRAFT}">accepted draft tokens</span>'
    return (
        f'<div style="white-space:pre-wrap;overflow-wrap:anywhere">{marked}</div>'
        f'<div style="font-size:smaller;margin-top:.5em">{figures}{legend}</div>'
    )


def spans_by_origin(
    token_ids: Sequence[int], rounds: Sequence[Emitted], decode: Callable[[list[int]], str]
) -> Iterator[tuple[str, bool]]:
    """The text in pieces, each with whether the draft wrote it; a character of several tokens goes to the last's.

    Args:
        token_ids: the prefill's token and those of all `rounds`.
    """
    origins = [False]
    for one in rounds:
        origins += [True] * one.accepted + [False] * (len(one.tokens) - one.accepted)
    stream, shown = TextStream(decode), []
    for drafted, tokens in groupby(zip(origins, token_ids, strict=True), key=itemgetter(0)):
        text = ""
        for _, token in tokens:
            shown.append(token)
            text += stream.push(shown, last=len(shown) == len(token_ids))
        yield text, drafted


def cut(spans: Iterator[tuple[str, bool]], length: int) -> Iterator[tuple[str, bool]]:
    """The spans' first `length` characters, empty ones left out."""
    for text, drafted in spans:
        if text[:length]:
            yield text[:length], drafted
        length = max(0, length - len(text))

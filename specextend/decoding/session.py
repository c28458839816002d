"""A conversation: what was said goes before what is asked, and is not read again where prefixes are reused."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from specextend.decoding.output import Generation


class Session:
    """Questions and answers so far; any number of sessions take turns on one engine.

    Args:
        chat: answers messages, as `SpecExtend.chat` does.
        messages: what was said before.
        options: of `chat`, for every question.
    Attributes:
        messages: with the answers; a question that failed is not among them.
    """

    def __init__(self, chat: Callable[..., Generation], messages: Sequence[Mapping[str, str]] = (), **options: Any):
        self._chat, self._options = chat, options
        self.messages: list[Mapping[str, str]] = list(messages)

    def ask(self, text: str, max_new_tokens: int = 256, **options: Any) -> Generation:
        """The answer to `text` after all that was said; `options` go before the session's own."""
        asked = [*self.messages, {"role": "user", "content": text}]
        answer = self._chat(asked, max_new_tokens, **(self._options | options))
        self.messages = [*asked, {"role": "assistant", "content": answer.text}]
        return answer

    def fork(self) -> Session:
        """Another session that goes on from here."""
        return Session(self._chat, self.messages, **self._options)

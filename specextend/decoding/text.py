"""Text out of a growing list of tokens: only what no later token can change."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TokenDecoder:
    """Token ids -> text without special tokens; a result that may outlive the engine holds on to no more than this."""

    tokenizer: PreTrainedTokenizerBase

    def __call__(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)


class TextStream:
    """Decodes incrementally; the pieces add up to the text of the whole.

    Holds back an unfinished UTF-8 character, and the beginning of what may become a stop string.

    Args:
        decode: token ids -> text.
        stop: strings before which the text ends.
    """

    def __init__(self, decode: Callable[[list[int]], str], stop: Sequence[str] = ()):
        self._decode, self._stop = decode, stop
        self._start = 0  # first token of the decoding window
        self._read = 0  # tokens whose text is in self._text
        self._text = ""
        self._sent = 0

    def push(self, token_ids: Sequence[int], *, last: bool = False) -> str:
        """The new text now that the output is `token_ids`; `last` lets go of what was held back."""
        before = self._decode(list(token_ids[self._start : self._read]))
        now = self._decode(list(token_ids[self._start :]))
        if last or not now.endswith("\ufffd"):
            self._text += now[len(before) :]
            # the last tokens decoded stay as context, since a token's text may depend on its left neighbour
            self._start, self._read = self._read, len(token_ids)
        end = self._end(last)
        piece, self._sent = self._text[self._sent : end], max(end, self._sent)
        return piece

    def _end(self, last: bool) -> int:
        cuts = [position for position in (self._text.find(stop) for stop in self._stop) if position >= 0]
        if cuts:
            return min(cuts)
        held = 0 if last else max((self._overlap(stop) for stop in self._stop), default=0)
        return len(self._text) - held

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of the text that begins `stop`."""
        return next((n for n in range(min(len(stop), len(self._text)), 0, -1) if self._text.endswith(stop[:n])), 0)

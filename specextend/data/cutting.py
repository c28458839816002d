"""Documents cut into prompts of a given length, by one model's tokenizer and conversation template.

Two ways to shorten a document: its beginning alone ("Experiments"), each length served by whatever is long enough; or
beginning and end without the middle, the same documents at every length, so that what changes is the length alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from specextend.data.prompts import SUMMARY_TEMPLATE
from specextend.data.templates import encode_prompt
from specextend.errors import InputError, ModelError

GAP = "\n[...]\n"  # stands where the middle was
_AROUND = [re.escape(part.strip()).replace("\\\n", r"\s+") for part in SUMMARY_TEMPLATE.split("{text}")]
_SUMMARY_PROMPT = re.compile(rf"\s*{_AROUND[0]}\s*(.*?)\s*{_AROUND[1]}\s*", re.DOTALL)


@dataclass(frozen=True)
class Document:
    """A text to make prompts of; `source` says where it is from ("kmfoda/booksum:12", a file's name)."""

    text: str
    source: str


def document_in(prompt: str) -> str:
    """The document that a summarization prompt of ours asks about; any other text is taken for a document itself."""
    found = _SUMMARY_PROMPT.fullmatch(prompt)
    return found[1] if found else prompt


@dataclass(frozen=True)
class Cutter:
    """Cuts documents into prompts by their beginning."""

    tokenizer: PreTrainedTokenizerBase
    template: str | None

    def records(self, document: Document, lengths: Iterable[int]) -> dict[int, dict]:
        """One record for each of `lengths` (tokens) that the document is long enough for."""
        spans = token_spans(document.text, self.tokenizer)
        return {length: self._record(document, spans, length, length) for length in lengths if length <= len(spans)}

    def needed(self, lengths: Iterable[int]) -> int:
        """Tokens that a document must have to give any record."""
        return min(lengths)

    def tokens_of(self, prompt: str) -> int:
        """Tokens of a whole prompt, conversation template included."""
        return len(encode_prompt(prompt, self.template, self.tokenizer))

    def _record(self, document: Document, spans: list[tuple[int, int]], length: int, most: int) -> dict:
        """The summarization prompt of at most `most` tokens for the bucket `length`."""
        keep = most
        while keep > 0:
            prompt = SUMMARY_TEMPLATE.format(text=self._shortened(document.text, spans, keep))
            tokens = self.tokens_of(prompt)
            if tokens <= most:
                return {
                    "text": prompt, "original_length": len(spans), "trunc_length": tokens, "source": document.source,
                }  # fmt: skip
            keep -= tokens - most  # the first round learns what the templates take, later ones settle merges
        raise InputError(
            f"a length of {length} tokens is filled by the prompt's template alone; use longer ones", setting="lengths"
        )

    def _shortened(self, text: str, spans: list[tuple[int, int]], keep: int) -> str:
        """`text`, whose tokens lie at `spans`, without all but `keep` of them."""
        return text[: spans[keep - 1][1]]


@dataclass(frozen=True)
class SameDocuments(Cutter):
    """Cuts each document to every length by taking out its middle, or to none.

    Args:
        limit: most tokens of a prompt, whatever its length is called: what the model holds besides the new ones.
    """

    limit: int

    def records(self, document: Document, lengths: Iterable[int]) -> dict[int, dict]:
        """One record for each of `lengths`, if the document is long enough for the longest; else none."""
        lengths = list(lengths)
        spans = token_spans(document.text, self.tokenizer)
        if len(spans) < self.needed(lengths):
            return {}
        return {
            length: self._record(document, spans, length, min(length, self.limit)) | {"document": document.source}
            for length in lengths
        }

    def needed(self, lengths: Iterable[int]) -> int:
        return min(max(lengths), self.limit)

    def _shortened(self, text: str, spans: list[tuple[int, int]], keep: int) -> str:
        head, tail = keep - keep // 2, keep // 2
        return text[: spans[head - 1][1]] + GAP + (text[spans[len(spans) - tail][0] :] if tail else "")


def token_spans(text: str, tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, int]]:
    """Where each token [N] of a text begins and ends, in characters."""
    encoding = tokenizer(
        text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False
    )
    return encoding["offset_mapping"]


def load_cutter(model_name: str) -> Cutter:
    """The tokenizer and conversation template of a model, without its weights."""
    from specextend.models.loading import load_tokenizer
    from specextend.models.presets import find_preset

    tokenizer = load_tokenizer(model_name)
    if not tokenizer.is_fast:
        raise ModelError(f"{model_name} has no fast tokenizer, which cutting texts needs; use another model's")
    own_template = "chat" if tokenizer.chat_template else None
    return Cutter(tokenizer, find_preset(model_name).template or own_template)


def load_limit(model_name: str, room: int) -> int:
    """Most tokens of a prompt that leave a model `room` for new ones; no weights are read."""
    from specextend.models.checkpoints import read_config
    from specextend.models.positions import position_limit
    from specextend.models.presets import find_preset, find_target

    held = position_limit(read_config(find_target(find_preset(model_name), weights=False)[0]))
    if not 0 <= room < held:
        raise InputError(f"room is {room} tokens; {model_name} holds {held}: leave some to the prompt", setting="room")
    return held - room

"""What a target is asked while its heads' training text is written: an excerpt of the corpus in its chat template."""

from __future__ import annotations

import numpy as np
from transformers import PreTrainedTokenizerBase

from scripts.train.corpus import Encoded
from scripts.train.settings import TrainingError
from specextend.data.templates import format_prompt

# how often, and what stands before and after the excerpt; most ask for a summary, as long documents are read for that
REQUESTS = (
    (4, "Summarize the following text into a summary of less than 800 words.\n### Text:\n\n", "\n\n### Summary:"),
    (4, "", "\n\nSummarize the text above in less than 200 words."),
    (2, "Summarize this text.\n\n", ""),
    (2, "List the most important points of this text.\n\n", ""),
    (2, "Go on with this text in the same style.\n\n", ""),
    (2, "", "\n\nWhat is this text about? Who and what is mentioned in it?"),
    (1, "Explain this in simple words.\n\n", ""),
    (1, "Read this document.\n\n", "\n\nAsk five questions about it and answer each."),
    (1, "Write a story that begins like this.\n\n", ""),
    (1, "Report on this as a newspaper would.\n\n", ""),
)
EXCERPT = "\ue000"  # stands for it while the template is applied
SMALLEST_EXCERPT = 16  # tokens


class Prompts:
    """Draws prompts of a given number of tokens.

    Args:
        template: "chat", a fschat template's name, or None: an excerpt alone, which the target continues.
    """

    def __init__(self, corpus: Encoded, tokenizer: PreTrainedTokenizerBase, template: str | None, seed: int) -> None:
        self._corpus, self._rng = corpus, np.random.default_rng(seed)
        self._frames = [_frame(before + EXCERPT + after, tokenizer, template) for _, before, after in REQUESTS]
        self._weights = np.array([weight for weight, *_ in REQUESTS], float)
        if template is None:
            self._frames, self._weights = [_frame(EXCERPT, tokenizer, None)], np.ones(1)

    def __call__(self, count: int, length: int) -> np.ndarray:
        """Ids [count, length] int64."""
        rooms = np.array([length - len(head) - len(tail) for head, tail in self._frames])
        weights = self._weights * (rooms >= SMALLEST_EXCERPT)
        if not weights.any():
            raise TrainingError(
                f"prompts of {length} tokens leave no room for an excerpt; raise --draft_context or lower "
                "--generation_answer"
            )
        which = self._rng.choice(len(rooms), size=count, p=weights / weights.sum())
        prompts = np.empty((count, length), np.int64)
        for index, (head, tail) in enumerate(self._frames):
            chosen = np.flatnonzero(which == index)
            if len(chosen):
                prompts[chosen, : len(head)], prompts[chosen, length - len(tail) :] = head, tail
                excerpts = self._corpus.draw(self._rng, len(chosen), int(rooms[index]))
                prompts[chosen, len(head) : length - len(tail)] = excerpts
        return prompts


def _frame(content: str, tokenizer: PreTrainedTokenizerBase, template: str | None) -> tuple[list[int], list[int]]:
    """Ids before and after the excerpt in a prompt of `content`."""
    before, after = format_prompt(content, template, tokenizer).split(EXCERPT)
    return (
        tokenizer(before, add_special_tokens=template != "chat").input_ids,
        tokenizer(after, add_special_tokens=False).input_ids,
    )

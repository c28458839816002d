"""The steps of a round in plain PyTorch, on any device, for any model: the definition, and the oracle of the tests."""

from __future__ import annotations

from torch import Tensor

from specextend.config import RoundSlots
from specextend.decoding.backend import Reservation, read_prompt
from specextend.decoding.output import Output
from specextend.decoding.prefixes import NoReuse
from specextend.drafting.drafter import Drafter
from specextend.drafting.retrieval import Retriever
from specextend.modeling.target import Target
from specextend.trees.acceptance import accept


class EagerBackend:
    """A target, a drafter, and what tells the draft which part of the context to keep.

    Args:
        slots: cache slots that a round may need.
        prefixes: what is kept from prompt to prompt.
    """

    name = "eager"

    def __init__(
        self, target: Target, drafter: Drafter, retriever: Retriever, slots: RoundSlots, prefixes: NoReuse | None = None
    ):  # fmt: skip
        self.device, self._prefixes = target.model.device, prefixes or NoReuse()
        self._target, self._drafter, self._retriever, self._slots = target, drafter, retriever, slots

    def prefill(self, output: Output) -> Tensor:
        self._output, self._reserved = output, Reservation(output, self._slots)
        return read_prompt(output, self._target, self._drafter, self._reserved.extra_slots, self._prefixes)

    def refresh_is_due(self) -> bool:
        return self._retriever.is_due(len(self._output.rounds), self._output.context)

    def refresh(self) -> None:
        context = self._drafter.context
        positions = self._retriever.select(self._target.attention_row, context)
        self._drafter.refresh(positions)
        if self._output.observer:
            self._output.observer.refreshed(len(self._output.rounds), positions, context)

    def draft(self) -> None:
        if self._reserved.is_short(self._output.context):
            self._reserved.grow(self._output.context)
            self._target.cache.require(self._reserved.tokens + self._slots.verify)
            self._drafter.require(self._reserved.tokens + self._slots.verify)
        self._tree = self._drafter.propose()
        if self._output.observer:
            self._output.observer.drafted(self._tree)

    def verify(self) -> None:
        logits = self._target.verify(self._tree)
        self._chosen = self._output.choose(logits, self._tree, self._output.new_tokens)
        if self._output.observer:
            self._output.observer.verified(self._tree, logits)

    def accept(self) -> None:
        self._accepted = accept(self._tree, self._chosen)
        self._target.commit(self._accepted.path)
        self._drafter.commit(self._accepted)
        if self._output.observer:
            self._output.observer.accepted(self._accepted.path)

    def read(self) -> tuple[int, list[int]]:
        return len(self._tree) - 1, [*self._accepted.tokens.tolist(), int(self._accepted.bonus)]

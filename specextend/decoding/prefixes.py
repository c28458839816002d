"""Prefix reuse: a prompt that begins like what target and draft have read before is read from where they part.

The target keeps every committed token, the generated ones, too: verification computed for them what a prefill would.
A draft keeps what a prefill would have put into its cache, and no more, so that it guesses after a hit as well as
without. Tokens that a small model has read while decoding, with its working cache in view in place of the prompt, are
read again, by the draft alone; the entries of an EAGLE head depend on its inputs only, and stay.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from specextend.decoding.output import Output
from specextend.drafting.drafter import Drafter
from specextend.modeling.cache import KVCache
from specextend.modeling.prefixes import Contents, PrefixLimits
from specextend.models.loading import LoadedModels

ORDINARY = ("torch.nn.", "transformers.", "specextend.")
INDEPENDENT = ("default", "linear", "llama3", "yarn")  # kinds of rope that rotate a token alike in every prompt


class Known(NamedTuple):
    """Entries of target and draft that are there before a prefill."""

    target: int = 0
    draft: int = 0


class NoReuse:
    """Every prompt is read whole; what others left in the target's cache is copied before it is lost.

    Args:
        limits: None copies nothing.
    """

    def __init__(self, cache: KVCache | None = None, limits: PrefixLimits | None = None):
        self._cache, self._limits = cache, limits

    def enter(self, output: Output) -> Known:
        """Prepare the caches for the prompt of `output`; what they hold of it already."""
        if self._cache is not None and self._limits is not None:
            self._cache.prefixes.leave(self._cache, self._limits)
        return Known(self._take(output.given))

    def hold(self, output: Output) -> None:
        """The caches hold the prompt of `output`, and will hold what it becomes."""

    def hold_part(self, output: Output, read: Known) -> None:
        """The caches hold a part of the prompt of `output`, whose prefill ended there."""

    def _take(self, given: torch.Tensor | None) -> int:
        """Have the target's cache begin with `given`; entries that are there now."""
        if given is None:
            return 0
        tokens = given.shape[-2]
        if self._cache.capacity < tokens:
            self._cache.reset(tokens)
        self._cache.buffer[..., :tokens, :] = given
        return tokens

    @property
    def nbytes(self) -> int:
        """Of all copies."""
        return sum(cache.prefixes.nbytes for cache in self._caches)

    def make_room(self) -> bool:
        """Free what only other prompts have a use for; whether that was anything."""
        return any([cache.prefixes.drop_copies() for cache in self._caches])

    @property
    def _caches(self) -> list[KVCache]:
        return [] if self._cache is None else [self._cache]


class PrefixReuse(NoReuse):
    """The beginnings that target and draft know are not read again.

    Args:
        cache: the target's, whose ledger all engines over it share.
    """

    def __init__(self, cache: KVCache, drafter: Drafter, limits: PrefixLimits):
        super().__init__(cache, limits)
        self._drafter = drafter

    def enter(self, output: Output) -> Known:
        prompt = output.prompt[:-1].cpu()  # the last token is read in any case: what follows it is asked for
        draft = self._of_draft(prompt, output.prefix_scope)
        if output.given is not None:
            self._cache.prefixes.leave(self._cache, self._limits)
            taken = self._take(output.given)
            return Known(taken if self._drafter.tap is None else min(taken, draft), draft)
        if self._drafter.tap is not None:
            prompt = prompt[:draft]  # the draft reads the target's hidden states of all that it does not know
        return Known(self._cache.prefixes.enter(self._cache, prompt, output.prefix_scope, self._limits), draft)

    def hold(self, output: Output) -> None:
        # a copy: the caller's tensor may become another prompt
        prompt, drafter = output.prompt.to("cpu", copy=True), self._drafter

        def contents(entries: int, lookahead: int = 0) -> Contents:
            generated = torch.tensor(output.token_ids, dtype=prompt.dtype)
            return Contents(output.prefix_scope, torch.cat((prompt, generated)), entries, lookahead)

        def of_draft() -> Contents:
            emitted = [len(one.tokens) for one in output.rounds]
            return contents(drafter.entries(len(prompt), emitted), drafter.lookahead)

        if output.given is None:  # what others computed is nothing to go by
            self._cache.prefixes.hold(lambda: contents(output.context))
        if drafter.kept is not None:
            drafter.kept.prefixes.hold(of_draft)

    def hold_part(self, output: Output, read: Known) -> None:
        prompt, scope, drafter = output.prompt.to("cpu", copy=True), output.prefix_scope, self._drafter
        if output.given is None:
            self._cache.prefixes.hold(lambda: Contents(scope, prompt, read.target))
        if drafter.kept is not None:
            drafter.kept.prefixes.hold(lambda: Contents(scope, prompt, read.draft, drafter.lookahead))
        if drafter.tap is not None:
            drafter.tap.clear()

    @property
    def _caches(self) -> list[KVCache]:
        return [self._cache, *([] if self._drafter.kept is None else [self._drafter.kept])]

    def _of_draft(self, prompt: torch.Tensor, scope: str | None) -> int:
        kept = self._drafter.kept
        return 0 if kept is None else kept.prefixes.enter(kept, prompt, scope, self._limits)


def why_not_reused(models: LoadedModels) -> str | None:
    """Why no prefix of these models can be reused, None where it can."""
    if models.ranks > 1:
        return "the target is shared by several processes"
    kind = models.target.config.rope_parameters["rope_type"]
    if kind not in INDEPENDENT:
        return f"with {kind} rope a token's key depends on the prompt's length"
    for name, module in models.target.named_modules():
        wrapped = "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks
        if wrapped or not type(module).__module__.startswith(ORDINARY):
            return f"{name or models.name} has a forward of its own, whose keys may depend on the whole prompt"
    return None

"""What a generation produces and how it went: tokens as they come, rounds, clocks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor

from specextend.decoding.html import to_html
from specextend.decoding.observer import Observer
from specextend.decoding.sampling import Chooser, greedy


@dataclass
class Round:
    """One round of decoding.

    Attributes:
        tokens: what it emitted, cut at EOS, a stop string or max_new_tokens.
        drafted: draft tokens in the tree, 0 for autoregressive decoding.
        accepted: draft tokens among them; the bonus token is the last one, unless the output ended before it.
        seconds: per stage, "retrieve", "draft", "verify", "accept", those that ran; "host" is what none of
            them accounts for.
        price: tokens per second that its parts had to earn, 0 where the tree's bounds are fixed.
    """

    tokens: list[int]
    drafted: int
    accepted: int
    seconds: dict[str, float]
    price: float = 0.0


@dataclass
class Generation:
    """A finished generation and how it went.

    Attributes:
        token_ids: new tokens, EOS included when it was produced.
        text: the new tokens decoded without special tokens, cut before a stop string.
        finish_reason: "length", "eos" or "stop".
        rounds: one per round after the prefill, whose own token is in `token_ids` only.
        prefill_seconds: "target" and "draft".
        peak_bytes: most GPU memory allocated at once, None on a CPU.
        capture_s: seconds spent on capturing graphs and timing steps, 0 once both are done; in no other figure.
        decode: token ids -> text.
        cached_tokens: of the prompt, not read because the target knew them from an earlier one.
    """

    prompt_tokens: int
    token_ids: list[int]
    text: str
    finish_reason: str
    rounds: list[Round]
    prefill_seconds: dict[str, float]
    peak_bytes: int | None = None
    capture_s: float = 0.0
    decode: Callable[[list[int]], str] = field(default=str, repr=False, compare=False)
    cached_tokens: int = 0

    def _repr_html_(self) -> str:
        return to_html(self)

    @property
    def new_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def ttft_s(self) -> float:
        """Time to first token: the whole prefill, the draft's included."""
        return sum(self.prefill_seconds.values())

    @property
    def decode_s(self) -> float:
        return sum(sum(r.seconds.values()) for r in self.rounds)

    @property
    def total_s(self) -> float:
        return self.ttft_s + self.decode_s

    @property
    def accepted_per_round(self) -> float:
        """Draft tokens accepted per round, bonus token excluded (the paper's tau)."""
        return _ratio(sum(r.accepted for r in self.rounds), len(self.rounds))

    @property
    def tokens_per_round(self) -> float:
        """Tokens emitted per round, bonus token included; 1.0 for autoregressive decoding."""
        return _ratio(self.new_tokens - 1, len(self.rounds))

    @property
    def price(self) -> float:
        """Mean of the rounds' prices, in tokens per second; 0 where nobody asked for one."""
        return _ratio(sum(r.price for r in self.rounds), len(self.rounds))

    @property
    def nodes_per_round(self) -> float:
        """Draft tokens verified per round."""
        return _ratio(sum(r.drafted for r in self.rounds), len(self.rounds))

    @property
    def plain_share(self) -> float:
        """Share of the rounds that verified no draft token."""
        return _ratio(sum(not r.drafted for r in self.rounds), len(self.rounds))

    @property
    def tokens_per_s(self) -> float:
        """End to end, prefill included."""
        return _ratio(self.new_tokens, self.total_s)

    @property
    def decode_tokens_per_s(self) -> float:
        return _ratio(self.new_tokens - 1, self.decode_s)

    def stage_seconds(self) -> dict[str, float]:
        """Seconds per stage over all rounds."""
        totals: dict[str, float] = {}
        for one in self.rounds:
            for stage, seconds in one.seconds.items():
                totals[stage] = totals.get(stage, 0.0) + seconds
        return totals


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else 0.0


@dataclass
class Output:
    """Tokens as they come, how each is chosen, and where they end.

    Args:
        prompt: [N].
        max_new_tokens: most tokens ever kept, at least 1.
        eos_token_ids: any of them ends the output and is its last token.
        stop: strings that end the output as soon as its text contains one.
        decode: token ids -> text.
        until: asked after every token, with all of them, whether the output ends here.
        choose: the target's rule for the next token.
        observer: told of every step.
        prefix_scope: what is read here is known again to prompts of the same scope alone.
        given: [2, L, 1, H_kv, n, D] the target's keys and values of the prompt's first tokens, fewer than it has.
        on_block: told before each block of the prefill who reads, "target" or "draft", and how much it has read.
    Attributes:
        prefill_seconds: "target" and "draft".
        cached_tokens: of the prompt, known to the target before the prefill.
        capture_s: seconds spent on capturing graphs, on buffers for them and on timing steps, in no other figure.
        price: of the next round, see `Round`.
    """

    prompt: Tensor
    max_new_tokens: int
    eos_token_ids: frozenset[int]
    stop: Sequence[str]
    decode: Callable[[list[int]], str]
    until: Callable[[list[int]], bool] | None = None
    choose: Chooser = greedy
    observer: Observer | None = None
    prefix_scope: str | None = None
    given: Tensor | None = None
    on_block: Callable[[str, int], None] | None = None
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    rounds: list[Round] = field(default_factory=list)
    prefill_seconds: dict[str, float] = field(default_factory=dict)
    capture_s: float = 0.0
    cached_tokens: int = 0
    price: float = 0.0
    _ahead: list[tuple[int, str | None]] = field(default_factory=list)  # tokens judged before they are appended

    @property
    def prompt_tokens(self) -> int:
        return len(self.prompt)

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def new_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def context(self) -> int:
        """Prompt and output, the newest token, which no cache holds yet, left out."""
        return self.prompt_tokens + self.new_tokens - 1

    @contextmanager
    def setting_up(self, wait: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Seconds of what is inside count as `capture_s`; `wait` waits for the device."""
        began = time.perf_counter()
        yield
        wait()
        self.capture_s += time.perf_counter() - began

    def begin(self, first: Tensor) -> None:
        """Take the prefill's token."""
        self._extend([int(first)])

    def append(self, drafted: int, tokens: list[int], seconds: dict[str, float]) -> Round:
        """Take a round's tokens, the bonus token last, as many as belong to the output."""
        kept = self._extend(tokens)
        self.rounds.append(Round(kept, drafted, min(len(tokens) - 1, len(kept)), seconds, self.price))
        return self.rounds[-1]

    def ends_with(self, token: int) -> bool:
        """Whether the output ends with `token` behind all that was appended or asked about so far."""
        ids = [*self.token_ids, *(known for known, _ in self._ahead), token]
        self._ahead.append((token, self._reason(ids)))
        return self._ahead[-1][1] is not None

    def text(self) -> str:
        """The text so far, cut before the first stop string."""
        text = self.decode(self.token_ids)
        cuts = [position for position in (text.find(stop) for stop in self.stop) if position >= 0]
        return text[: min(cuts)] if cuts else text

    def result(self, peak_bytes: int | None) -> Generation:
        assert self.finish_reason is not None, "the generation has not finished"
        return Generation(
            self.prompt_tokens,
            list(self.token_ids),  # the caller's own; what the caches hold is known from these
            self.text(),
            self.finish_reason,
            self.rounds,
            self.prefill_seconds,
            peak_bytes,
            self.capture_s,
            self.decode,
            self.cached_tokens,
        )

    def _extend(self, tokens: list[int]) -> list[int]:
        """Append tokens up to the one that ends the output; returns those kept."""
        start = len(self.token_ids)
        for token in tokens:
            self.token_ids.append(token)
            if self._ahead:  # each token is judged once: whoever judges may remember
                known, self.finish_reason = self._ahead.pop(0)
                assert known == token, "a token was judged that did not come"
            else:
                self.finish_reason = self._reason(self.token_ids)
            if self.finish_reason:
                break
        return self.token_ids[start:]

    def _reason(self, ids: list[int]) -> str | None:
        """Why an output of `ids` ends with its last token, None if it does not."""
        if ids[-1] in self.eos_token_ids:
            return "eos"
        if (self.stop and self._has_stop(ids)) or (self.until is not None and self.until(ids)):
            return "stop"
        return "length" if len(ids) == self.max_new_tokens else None

    def _has_stop(self, ids: list[int]) -> bool:
        # a stop string of n characters is at most 4n bytes, hence spans at most 4n tokens
        window = 4 * max(map(len, self.stop)) + 4
        tail = self.decode(ids[-window:])
        return any(stop in tail for stop in self.stop)

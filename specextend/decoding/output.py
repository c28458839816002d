"""What a generation produces and how it went: tokens as they come, rounds, clocks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor

from specextend.decoding.html import to_html


@dataclass
class Round:
    """One round of decoding.

    Attributes:
        tokens: what it emitted, cut at EOS, a stop string or max_new_tokens.
        drafted: draft tokens in the tree, 0 for autoregressive decoding.
        accepted: draft tokens among them; the bonus token is the last one, unless the output ended before it.
        seconds: per stage, "retrieve", "draft", "verify", "accept", those that ran; "host" is what a captured round
            spends outside of them.
    """

    tokens: list[int]
    drafted: int
    accepted: int
    seconds: dict[str, float]


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
        decode: token ids -> text.
    """

    prompt_tokens: int
    token_ids: list[int]
    text: str
    finish_reason: str
    rounds: list[Round]
    prefill_seconds: dict[str, float]
    peak_bytes: int | None = None
    decode: Callable[[list[int]], str] = field(default=str, repr=False, compare=False)

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
    """Tokens as they come, where they end, and a clock for each stage.

    Args:
        max_new_tokens: most tokens ever kept, at least 1.
        extra_slots: cache slots the run may need beyond the prompt.
        eos_token_ids: any of them ends the output and is its last token.
        stop: strings that end the output as soon as its text contains one.
        decode: token ids -> text.
        synchronize: waits for the device, so that clocks read finished work.
        until: asked after every token, with all of them, whether the output ends here.
    """

    prompt_tokens: int
    max_new_tokens: int
    extra_slots: int
    eos_token_ids: frozenset[int]
    stop: Sequence[str]
    decode: Callable[[list[int]], str]
    synchronize: Callable[[], None]
    until: Callable[[list[int]], bool] | None = None
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    rounds: list[Round] = field(default_factory=list)
    prefill_seconds: dict[str, float] = field(default_factory=dict)
    _seconds: dict[str, float] = field(default_factory=dict)

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

    def prefill_stage(self, name: str):
        return self._clock(self.prefill_seconds, name)

    def stage(self, name: str):
        return self._clock(self._seconds, name)

    @contextmanager
    def _clock(self, seconds: dict[str, float], name: str) -> Iterator[None]:
        self.synchronize()
        start = time.perf_counter()
        yield
        self.synchronize()
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start

    def begin(self, first: Tensor) -> None:
        """Take the prefill's token."""
        self._extend([int(first)])

    def append(self, drafted: int, tokens: list[int], seconds: dict[str, float] | None = None) -> Round:
        """Take a round's tokens, the bonus token last, as many as belong to the output.

        Args:
            seconds: per stage, where they were not taken by `stage`.
        """
        kept = self._extend(tokens)
        self.rounds.append(Round(kept, drafted, min(len(tokens) - 1, len(kept)), seconds or self._seconds))
        self._seconds = {}
        return self.rounds[-1]

    def text(self) -> str:
        """The text so far, cut before the first stop string."""
        text = self.decode(self.token_ids)
        cuts = [position for position in (text.find(stop) for stop in self.stop) if position >= 0]
        return text[: min(cuts)] if cuts else text

    def result(self, peak_bytes: int | None) -> Generation:
        assert self.finish_reason is not None, "the generation has not finished"
        return Generation(
            self.prompt_tokens,
            self.token_ids,
            self.text(),
            self.finish_reason,
            self.rounds,
            self.prefill_seconds,
            peak_bytes,
            self.decode,
        )

    def _extend(self, tokens: list[int]) -> list[int]:
        """Append tokens up to the one that ends the output; returns those kept."""
        start = len(self.token_ids)
        for token in tokens:
            self.token_ids.append(token)
            self.finish_reason = self._reason(token)
            if self.finish_reason:
                break
        return self.token_ids[start:]

    def _reason(self, token: int) -> str | None:
        if token in self.eos_token_ids:
            return "eos"
        if (self.stop and self._has_stop()) or (self.until is not None and self.until(self.token_ids)):
            return "stop"
        return "length" if len(self.token_ids) == self.max_new_tokens else None

    def _has_stop(self) -> bool:
        # a stop string of n characters is at most 4n bytes, hence spans at most 4n tokens
        window = 4 * max(map(len, self.stop)) + 4
        tail = self.decode(self.token_ids[-window:])
        return any(stop in tail for stop in self.stop)

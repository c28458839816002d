"""Running a race, and its record: every token with its origin and its time, and the chunks the draft read.

The lanes run one after the other on engines that share models and memory. Times are the engine's own clock (the sums of
its stages), which is what every table of this project reports.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from specextend.config import SamplingConfig, SpecExtendConfig
from specextend.data.encoded import EncodedPrompt
from specextend.decoding.observer import Observer
from specextend.decoding.output import Generation, Output, Round
from specextend.decoding.text import TextStream
from specextend.drafting.retrieval import num_chunks
from specextend.engine import GREEDY, OnBlock, OnRound, SpecExtend
from specextend.errors import ModelError

WARM_UP_ROUNDS = 6  # more than between two refreshes of the working cache
PROMPT_END = 24  # tokens of the prompt that are kept to be shown
LABELS = {"autoregressive": "Autoregressive", "standard": "Standard speculative", "specextend": "SpecExtend"}


@dataclass(frozen=True)
class Step:
    """What came at one moment: the prefill's token, then a round's.

    Args:
        at_s: seconds since the start, prefill included.
        pieces: text of each token, accepted draft tokens first; "" for one that ends inside a character, whose text
            comes with the token that completes it.
        accepted: draft tokens among them; the others are the target's own.
    """

    at_s: float
    pieces: list[str]
    accepted: int


@dataclass(frozen=True)
class Lane:
    """One method's run: `steps[0]` is the prefill's token."""

    method: str
    label: str
    token_ids: list[int]
    steps: list[Step]
    accepted_per_round: float
    decode_tokens_per_s: float
    total_s: float
    finish_reason: str

    @property
    def text(self) -> str:
        return "".join(piece for step in self.steps for piece in step.pieces)


@dataclass(frozen=True)
class Selection:
    """From round `round` (0 is the first after the prefill) the draft reads these `chunks` of the context's `of`."""

    round: int
    chunks: list[int]
    of: int


@dataclass(frozen=True)
class Race:
    """A finished race.

    Args:
        source: where the prompt came from, for people.
        original_tokens: of what was read of the document, before it was cut to `prompt_tokens`.
        prompt_end: the prompt's last words, which the texts continue.
        selections: of SpecExtend's draft, one per refresh; empty where they could not be watched.
        differs_at: first output position at which two lanes differ, None if all are the same.
    """

    source: str
    model: str
    draft: str
    device: str
    dtype: str
    prompt_tokens: int
    original_tokens: int
    prompt_end: str
    max_new_tokens: int
    temperature: float
    seed: int
    chunk_size: int
    lanes: list[Lane]
    selections: list[Selection]
    differs_at: int | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Race:
        lanes = [Lane(**lane | {"steps": [Step(**step) for step in lane["steps"]]}) for lane in content["lanes"]]
        selections = [Selection(**selection) for selection in content["selections"]]
        return cls(**content | {"lanes": lanes, "selections": selections})


@dataclass(frozen=True)
class Progress:
    """Where a race is: `tokens` is None while the lane reads the prompt."""

    label: str
    tokens: int | None
    max_new_tokens: int


Report = Callable[[Progress], None]


class Racetrack:
    """The lanes over one pair of models.

    Args:
        engine: SpecExtend, as it shall race; standard decoding gets its tree.
    """

    def __init__(self, engine: SpecExtend):
        if engine.models.draft is None:
            raise ModelError(f"{engine.models.name} was loaded without a draft model; name one with --draft_model")
        config, engine = engine.config, engine.with_config(prefix_reuse=False)  # every lane reads the prompt
        standard = engine.with_config(SpecExtendConfig.standard(tree=config.tree, retrieval=config.retrieval))
        self.engine = engine
        self._lanes: dict[str, Callable[..., Generation]] = {
            "autoregressive": engine.autoregressive,
            "standard": standard.generate,
            "specextend": engine.generate,
        }
        self._races = 0

    def run(
        self, prompt: EncodedPrompt, new_tokens: int, sampling: SamplingConfig = GREEDY, report: Report | None = None
    ) -> Race:
        """Race on `prompt`; an exception out of `report`, called before blocks of a prefill and after rounds, ends it.

        Every other race runs the lanes in the opposite order, so that none always has the cooler or the slower machine.
        The chunks are observed in a run of their own, which is not timed and takes SpecExtend's time once more.
        """
        report = report or (lambda progress: None)
        order = list(self._lanes)[:: -1 if self._races % 2 else 1]
        self._races += 1
        self._warm_up(prompt.ids, new_tokens, sampling, report)
        results = {}
        for method in order:
            on_round, on_block = _reporters(report, LABELS[method], new_tokens)
            results[method] = self._lanes[method](
                prompt.ids, new_tokens, sampling=sampling, on_round=on_round, on_block=on_block
            )
        on_round, on_block = _reporters(report, "Chunks the draft read", new_tokens)
        observer = SelectionObserver(self.engine.config.retrieval.chunk_size)
        seen = self.engine.generate(
            prompt.ids, new_tokens, sampling=sampling, on_round=on_round, on_block=on_block, observer=observer
        )
        models, config = self.engine.models, self.engine.config
        return Race(
            source=prompt.source,
            model=models.name,
            draft=str(models.draft_id),
            device=models.device.type,
            dtype=str(models.dtype).removeprefix("torch."),
            prompt_tokens=len(prompt.ids),
            original_tokens=prompt.original_tokens,
            prompt_end=self._decode(prompt.ids[-PROMPT_END:].tolist()).lstrip("\ufffd"),
            max_new_tokens=new_tokens,
            temperature=sampling.temperature,
            seed=sampling.seed,
            chunk_size=config.retrieval.chunk_size,
            lanes=[self._lane(method, results[method]) for method in self._lanes],
            selections=observer.selections if _same_rounds(seen, results["specextend"]) else [],
            differs_at=differs_at([results[method].token_ids for method in self._lanes]),
        )

    def _warm_up(self, ids: Tensor, new_tokens: int, sampling: SamplingConfig, report: Report) -> None:
        """Run the first rounds of every lane at the race's own lengths, which then find memory and graphs ready."""
        _, on_block = _reporters(report, "Warming up", new_tokens)

        def on_round(output: Output, round_: Round | None) -> None:
            report(Progress("Warming up", None, new_tokens))  # no count: it ends far before its last token
            if len(output.rounds) >= WARM_UP_ROUNDS:
                raise _WarmedUp

        for generate in self._lanes.values():
            with suppress(_WarmedUp):
                generate(ids, new_tokens, sampling=sampling, on_round=on_round, on_block=on_block)

    def _lane(self, method: str, result: Generation) -> Lane:
        return Lane(
            method=method,
            label=LABELS[method],
            token_ids=result.token_ids,
            steps=steps_of(result, self._decode),
            accepted_per_round=result.accepted_per_round,
            decode_tokens_per_s=result.decode_tokens_per_s,
            total_s=result.total_s,
            finish_reason=result.finish_reason,
        )

    def _decode(self, ids: list[int]) -> str:
        return self.engine.models.tokenizer.decode(ids, skip_special_tokens=True)


class _WarmedUp(Exception):
    """Ends a warm-up."""


def steps_of(result: Generation, decode: Callable[[list[int]], str]) -> list[Step]:
    """The rounds of a generation with the text of every token."""
    stream, ids = TextStream(decode), result.token_ids
    rounds = [(1, 0, result.ttft_s)]
    rounds += [(len(one.tokens), one.accepted, sum(one.seconds.values())) for one in result.rounds]
    steps, now, made = [], 0.0, 0
    for count, accepted, seconds in rounds:
        now += seconds
        ends = range(made + 1, made + count + 1)
        steps.append(Step(round(now, 6), [stream.push(ids[:end], last=end == len(ids)) for end in ends], accepted))
        made += count
    return steps


def differs_at(outputs: Sequence[Sequence[int]]) -> int | None:
    """First position at which `outputs` are not all the same, the end of a shorter one included; None if they are."""
    columns = enumerate(zip_longest(*outputs))
    return next((position for position, tokens in columns if len(set(tokens)) > 1), None)


class SelectionObserver(Observer):
    """Notes what the draft reads, refresh after refresh.

    Args:
        chunk_size: tokens per chunk.
    """

    def __init__(self, chunk_size: int):
        self._size = chunk_size
        self.selections: list[Selection] = []

    def refreshed(self, round: int, positions: Tensor, context: int) -> None:
        chunks = torch.unique(positions // self._size).tolist()
        self.selections.append(Selection(round, chunks, num_chunks(context, self._size)))


def _same_rounds(left: Generation, right: Generation) -> bool:
    """Whether two runs went alike: in half precision, captured and plain rounds may not."""
    return [one.tokens for one in left.rounds] == [one.tokens for one in right.rounds]


def _reporters(report: Report, label: str, new_tokens: int) -> tuple[OnRound, OnBlock]:
    """What a generation calls after its rounds, and before the blocks of its prefill."""
    return (
        lambda output, _: report(Progress(label, output.new_tokens, new_tokens)),
        lambda *_: report(Progress(label, None, new_tokens)),
    )

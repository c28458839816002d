"""A panel: one prompt answered by every arm, and once autoregressively for all of them.

The arms of a panel are measured one after the other in one process, so that each can be compared with autoregressive
decoding and with each other on the same prompt. A line of the journal is a whole panel.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from specextend.config import SamplingConfig
from specextend.data.prompts import Prompt, nominal_tokens
from specextend.errors import ConfigError
from specextend.evaluation.answers import distinct_share, loops
from specextend.evaluation.plan import require_positive, seed_of
from specextend.evaluation.records import SampleRecord, Timing, Worker, first_difference

if TYPE_CHECKING:
    from specextend.decoding.output import Generation

BASELINE = "AR"  # in the order of a panel


class PanelKey(NamedTuple):
    """Which prompt, at which temperature, and which repetition of it."""

    data: str
    bucket: str
    temperature: float
    sample: int
    run: int

    def label(self, runs: int | None = None) -> str:
        """For people, who count from 1: "pg19 4K temperature 0.7 sample 2 run 1/2"."""
        of_runs = f"/{runs}" if runs else ""
        return (
            f"{self.data} {self.bucket} temperature {self.temperature:g} sample {self.sample + 1} run "
            f"{self.run + 1}{of_runs}"
        )


@dataclass(frozen=True)
class PanelTask:
    """One panel to be measured.

    Args:
        turn: its place in the plan; the order of the arms is turned round from one to the next.
    """

    key: PanelKey
    prompt: Prompt
    seed: int
    turn: int

    @property
    def name(self) -> str:
        return self.key.label()

    @property
    def prompt_sha256(self) -> str:
        return hashlib.sha256(self.prompt.text.encode()).hexdigest()


@dataclass(frozen=True)
class PanelPlan:
    """What an evaluation of several arms measures.

    Args:
        data: by the name of each data set its prompts by nominal length.
        temperatures: every prompt is measured at each.
        sampling: what else is said of it, the seed as in `Plan`.
    """

    data: Mapping[str, Mapping[str, Sequence[Prompt]]]
    temperatures: tuple[float, ...] = (0.0,)
    runs_per_sample: int = 1
    max_new_tokens: int = 256
    sampling: SamplingConfig = SamplingConfig()

    def __post_init__(self) -> None:
        require_positive(runs_per_sample=self.runs_per_sample, max_gen_len=self.max_new_tokens)
        for temperature in self.temperatures:
            replace(self.sampling, temperature=temperature)  # ConfigError out of its range
            if self.temperatures.count(temperature) > 1:
                raise ConfigError(f"temperature {temperature:g} is there twice; give each once")

    def tasks(self) -> Iterator[PanelTask]:
        """Every panel, so that a run that is stopped has measured about as many of each length and temperature.

        One prompt of every length, data set and temperature, then the next of each. A round begins with the longest
        prompts, so that no cache grows twice, and what belongs to one length is measured in a row: dense attention is
        captured anew when it changes.
        """
        cells = [
            (data, bucket, temperature)
            for bucket in self._lengths()
            for data, buckets in self.data.items()
            if bucket in buckets
            for temperature in self.temperatures
        ]
        samples = max((len(prompts) for buckets in self.data.values() for prompts in buckets.values()), default=0)
        rounds = ((sample, run) for sample in range(samples) for run in range(self.runs_per_sample))
        for number, (sample, run) in enumerate(rounds):
            for place, (data, bucket, temperature) in enumerate(cells):
                prompts = self.data[data][bucket]
                if sample < len(prompts):
                    key = PanelKey(data, bucket, temperature, sample, run)
                    yield PanelTask(key, prompts[sample], seed_of(self.sampling.seed, sample, run), number + place)

    def label(self, task: PanelTask) -> str:
        return task.key.label(self.runs_per_sample)

    def _lengths(self) -> list[str]:
        """Of all data sets, the longest first."""
        labels = {bucket for buckets in self.data.values() for bucket in buckets}
        return sorted(labels, key=nominal_tokens, reverse=True)


def order_of(arms: Sequence[str], turn: int) -> list[str]:
    """Who is measured when: autoregressive decoding and the arms, the other way round every other time."""
    order = [BASELINE, *arms]
    return order[::-1] if turn % 2 else order


@dataclass(frozen=True)
class Answer:
    """One generation of a panel.

    Args:
        accepted, drafted: draft tokens per round, the bonus token excluded; of the baseline none.
        first_difference: index of the first new token that differs from the baseline's; None when all agree.
        gap: how far apart the target scores the two tokens there (`near_ties.py`); None when all agree.
        loops: whether it ends in a loop (`answers.loops`).
        distinct_4grams: share of its 4-grams that it holds for the first time.
        price: mean of what the rounds had to earn, in tokens per second; 0 where trees have fixed bounds.
        plain_share: share of the rounds that did not speculate.
        answered_right: None where nobody asked, or the model cannot answer.
    """

    timing: Timing
    accepted: list[int]
    drafted: list[int]
    first_difference: int | None
    loops: bool
    distinct_4grams: float
    gap: float | None = None
    price: float = 0.0
    plain_share: float = 0.0
    answered_right: bool | None = None

    @classmethod
    def of(
        cls, generation: Generation, baseline: Generation, *, gap: float | None = None, right: bool | None = None
    ) -> Answer:
        rounds = [] if generation is baseline else generation.rounds
        return cls(
            timing=Timing.of(generation),
            accepted=[one.accepted for one in rounds],
            drafted=[one.drafted for one in rounds],
            first_difference=first_difference(generation.token_ids, baseline.token_ids),
            loops=loops(generation.token_ids),
            distinct_4grams=distinct_share(generation.token_ids),
            gap=gap,
            price=generation.price,
            plain_share=generation.plain_share if rounds else 0.0,
            answered_right=right,
        )

    @property
    def equal_to_autoregressive(self) -> bool:
        return self.first_difference is None

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> Answer:
        return cls(**entry | {"timing": Timing.from_json(entry["timing"])})


@dataclass(frozen=True)
class Panel:
    """One prompt, answered autoregressively and by every arm, in one process.

    Args:
        data, bucket, temperature, sample, run: its key.
        source, prompt_sha256, prompt_tokens, cut, seed, commit, worker: as in `SampleRecord`.
        order: who was measured when.
        autoregressive: the baseline of every arm.
        arms: by name. `peak_bytes` of a timing counts what all engines hold.
        gpu: clocks and power behind its last generation; None in most, since they are asked for when lengths change.
    """

    data: str
    bucket: str
    temperature: float
    sample: int
    run: int
    seed: int
    source: str
    prompt_sha256: str
    prompt_tokens: int
    cut: bool
    order: list[str]
    autoregressive: Answer
    arms: dict[str, Answer]
    commit: dict[str, Any] | None
    worker: Worker | None = None
    gpu: dict[str, float] | None = None

    @property
    def key(self) -> PanelKey:
        return PanelKey(self.data, self.bucket, self.temperature, self.sample, self.run)

    @property
    def name(self) -> str:
        return self.key.label()

    @property
    def speeds(self) -> str:
        """For people: the baseline's tokens per second and the arms' decoding over it."""
        alone = self.autoregressive.timing.decode_tokens_per_s
        gains = (one.timing.decode_tokens_per_s / alone if alone else 0.0 for one in self.arms.values())
        return f"AR {alone:.1f} tok/s, arms {' '.join(f'{gain:.2f}x' for gain in gains)}"

    def record_of(self, arm: str) -> SampleRecord:
        """What an evaluation of this arm alone would have written."""
        answer = self.arms[arm]
        shared = (
            "bucket",
            "sample",
            "run",
            "seed",
            "source",
            "prompt_sha256",
            "prompt_tokens",
            "cut",
            "commit",
            "worker",
        )
        return SampleRecord(
            **{name: getattr(self, name) for name in shared},
            accepted=answer.accepted,
            drafted=answer.drafted,
            first_difference=answer.first_difference,
            method=answer.timing,
            autoregressive=self.autoregressive.timing,
            answered_right=answer.answered_right,
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> Panel:
        worker = entry.get("worker")
        return cls(
            **entry
            | {
                "autoregressive": Answer.from_json(entry["autoregressive"]),
                "arms": {name: Answer.from_json(one) for name, one in entry["arms"].items()},
                "worker": worker and Worker(**worker),
            }
        )

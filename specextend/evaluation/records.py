"""One record per sample and run: what was generated, how fast, and whether it equals autoregressive decoding."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from specextend.decoding.output import Generation, Round
from specextend.evaluation.environment import _cpu_model

OUTPUT_BUCKET = 1024  # tokens of the output per figure by position


@dataclass(frozen=True)
class Stretch:
    """The rounds that began within one `OUTPUT_BUCKET` of the output: the context grows while they run."""

    rounds: int = 0
    accepted: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def with_round(self, one: Round) -> Stretch:
        seconds = sum(one.seconds.values())
        return Stretch(
            self.rounds + 1, self.accepted + one.accepted, self.tokens + len(one.tokens), self.seconds + seconds
        )

    def __add__(self, other: Stretch) -> Stretch:
        return Stretch(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


def stretches_of(generation: Generation) -> list[Stretch]:
    """A generation's rounds by position in the output, bucket after bucket."""
    stretches: list[Stretch] = []
    written = 1  # the prefill's token
    for one in generation.rounds:
        while len(stretches) <= written // OUTPUT_BUCKET:
            stretches.append(Stretch())
        stretches[-1] = stretches[-1].with_round(one)
        written += len(one.tokens)
    return stretches


@dataclass(frozen=True)
class Timing:
    """What one generation cost: seconds by part, rates, memory, and the hash of its token ids.

    Args:
        token_s: percentiles of the seconds per token while decoding, as {"p50": ...}; a round's tokens share its time.
    """

    new_tokens: int
    finish_reason: str
    prefill_s: dict[str, float]
    stages_s: dict[str, float]
    ttft_s: float
    decode_s: float
    total_s: float
    tokens_per_s: float
    decode_tokens_per_s: float
    peak_bytes: int | None
    sha256: str
    by_output: list[Stretch] = field(default_factory=list)
    token_s: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, generation: Generation) -> Timing:
        return cls(
            new_tokens=generation.new_tokens,
            finish_reason=generation.finish_reason,
            prefill_s=dict(generation.prefill_seconds),
            stages_s=generation.stage_seconds(),
            ttft_s=generation.ttft_s,
            decode_s=generation.decode_s,
            total_s=generation.total_s,
            tokens_per_s=generation.tokens_per_s,
            decode_tokens_per_s=generation.decode_tokens_per_s,
            peak_bytes=generation.peak_bytes,
            sha256=hash_tokens(generation.token_ids),
            by_output=stretches_of(generation),
            token_s=_token_percentiles(generation),
        )

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> Timing:
        return cls(**entry | {"by_output": [Stretch(**stretch) for stretch in entry.get("by_output", [])]})


def _token_percentiles(generation: Generation) -> dict[str, float]:
    each = [sum(one.seconds.values()) / len(one.tokens) for one in generation.rounds for _ in one.tokens]
    return {f"p{rank}": float(np.percentile(each, rank)) for rank in (50, 90, 99)} if each else {}


@dataclass(frozen=True)
class Worker:
    """The process that measured a record, and what it had to itself.

    Args:
        id: number in the order of start within its run.
        host: name of its machine.
        workers_on_host: processes of its run on that machine, each with cores and a GPU of its own.
        threads: of PyTorch.
        processor: the GPU, else the CPU.
    """

    id: int
    host: str
    workers_on_host: int
    threads: int
    processor: str

    @classmethod
    def here(cls, number: int, workers_on_host: int, device: torch.device) -> Worker:
        """This process, which computes on `device`."""
        processor = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_model()
        return cls(number, platform.node(), workers_on_host, torch.get_num_threads(), processor)

    @property
    def conditions(self) -> tuple[int, int, str]:
        """What speeds must have in common to be compared."""
        return self.workers_on_host, self.threads, self.processor


@dataclass(frozen=True)
class SampleRecord:
    """One prompt, generated once by the method and once autoregressively in the same process.

    Args:
        bucket: nominal length of the prompt, as `"1K"`.
        sample, run: index of the prompt in its bucket, and of the repetition; `seed` belongs to the two.
        source: file and line of the prompt; `prompt_sha256` is the hash of its text.
        cut: the prompt was longer than the models hold and lost its middle; `prompt_tokens` is what was used.
        accepted, drafted: draft tokens per round, the bonus token excluded.
        first_difference: index of the first new token that differs from the autoregressive one; None when all agree.
        commit: `environment()["commit"]` of the process that measured.
        answered_right: whether the answer is the prompt's own; None where nobody asked, or the model cannot answer.
        worker: who measured it; None in records from before there was more than one.
    """

    bucket: str
    sample: int
    run: int
    seed: int
    source: str
    prompt_sha256: str
    prompt_tokens: int
    cut: bool
    accepted: list[int]
    drafted: list[int]
    first_difference: int | None
    method: Timing
    autoregressive: Timing
    commit: dict[str, Any] | None
    answered_right: bool | None = None
    worker: Worker | None = None

    @property
    def key(self) -> tuple[str, int, int]:
        return self.bucket, self.sample, self.run

    @property
    def name(self) -> str:
        """For people."""
        return label(self.key)

    @property
    def speeds(self) -> str:
        """For people."""
        return f"{self.method.tokens_per_s:.1f} tok/s (AR {self.autoregressive.tokens_per_s:.1f})"

    @property
    def equal_to_autoregressive(self) -> bool:
        return self.first_difference is None

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"equal_to_autoregressive": self.equal_to_autoregressive}

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> SampleRecord:
        fields = {name: value for name, value in entry.items() if name != "equal_to_autoregressive"}
        timings = {name: Timing.from_json(fields.pop(name)) for name in ("method", "autoregressive")}
        worker = fields.pop("worker", None)
        return cls(**fields, **timings, worker=worker and Worker(**worker))


def label(key: tuple[str, int, int], samples: int | None = None, runs: int | None = None) -> str:
    """A record's key for people, who count from 1: "4K sample 2/20 run 1/2"."""
    bucket, sample, run = key
    of_samples, of_runs = (f"/{count}" if count else "" for count in (samples, runs))
    return f"{bucket} sample {sample + 1}{of_samples} run {run + 1}{of_runs}"


def hash_tokens(token_ids: Sequence[int]) -> str:
    """sha256 of the token ids as little-endian int64."""
    return hashlib.sha256(np.asarray(token_ids, dtype="<i8").tobytes()).hexdigest()


def first_difference(left: Sequence[int], right: Sequence[int]) -> int | None:
    """First index at which two token sequences part; None when they are equal, an early end is a difference too."""
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return index
    return None if len(left) == len(right) else min(len(left), len(right))

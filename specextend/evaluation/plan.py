"""What an evaluation measures: prompts by length, how often, under which setting."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specextend.config import SamplingConfig
from specextend.data.prompts import Prompt, find_buckets, normal_label, read_prompts
from specextend.errors import ConfigError, InputError
from specextend.evaluation.environment import ROOT
from specextend.evaluation.fingerprint import fingerprint
from specextend.evaluation.records import label
from specextend.methods import name_of
from specextend.models.presets import public_id

if TYPE_CHECKING:
    from specextend.engine import SpecExtend
    from specextend.models.loading import LoadedModels

WARM_UP_NEW_TOKENS = 8
SEEDS = 2**63
DEFAULT_FOLDER = Path("results")


@dataclass(frozen=True)
class Task:
    """One prompt to be measured once; `key` is (bucket, sample, run)."""

    key: tuple[str, int, int]
    prompt: Prompt
    seed: int

    @property
    def name(self) -> str:
        """For people."""
        return label(self.key)

    @property
    def prompt_sha256(self) -> str:
        return hashlib.sha256(self.prompt.text.encode()).hexdigest()


@dataclass(frozen=True)
class Plan:
    """What one evaluation measures.

    Args:
        data: name of the data set.
        buckets: prompts by nominal length, shortest first.
        runs_per_sample: how often each prompt is measured.
        max_new_tokens: new tokens per generation at most.
        sampling: of method and baseline alike; run r of sample i uses seed + 1000 i + r, modulo 2^63.
        method: by its name (`methods.py`); None is whatever the engine's setting is.
    """

    data: str
    buckets: dict[str, list[Prompt]]
    runs_per_sample: int = 2
    max_new_tokens: int = 256
    sampling: SamplingConfig = SamplingConfig()
    method: str | None = None

    def __post_init__(self) -> None:
        require_positive(runs_per_sample=self.runs_per_sample, max_gen_len=self.max_new_tokens)

    def without_prompts(self) -> Plan:
        """How to measure, without what: all that a worker must know besides its task."""
        return replace(self, buckets={})

    def tasks(self) -> Iterator[Task]:
        for bucket, prompts in self.buckets.items():
            for sample, prompt in enumerate(prompts):
                for run in range(self.runs_per_sample):
                    yield Task((bucket, sample, run), prompt, seed_of(self.sampling.seed, sample, run))

    def label(self, task: Task) -> str:
        """`task` for people, and of how many it is."""
        return label(task.key, len(self.buckets[task.key[0]]), self.runs_per_sample)


def seed_of(seed: int, sample: int, run: int) -> int:
    return (seed + 1000 * sample + run) % SEEDS


def require_positive(**settings: int) -> None:
    """ConfigError for the first setting below 1."""
    for name, value in settings.items():
        if value < 1:
            raise ConfigError(f"{name} is {value}; it must be at least 1")


def read_buckets(data_dir: Path, samples_per_length: int, lengths: Sequence[str] = ()) -> dict[str, list[Prompt]]:
    """The first prompts of each length bucket of a data set, of the `lengths` asked for or of all."""
    require_positive(samples_per_length=samples_per_length)
    paths, lengths = find_buckets(data_dir), [normal_label(length) for length in lengths]
    unknown = [length for length in lengths if length not in paths]
    if unknown:
        raise InputError(f"{data_dir} has no length {', '.join(unknown)}; it has {', '.join(paths)}")
    return {
        bucket: read_prompts(path, limit=samples_per_length)
        for bucket, path in paths.items()
        if not lengths or bucket in lengths
    }


def setting_of(engine: SpecExtend, plan: Plan) -> dict[str, Any]:
    """All that decides the numbers besides hardware, versions and prompts; a journal holds records of one setting."""
    return {
        "data": plan.data,
        **setting_of_models(engine.models),
        "backend": getattr(engine, "backend", "eager"),
        "method": name_of(engine.config),
        "config": asdict(engine.config),
        "sampling": asdict(plan.sampling),
        "seeds": "(seed + 1000 * sample + run) modulo 2^63, the same for method and baseline",
        "max_gen_len": plan.max_new_tokens,
        "warm_up": {
            "generations": "one by the method and one autoregressively of each length's first prompt, not measured",
            "new_tokens": WARM_UP_NEW_TOKENS,
        },
        "order": "method and baseline take turns on each prompt; who is first alternates",
    }


def setting_of_models(models: LoadedModels) -> dict[str, Any]:
    return {
        "model": public_name(models.name),
        "target": public_name(models.target_id),
        "draft": public_name(models.draft_id or "none"),
        "weights": {  # of a sharded target no rank has all
            "target": fingerprint(models.target) if models.ranks == 1 else None,
            "draft": models.draft and fingerprint(models.draft),
        },
        "dtype": str(models.dtype).removeprefix("torch."),
        "device": models.device.type,
        **({"ranks": models.ranks} if models.ranks > 1 else {}),
    }


def default_output(setting: dict[str, Any], directory: Path = DEFAULT_FOLDER) -> Path:
    """`results/<data>_<model>_<draft>_<method>.json`, with the temperature in the name when it is not 0."""
    temperature = setting["sampling"]["temperature"]
    parts = [setting["data"], Path(setting["model"]).name, Path(setting["draft"]).name, setting["method"]]
    if temperature:
        parts.append(f"t{temperature:g}")
    return directory / f"{'_'.join(parts).replace(' ', '-')}.json"


def public_name(model: str) -> str:
    """A hub id as it is, "bundled/target" and its like, a path without what lies above checkout or model folder."""
    model = public_id(model)
    path = Path(model)
    if not path.is_absolute():
        return model
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name

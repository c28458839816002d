"""What the analyses share: a store that a killed run goes on from, their flags, and checks of what is asked for."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from specextend.cli import flags
from specextend.data.prompts import parse_length
from specextend.engine import SpecExtend
from specextend.errors import CapacityError, ConfigError, InputError
from specextend.evaluation.environment import environment
from specextend.evaluation.journal import write_json
from specextend.evaluation.plan import public_name


class Store:
    """Records of one setting in one JSON file, each known by its key, written through.

    Args:
        path: read if it is there; its setting, hardware and versions must then be this run's.
        setting: all that decides the figures besides what the keys say.
        fresh: start over.
    """

    def __init__(self, path: Path, setting: dict[str, Any], *, fresh: bool = False):
        self._path = path
        self._content = json.loads(json.dumps({"setting": setting, "environment": environment(), "records": []}))
        if path.exists() and not fresh:
            try:
                found = json.loads(path.read_text(encoding="utf-8"))
                same = _compared(found) == _compared(self._content)
                found["records"]
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise InputError(f"{path} is damaged ({error}); --fresh starts over") from error
            if not same:
                raise ConfigError(
                    f"{path} was measured under another setting or on another machine: --fresh starts over"
                )
            self._content = found

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self._content["records"])

    def measure(self, key: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The record of `key`, measured and written if it is not there yet."""
        for record in self:
            if key.items() <= record.items():
                return record
        record = key | measure()
        self._content["records"].append(record)
        write_json(self._path, self._content)
        return record


def _compared(content: dict[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in content["environment"].items() if name not in ("commit", "date")}
    return {"setting": content["setting"], "environment": kept}


def add_study_flags(parser: argparse.ArgumentParser, *, lengths: list[str], samples: int, output: str) -> None:
    """The models, the texts and the file of an analysis."""
    flags.add_model_flags(parser)
    parser.add_argument("--data_dir", type=Path, help="folder of <name>_<length>.jsonl files; else the built-in text")
    parser.add_argument("--lengths", nargs="+", default=lengths, help="of the context, in tokens")
    parser.add_argument("--samples", "-n", type=positive, default=samples, help="texts per length")
    parser.add_argument("--output_file", type=Path, default=Path(output))
    parser.add_argument("--fresh", action="store_true", help="start over instead of resuming")
    parser.set_defaults(use_specextend=True)


def positive(text: str) -> int:
    """A whole number from 1 on; argparse says so in a line where it is none."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1 on")
    return int(text)


def model_setting(engine: SpecExtend) -> dict[str, Any]:
    """Models, dtype and device, as the records of the evaluations name them."""
    models = engine.models
    return {
        "model": public_name(models.name),
        "target": public_name(models.target_id),
        "draft": public_name(models.draft_id),
        "dtype": str(models.dtype).removeprefix("torch."),
        "device": models.device.type,
    }


def source_name(data_dir: Path | None) -> str:
    return data_dir.resolve().name if data_dir else "builtin"


def require_positions(engine: SpecExtend, lengths: list[str], new_tokens: int = 0) -> None:
    """CapacityError where a length and what comes after it are more than the models hold."""
    for length in lengths:
        tokens = parse_length(length)
        if tokens + new_tokens > engine.limit:
            more = f" and {new_tokens} more" if new_tokens else ""
            raise CapacityError(
                f"--lengths {length} is {tokens} tokens{more}, but {engine.models.name} holds {engine.limit} "
                f"positions; ask for at most {engine.limit - new_tokens}"
            )

"""Measurements that are no generations: one JSON file per script, written through, so that a killed run goes on."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from specextend.engine import SpecExtend
from specextend.evaluation.environment import environment
from specextend.evaluation.journal import write_json
from specextend.evaluation.plan import public_name


class Records:
    """Records of one setting, each known by its key.

    Args:
        path: the JSON file, read if it is there; its setting, hardware and versions must then be this run's.
        setting: all that decides the figures besides what the keys say.
        fresh: start over.
    """

    def __init__(self, path: Path, setting: dict[str, Any], *, fresh: bool = False):
        self._path = path
        self._content = {"setting": setting, "environment": environment(), "records": []}
        if path.exists() and not fresh:
            found = json.loads(path.read_text(encoding="utf-8"))
            if _compared(found) != _compared(json.loads(json.dumps(self._content))):
                sys.exit(f"{path} was measured under another setting or on another machine: --fresh starts over")
            self._content = found

    def __iter__(self):
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


def _compared(content: dict[str, Any]) -> dict[str, Any]:
    changing = ("commit", "date")
    kept = {name: value for name, value in content["environment"].items() if name not in changing}
    return {"setting": content["setting"], "environment": kept}

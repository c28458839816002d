"""The record of a run: one JSON file, rewritten whenever something is known, so that a crash keeps the rest."""

import dataclasses
import json
import platform
from pathlib import Path

import torch
import transformers

from scripts.train.settings import IDENTITY, Settings, TrainingError


class Record:
    """Sections by name; a stage's section holds `finished` once its outputs are complete."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sections: dict = json.loads(path.read_text()) if path.exists() else {}

    def __getitem__(self, section: str) -> dict:
        return self.sections[section]

    def update(self, section: str, **values: object) -> None:
        self.sections.setdefault(section, {}).update(values)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.sections, indent=1) + "\n")
        partial.rename(self.path)

    def is_finished(self, stage: str) -> bool:
        return self.sections.get(stage, {}).get("finished", False)

    def begin(self, settings: Settings) -> None:
        """Note the settings; refuse to continue a run of other sizes or seed."""
        now = dataclasses.asdict(settings)
        before = self.sections.get("settings", now)
        changed = [f"{name} {before[name]} -> {now[name]}" for name in IDENTITY if before[name] != now[name]]
        if changed:
            raise TrainingError(f"{self.path} belongs to another run ({', '.join(changed)}); choose another --out")
        self.update("settings", **now)


def environment(device: torch.device, command: list[str]) -> dict:
    """Where and how a stage ran; stages of one run may use different machines."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "command": command,
    }


def _processor() -> str:
    """The CPU's name and the cores torch uses."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or 'cpu'}, {torch.get_num_threads()} threads"

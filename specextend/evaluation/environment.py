"""Hardware, versions and commit that a record was measured with."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

if TYPE_CHECKING:
    pass

ROOT = Path(__file__).resolve().parents[2]


def environment() -> dict[str, Any]:
    """Hardware, versions and commit of this process; nothing that names the machine or its user."""
    return {
        "hardware": {
            "cpu": _cpu_model(),
            "cores": os.cpu_count(),
            "ram_gib": _ram_gib(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "gpu_driver": _output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        },
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "commit": _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def gpu_state(device: torch.device) -> dict[str, float] | None:
    """Clocks in MHz and power in watts of a GPU at this moment; None where there is none that tells."""
    if device.type != "cuda":
        return None
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    chosen = (f"--id=GPU-{uuid}",) if uuid else ()
    line = _output_of(
        "nvidia-smi", *chosen, "--query-gpu=clocks.sm,clocks.mem,power.draw", "--format=csv,noheader,nounits"
    )
    try:
        return dict(zip(("sm_mhz", "memory_mhz", "power_w"), map(float, (line or "").split(",")), strict=True))
    except ValueError:  # a driver that does not know one of them
        return None


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _ram_gib() -> int | None:
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return None
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30)


def _commit() -> dict[str, Any] | None:
    """Commit of the checkout, and whether anything but its results differs from it; None outside a checkout."""
    commit = _output_of("git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD")
    if commit is None:
        return None
    changes = _output_of("git", "-C", str(ROOT), "status", "--porcelain", "--", ".", ":!results")
    return {"id": commit, "dirty": changes is not None}


def _output_of(*command: str) -> str | None:
    """First line a command prints, None where the command is missing, fails or prints nothing."""
    if shutil.which(command[0]) is None:
        return None
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = finished.stdout.strip().splitlines() if finished.returncode == 0 else []
    return lines[0] if lines else None

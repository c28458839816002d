"""The Triton kernels compile for Hopper, fit its shared memory and spill nothing; no GPU is needed for that."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
SHARED = 227 * 1024  # bytes a program may have on compute capability 9.0


def test_kernels_compile_for_hopper_without_spilling(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, ROOT / "tests/compile_kernels.py", "90"], env=environment, capture_output=True, text=True
    )
    assert not run.returncode, run.stderr[-2000:]
    kernels = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(kernels) >= 16
    too_large = [kernel for kernel in kernels if kernel["shared"] > SHARED or kernel["stack"]]
    assert not too_large

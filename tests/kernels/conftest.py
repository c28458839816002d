"""The kernels by themselves: Triton's interpreter also looks for sums that overflow, where there is no GPU."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import replace

import pytest


@pytest.fixture(autouse=True)
def overflow_is_seen(monkeypatch):
    if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
        interpreter = importlib.import_module("triton.runtime.interpreter")
        options = replace(interpreter.interpreter_builder.options, sanitize_overflow=True)
        monkeypatch.setattr(interpreter.interpreter_builder, "options", options)

"""Fused kernels beside their PyTorch references; importing this package needs no GPU and no Triton."""

from __future__ import annotations

import importlib.util


def has_triton() -> bool:
    """Whether Triton is installed: it comes with PyTorch's CUDA builds."""
    return importlib.util.find_spec("triton") is not None

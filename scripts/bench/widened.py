"""The bundled pair at the cost of large weights."""

from __future__ import annotations

from dataclasses import replace

import torch

from specextend.models.loading import LoadedModels
from specextend.models.widen import SHAPES, widen


@torch.inference_mode()
def widened(models: LoadedModels, shape: str, dtype: torch.dtype = torch.float16) -> LoadedModels:
    """`models` with the target in `shape` and the draft in Vicuna-68M's; they compute the same tokens."""
    options = {"dtype": dtype, "device": models.device}
    target = widen(models.target, SHAPES[shape], **options)
    draft = widen(models.draft, SHAPES["vicuna_68m"], seed=1, **options)
    name, vocab = f"bundled widened to {shape}", SHAPES[shape].vocab
    return replace(models, name=name, target=target, draft=draft, dtype=dtype, vocab_size=vocab)

"""EAGLE-1 and EAGLE-3 heads as drafts of `specextend`, with checkpoints of the published layouts."""

from eagle.models import load_models

__all__ = ["load_models"]

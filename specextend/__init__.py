"""SpecExtend: lossless speculative decoding that stays fast on long inputs (arXiv 2505.20776)."""

from specextend.config import RetrievalConfig, SamplingConfig, SpecExtendConfig, TreeConfig
from specextend.drop_in import custom_generate
from specextend.engine import SpecExtend
from specextend.generate import Generation, Round
from specextend.models import PRESETS

__all__ = [
    "PRESETS",
    "Generation",
    "RetrievalConfig",
    "Round",
    "SamplingConfig",
    "SpecExtend",
    "SpecExtendConfig",
    "TreeConfig",
    "custom_generate",
]

"""SpecExtend: lossless speculative decoding that stays fast on long inputs (arXiv 2505.20776)."""

from specextend.config import RetrievalConfig, SamplingConfig, SpecExtendConfig, TreeConfig
from specextend.decoding.output import Generation, Round
from specextend.engine import SpecExtend
from specextend.integrations.custom_generate import custom_generate
from specextend.models.presets import PRESETS

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

"""SpecExtend: lossless speculative decoding that stays fast on long inputs (arXiv 2505.20776)."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from specextend.config import RetrievalConfig, SamplingConfig, SpecExtendConfig, TreeConfig
    from specextend.decoding.output import Generation, Round
    from specextend.decoding.session import Session
    from specextend.engine import SpecExtend
    from specextend.integrations.custom_generate import custom_generate
    from specextend.modeling.prefixes import PrefixLimits
    from specextend.models.presets import PRESETS

__all__ = [
    "PRESETS",
    "Generation",
    "PrefixLimits",
    "RetrievalConfig",
    "Round",
    "SamplingConfig",
    "Session",
    "SpecExtend",
    "SpecExtendConfig",
    "TreeConfig",
    "custom_generate",
]
_HOMES = {
    "PRESETS": "models.presets",
    "Generation": "decoding.output",
    "PrefixLimits": "modeling.prefixes",
    "RetrievalConfig": "config",
    "Round": "decoding.output",
    "SamplingConfig": "config",
    "Session": "decoding.session",
    "SpecExtend": "engine",
    "SpecExtendConfig": "config",
    "TreeConfig": "config",
    "custom_generate": "integrations.custom_generate",
}


def __getattr__(name: str) -> object:
    """Import on first use: the command line answers, and can be interrupted, before PyTorch is loaded."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)

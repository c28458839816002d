"""How many positions a model can hold."""

from __future__ import annotations

from transformers import PreTrainedConfig


def position_limit(config: PreTrainedConfig) -> int:
    """Positions a model can hold.

    - `max_sequence_length` if the config has it: lmsys configs keep the length before scaling in
      `max_position_embeddings` (vicuna-7b-v1.5-16k: 4096 with linear 4; longchat-7b-16k: 2048 with linear 8).
    - A `rope_condense_ratio` without it: `max_position_embeddings` times the ratio.
    - Dynamic rope: `max_position_embeddings` times the factor; yarn: the original length times the factor, if that
      is more than `max_position_embeddings`.
    - Otherwise `max_position_embeddings`, which for linear and llama3 rope is the length after scaling.
    - A sliding window in use bounds it: our attention has no window, and up to its width the two are the same.
    """
    rope, limit = config.rope_parameters, config.max_position_embeddings
    if getattr(config, "max_sequence_length", None):
        limit = config.max_sequence_length
    elif getattr(config, "rope_condense_ratio", None):
        limit = limit * config.rope_condense_ratio
    elif rope["rope_type"] == "dynamic":
        limit = limit * rope["factor"]
    elif rope["rope_type"] == "yarn":
        limit = max(limit, rope["original_max_position_embeddings"] * rope["factor"])
    window = getattr(config, "sliding_window", None)
    windowed = "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"])
    return min(int(limit), window) if window and windowed else int(limit)

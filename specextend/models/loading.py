"""Models by name: the paper's pairs, the bundled pair, or any Llama-family checkpoint with any draft.

`load_models` returns target, draft and tokenizer ready to use, or raises one line that says what to do. Where the
checkpoints lie and how they are read is `checkpoints.py`'s business.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from specextend.config import SpecExtendConfig
from specextend.drafting.drafter import Drafter
from specextend.drafting.small_lm import ClassicDrafter
from specextend.errors import ConfigError, DeviceError, ModelError
from specextend.modeling.target import Target
from specextend.models.checkpoints import (
    check_memory,
    find_checkpoint,
    has_tokenizer,
    load_causal_lm,
    read_config,
    read_tokenizer,
    weight_bytes,
)
from specextend.models.generation_lock import GenerationLock

if TYPE_CHECKING:
    from specextend.models.tensor_parallel import Ranks
from specextend.models.presets import PRESETS, Preset, find_preset, public_id

DTYPES = {
    "fp32": torch.float32,
    "float32": torch.float32,
    "fp16": torch.float16,
    "float16": torch.float16,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp64": torch.float64,
    "float64": torch.float64,
}


@dataclass(frozen=True)
class LoadedModels:
    """A target and its draft on one device in one dtype, in eval mode, with the attention of `attention.py`.

    Args:
        eos_token_ids: every id that ends a text, from generation config, config and tokenizer.
        limit: positions the target can hold (`position_limit`); the draft's own limit does not bound a prompt.
        vocab_size: ids both models know; logits beyond it are padding and must never be proposed.
        drafter: makes the drafter of a setting out of `draft`.
        lock: held by each generation, whatever engine runs it.
        ranks: processes that share the target (`parallel.py`); make_target: makes it, as `Target` does for one.
    """

    name: str
    preset: Preset
    target: PreTrainedModel
    draft: nn.Module | None
    tokenizer: PreTrainedTokenizerBase
    eos_token_ids: frozenset[int]
    limit: int
    vocab_size: int
    device: torch.device
    dtype: torch.dtype
    target_id: str
    draft_id: str | None
    drafter: Callable[[nn.Module, SpecExtendConfig, int], Drafter] = ClassicDrafter
    lock: GenerationLock = field(default_factory=GenerationLock, repr=False, compare=False)
    ranks: int = 1
    make_target: Callable[..., Target] = Target


def load_models(
    name_or_path: str, *, draft: str | None = None, dtype: str = "auto", device: str = "auto", with_draft: bool = True,
    ranks: Ranks | None = None,
) -> LoadedModels:  # fmt: skip
    """Load a target with its draft.

    Args:
        name_or_path: preset, directory or hub id of the target.
        draft: directory or hub id of the draft; None: the preset's.
        dtype: "auto" (fp32 on a CPU, the target checkpoint's own on a GPU) or one of `DTYPES`, for both models.
        device: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1", "mps".
        with_draft: False loads the target alone, for autoregressive decoding and for EAGLE heads.
        ranks: the processes that share the target, of which each loads the whole draft; they know their devices.
    """
    preset = find_preset(name_or_path)
    chosen_device = ranks.device if ranks else choose_device(device)
    draft_id = _draft_id(preset, draft) if with_draft else None
    target_dir = find_checkpoint(preset.target)
    draft_dir = find_checkpoint(draft_id) if draft_id else None
    target_config = read_config(target_dir)
    draft_config = read_config(draft_dir) if draft_dir else None
    chosen_dtype = choose_dtype(dtype, target_config, chosen_device)

    tokenizer = load_tokenizer(name_or_path)
    vocab_size = target_config.vocab_size
    if draft_config:
        draft_tokenizer = read_tokenizer(draft_dir) if has_tokenizer(draft_dir) else None
        vocab_size = check_vocabularies(target_config, tokenizer, draft_config, draft_tokenizer)

    placement = {"dtype": chosen_dtype, "device": chosen_device}
    sizes = [weight_bytes(config, chosen_dtype) for config in (target_config, draft_config) if config]
    _check_room(preset.name, [sizes[0] // (ranks.count if ranks else 1), *sizes[1:]], **placement)
    if ranks:
        target = ranks.load(target_dir, target_config, chosen_dtype)
    else:
        target = load_causal_lm(target_dir, target_config, **placement)
    return LoadedModels(
        name=preset.name,
        preset=replace(preset, template=preset.template or _own_template(tokenizer)),
        target=target,
        draft=load_causal_lm(draft_dir, draft_config, **placement) if draft_config else None,
        tokenizer=tokenizer,
        eos_token_ids=eos_token_ids(target, tokenizer),
        limit=position_limit(target_config),
        vocab_size=vocab_size,
        device=chosen_device,
        dtype=chosen_dtype,
        target_id=public_id(preset.target),
        draft_id=public_id(draft_id) if draft_id else None,
        **({"ranks": ranks.count, "make_target": ranks.make_target} if ranks else {}),
    )


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """The target's tokenizer alone; its weights are neither needed nor downloaded."""
    return read_tokenizer(find_checkpoint(find_preset(name_or_path).target, weights=False))


def choose_device(device: str) -> torch.device:
    """The device asked for, checked to be there; "auto" is the first GPU, else the CPU."""
    if device == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    there = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        there.append("mps")
    wanted = "cuda:0" if device == "cuda" else device
    if wanted not in there:
        raise DeviceError(f"device {device!r} is not there; this machine has {', '.join(there)}")
    return torch.device(wanted)


def choose_dtype(dtype: str, config: PreTrainedConfig, device: torch.device) -> torch.dtype:
    """The dtype asked for; "auto" is fp32 on a CPU and the checkpoint's own elsewhere."""
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else config.dtype or torch.float32
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is unknown; choose one of auto, {', '.join(DTYPES)}")
    if DTYPES[dtype] == torch.float64 and device.type == "mps":
        raise DeviceError("device mps cannot compute in fp64; use --dtype fp32 or --device cpu")
    return DTYPES[dtype]


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


def check_vocabularies(
    target: PreTrainedConfig,
    target_tokenizer: PreTrainedTokenizerBase,
    draft: PreTrainedConfig,
    draft_tokenizer: PreTrainedTokenizerBase | None,
) -> int:
    """Ids both models know, after checking that each means the same token to both.

    Padding rows may differ, and so may the names of control tokens (a chat finetune renames them): a draft's guess of
    a control token that means something else is rejected like any wrong guess. Text tokens must be the same.
    """
    shared = min(target.vocab_size, draft.vocab_size)
    if draft_tokenizer is None and target.vocab_size != draft.vocab_size:
        raise ModelError(
            f"the vocabularies differ: target {target.vocab_size} tokens, draft {draft.vocab_size} and no tokenizer to "
            "compare; choose a draft with the target's vocabulary"
        )
    used = min(target.vocab_size, max(target_tokenizer.get_vocab().values()) + 1)
    if draft.vocab_size < used:
        raise ModelError(
            f"the draft's vocabulary ({draft.vocab_size}) is smaller than the target tokenizer's ({used}); "
            "choose a draft with the target's vocabulary"
        )
    if draft_tokenizer is not None:
        _check_same_tokens(target_tokenizer, draft_tokenizer, shared)
    return shared


def eos_token_ids(target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Every id that ends a text, wherever the checkpoint names it (an int, a list, or nothing)."""
    named = (target.generation_config.eos_token_id, target.config.eos_token_id, tokenizer.eos_token_id)
    lists = [[ids] if isinstance(ids, int) else ids or [] for ids in named]
    return frozenset(token for ids in lists for token in ids)


def _draft_id(preset: Preset, draft: str | None) -> str:
    if draft is None and preset.draft is None:
        raise ModelError(
            f"{preset.name} has no small draft model of its own; give one with its vocabulary by --draft_model"
            + (" (e.g. meta-llama/Llama-3.2-1B-Instruct)" if preset.name in PRESETS else "")
        )
    return draft or preset.draft


def _check_same_tokens(target: PreTrainedTokenizerBase, draft: PreTrainedTokenizerBase, size: int) -> None:
    control = {
        token_id
        for tokenizer in (target, draft)
        for token_id, token in tokenizer.added_tokens_decoder.items()
        if token.special
    }
    draft_tokens = {token_id: token for token, token_id in draft.get_vocab().items()}
    for token, token_id in sorted(target.get_vocab().items(), key=lambda item: item[1]):
        if token_id < size and token_id not in control and draft_tokens.get(token_id, token) != token:
            raise ModelError(
                f"the vocabularies differ: id {token_id} is {token!r} for the target and {draft_tokens[token_id]!r} "
                "for the draft; choose a draft with the target's vocabulary"
            )


def _check_room(name: str, sizes: list[int], dtype: torch.dtype, device: torch.device) -> None:
    """Room for all weights on the device and, as each model is read there first, for the largest on the host."""
    check_memory(name, sum(sizes), dtype, device)
    if device.type == "cuda":
        check_memory(name, max(sizes), dtype, torch.device("cpu"))


def _own_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    return "chat" if tokenizer.chat_template else None

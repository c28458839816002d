"""Models by name: the paper's pairs, the bundled pair, or any Llama-family checkpoint with any draft.

`load_models` returns target, draft and tokenizer ready to use, or raises one line that says what to do. Where the
checkpoints lie and how they are read is `checkpoints.py`'s business.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from specextend.config import SpecExtendConfig
from specextend.drafting.drafter import Drafter
from specextend.drafting.small_lm import ClassicDrafter
from specextend.errors import ModelError
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
from specextend.models.placement import choose_device, choose_dtype
from specextend.models.positions import position_limit
from specextend.models.presets import PRESETS, Preset, find_preset, find_target, public_id
from specextend.models.tensor_parallel import Ranks
from specextend.models.vocabularies import check_vocabularies


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
        dtype: "auto" (fp32 on a CPU, the target checkpoint's own on a GPU) or one of `placement.DTYPES`.
        device: "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:1".
        with_draft: False loads the target alone, for autoregressive decoding and for EAGLE heads.
        ranks: the processes that share the target, of which each loads the whole draft; they know their devices.
    """
    preset = find_preset(name_or_path)
    chosen_device = ranks.device if ranks else choose_device(device)
    draft_id = _draft_id(preset, draft) if with_draft else None
    target_dir, target_id = find_target(preset)
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
        preset=replace(
            preset,
            template=preset.template or _own_template(tokenizer),
            temperature=preset.temperature and (target.generation_config.temperature or preset.temperature),
        ),
        target=target,
        draft=load_causal_lm(draft_dir, draft_config, **placement) if draft_config else None,
        tokenizer=tokenizer,
        eos_token_ids=eos_token_ids(target, tokenizer) | set(tokenizer.convert_tokens_to_ids(list(preset.stops))),
        limit=position_limit(target_config),
        vocab_size=vocab_size,
        device=chosen_device,
        dtype=chosen_dtype,
        target_id=target_id,
        draft_id=public_id(draft_id) if draft_id else None,
        **({"ranks": ranks.count, "make_target": ranks.make_target} if ranks else {}),
    )


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """The target's tokenizer alone; its weights are neither needed nor downloaded."""
    return read_tokenizer(find_target(find_preset(name_or_path), weights=False)[0])


def eos_token_ids(target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Every id that ends a text, wherever the checkpoint names it (an int, a list, or nothing)."""
    named = (target.generation_config.eos_token_id, target.config.eos_token_id, tokenizer.eos_token_id)
    lists = [[ids] if isinstance(ids, int) else ids or [] for ids in named]
    return frozenset(token for ids in lists for token in ids)


def _draft_id(preset: Preset, draft: str | None) -> str:
    if draft is None and preset.draft is None:
        raise ModelError(
            f"{preset.name} has no small draft model of its own; name one with its vocabulary"
            + (", e.g. meta-llama/Llama-3.2-1B-Instruct" if "llama" in preset.name and preset.name in PRESETS else ""),
            setting="draft_model",
        )
    return draft or preset.draft


def _check_room(name: str, sizes: list[int], dtype: torch.dtype, device: torch.device) -> None:
    """Room for all weights on the device and, as each model is read there first, for the largest on the host."""
    check_memory(name, sum(sizes), dtype, device)
    if device.type == "cuda":
        check_memory(name, max(sizes), dtype, torch.device("cpu"))


def _own_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    return "chat" if tokenizer.chat_template else None

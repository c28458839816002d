"""What drafts for a model that is loaded already: a small causal LM or an EAGLE head, as an object or by name."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module

from torch import nn
from transformers import PreTrainedModel

from specextend.errors import ConfigError, ModelError
from specextend.integrations.twin import check_model, make_twin
from specextend.models.checkpoints import find_checkpoint, load_causal_lm, one_line, read_config
from specextend.models.loading import LoadedModels
from specextend.models.presets import PRESETS

Draft = nn.Module | str


def checked(draft: object) -> Draft:
    """The draft without PEFT's wrapper; ConfigError or ModelError for what cannot be one."""
    if isinstance(draft, nn.Module) and not isinstance(draft, PreTrainedModel) and hasattr(draft, "get_base_model"):
        if draft.active_peft_config.is_prompt_learning:
            raise ModelError("the draft has a prompt that PEFT learned; give a draft without, or with LoRA")
        draft = draft.get_base_model()
    if isinstance(draft, PreTrainedModel):
        check_model(draft, "the draft")
    elif not isinstance(draft, str) and not _is_head(draft):
        given = one_line(repr(draft), 40)
        raise ConfigError(
            f"draft_model is {given}; give a loaded causal LM or EAGLE head, a directory, a hub id or a preset's name"
        )
    return draft


def join(models: LoadedModels, draft: Draft) -> LoadedModels:
    """`models`, a target alone, with its draft; ModelError where they do not fit."""
    if isinstance(draft, str):
        directory = find_checkpoint(PRESETS[draft].draft or draft if draft in PRESETS else draft)
        if directory.is_dir() and _heads().holds_head(directory):
            return _heads().with_head(models, _heads().load_head(directory, models.target), draft)
        small = load_causal_lm(directory, read_config(directory), dtype=models.dtype, device=models.device)
    else:
        device = next(draft.parameters()).device
        if device != models.device:
            raise ModelError(f"the model is on {models.device}, the draft on {device}; put both on one device")
        if _is_head(draft):
            return _heads().with_head(models, draft, type(draft).__name__)
        small = make_twin(draft)
    if small.config.vocab_size < models.vocab_size:
        raise ModelError(
            f"the draft knows {small.config.vocab_size} tokens, the model {models.vocab_size}; choose a draft with the "
            "model's vocabulary"
        )
    return replace(models, draft=small, draft_id=draft if isinstance(draft, str) else draft.name_or_path)


def _is_head(draft: object) -> bool:
    return any(kind.__module__ == "eagle.heads" for kind in type(draft).__mro__)


def _heads():
    """`eagle.models`, by name: that package builds on this one, and is needed only where a head may be meant."""
    return import_module("eagle.models")

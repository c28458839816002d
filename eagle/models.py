"""A target with an EAGLE head as its draft, by name or from files."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from eagle.drafter import EagleDrafter
from eagle.heads import Head
from eagle.weights import KINDS, holds_head, load_head
from specextend.config import RetrievalConfig
from specextend.errors import ModelError
from specextend.models import loading, presets
from specextend.models.checkpoints import HUB_ID, find_checkpoint, local_directory

__all__ = ["Head", "holds_head", "load_head", "load_models", "retrieval_of", "with_head"]

RETRIEVAL = RetrievalConfig(top_k=64, every_n_steps=8)  # the paper's for EAGLE heads (Appendix D)

# (target preset, kind) -> the head's hub id or directory; the first of a target is its default
HEADS = {
    ("bundled", "eagle3"): str(presets.BUNDLED_DIR / "eagle3"),
    ("bundled", "eagle1"): str(presets.BUNDLED_DIR / "eagle1"),
    ("bundled_128k", "eagle3"): str(presets.BUNDLED_DIR / "eagle3"),
    ("bundled_128k", "eagle1"): str(presets.BUNDLED_DIR / "eagle1"),
    ("smollm2", "eagle3"): str(presets.HEADS_DIR / "smollm2" / "eagle3"),
    ("smollm2", "eagle1"): str(presets.HEADS_DIR / "smollm2" / "eagle1"),
    ("vicuna_7b", "eagle1"): "jycha-98/EAGLE-vicuna-7b-v1.5-16k",
    ("longchat_7b", "eagle1"): "jycha-98/EAGLE-longchat-7b-16k",
    ("llama31_8b", "eagle3"): "yuhuili/EAGLE3-LLaMA3.1-Instruct-8B",
    ("r1_distill_llama_8b", "eagle3"): "yuhuili/EAGLE3-DeepSeek-R1-Distill-LLaMA-8B",
}


def load_models(
    name_or_path: str,
    *,
    head: str | None = None,
    draft: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
) -> loading.LoadedModels:
    """Load a target with an EAGLE head.

    Args:
        name_or_path: as for `specextend.models.loading.load_models`.
        head: "eagle1", "eagle3" or None for the preset's, or for whatever `draft` holds.
        draft: directory or hub id of the head; None: the preset's.
    """
    draft_id = draft or _head_of(presets.find_preset(name_or_path).name, head)
    directory = find_checkpoint(draft_id)
    loaded = loading.load_models(name_or_path, dtype=dtype, device=device, with_draft=False)
    return with_head(loaded, load_head(directory, loaded.target, head), presets.public_id(draft_id))


def with_head(models: loading.LoadedModels, head: Head, name: str) -> loading.LoadedModels:
    """`models`, a target alone, with `head` as its draft; ModelError for a head of another target.

    Args:
        name: of the head, for people.
    """
    config = models.target.config
    wanted = config.hidden_size, config.vocab_size, models.dtype
    given = head.config.hidden_size, head.config.vocab_size, next(head.layers.parameters()).dtype
    for what, one, other in zip(("hidden size", "vocabulary", "dtype"), given, wanted, strict=True):
        if one != other:
            raise ModelError(f"the head is for a target of {what} {one}, this target's is {other}; give its own head")
    if max(head.entering or (0,)) > config.num_hidden_layers:
        raise ModelError(
            f"the head reads the target's layers {list(head.entering)}, but it has {config.num_hidden_layers}; give "
            "its own head"
        )
    return replace(
        models,
        preset=replace(models.preset, retrieval=retrieval_of(head)),
        draft=head,
        drafter=partial(EagleDrafter, target=models.target),
        draft_id=name,
    )


def retrieval_of(head: Head) -> RetrievalConfig:
    """The paper's, but no more tokens in the working cache than the head has seen in training."""
    seen = head.config.max_position_embeddings // RETRIEVAL.chunk_size
    return replace(RETRIEVAL, top_k=max(1, min(RETRIEVAL.top_k, seen)))


def _head_of(target: str, head: str | None) -> str:
    if head is not None and head not in KINDS:
        raise ModelError(f"head {head!r} is unknown; choose one of {', '.join(KINDS)}, or a directory", setting="head")
    known = {kind: where for (name, kind), where in HEADS.items() if name == target}
    if not known:
        raise ModelError(
            f"no EAGLE head of {target} is known; give one, a directory or a hub id", setting="draft_model"
        )
    if head and head not in known:
        raise ModelError(
            f"no {head} head of {target} is known, only {', '.join(known)}; give one, a directory or a hub id",
            setting="draft_model",
        )
    where = known[head or next(iter(known))]
    if HUB_ID.fullmatch(where) is None and local_directory(where) is None:
        raise ModelError(
            f"the heads of {target} are not in {where}; train them (docs/train_a_head.md) or give one",
            setting="draft_model",
        )
    return where

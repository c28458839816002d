"""Settings as frozen dataclasses, validated on construction; the defaults are the paper's (Appendix D).

`SpecExtendConfig.standard()` is the paper's baseline (dense attention, full draft cache) and
`SpecExtendConfig.specextend()` turns on all three parts; `methods.py` names these and the settings in between.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import torch

from specextend.errors import ConfigError

DraftCacheKind = Literal["full", "streaming", "retrieval"]
DRAFT_CACHES: tuple[str, ...] = ("full", "streaming", "retrieval")
DraftKind = Literal["model", "self", "hierarchy", "lookup", "none", "hugging_face"]
DRAFTS: tuple[str, ...] = ("model", "self", "hierarchy", "lookup", "none", "hugging_face")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


@dataclass(frozen=True)
class TreeConfig:
    """OPT-Tree draft trees ("Hybrid Tree Attention"; Appendix D).

    Args:
        nodes: draft tokens per tree, the root (a token already emitted) not counted.
        max_depth: longest path of draft tokens, hence draft forward passes per round at most.
        threshold: stop deepening when one more level adds less than this to the expected accepted length.
        min_probability: leave out nodes that are reached with less than this; 0 keeps the best `nodes` whatever they
            are. Ours, not the paper's: where every node costs time (a CPU), one that is hardly ever reached is a loss.
    """

    nodes: int = 50
    max_depth: int = 10
    threshold: float = 0.7
    min_probability: float = 0.0

    def __post_init__(self) -> None:
        _require(self.nodes >= 1, f"nodes is {self.nodes}; a draft tree needs at least 1")
        _require(self.max_depth >= 1, f"max_depth is {self.max_depth}; a draft tree needs at least 1 level")
        _require(self.threshold >= 0, f"threshold is {self.threshold}; it must be 0 (always deepen) or more")
        probable = 0 <= self.min_probability < 1
        _require(probable, f"min_probability is {self.min_probability}; it must lie in 0 (keep all) .. 1, 1 excluded")


@dataclass(frozen=True)
class RetrievalConfig:
    """Which chunks of the input the draft keeps ("Cross-model Retrieval"; Appendix D: small-LM drafts).

    Args:
        chunk_size: tokens per chunk.
        top_k: chunks in the working cache, the newest chunk and sinks included.
        every_n_steps: rounds between refreshes of the working cache.
        sink: first chunks always kept. StreamingLLM needs them; retrieval has no use for them by default.
        recent: newest chunks always kept by retrieval, at least 1: without it the root token may be missing.
    """

    chunk_size: int = 32
    top_k: int = 32
    every_n_steps: int = 4
    sink: int = 0
    recent: int = 1

    def __post_init__(self) -> None:
        _require(self.chunk_size >= 1, f"retrieval_chunk_size is {self.chunk_size}; it must be at least 1")
        _require(self.every_n_steps >= 1, f"retrieve_every_n_steps is {self.every_n_steps}; it must be at least 1")
        _require(self.sink >= 0, f"retrieval sink is {self.sink}; it must be 0 or more chunks")
        _require(self.recent >= 1, f"retrieval recent is {self.recent}; the newest chunk must be kept")
        _require(
            self.top_k >= self.sink + self.recent,
            f"retrieve_top_k is {self.top_k}; it must hold sink + recent = {self.sink + self.recent} chunks",
        )


@dataclass(frozen=True)
class SamplingConfig:
    """How the target chooses a token. Temperature 0 is greedy.

    The noise of output position n depends on `seed` and n alone, so speculative and autoregressive decoding with one
    seed draw the same tokens.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        finite = 0 <= self.temperature < float("inf")
        _require(finite, f"temperature is {self.temperature}; it must be 0 (greedy) or more, and finite")
        _require(0 < self.top_p <= 1, f"top_p is {self.top_p}; it must lie in (0, 1]")
        _require(self.top_k >= 0, f"top_k is {self.top_k}; it must be 0 (off) or more")
        _require(0 <= self.seed < 2**63, f"seed is {self.seed}; it must lie in 0 .. 2^63 - 1")


@dataclass(frozen=True)
class RoundSlots:
    """Cache slots that a round may need.

    Args:
        verify: nodes the target verifies at once, the root included.
        path: most tokens a round can emit, the bonus token included.
        draft: scratch slots behind the context while a tree grows.
        working: tokens the working cache must hold; None for a full cache.
    """

    verify: int
    path: int
    draft: int
    working: int | None


@dataclass(frozen=True)
class SpecExtendConfig:
    """The three parts of SpecExtend, each with its own switch.

    Args:
        flash_prefill: FlashAttention prefill of target and draft, in blocks, in memory linear in the prompt.
        hybrid_tree_attention: verification as prefix part + tree part merged by log-sum-exp; off: dense attention.
        draft_cache: what the draft attends to: everything, sink + recent chunks, or retrieved chunks.
        prefill_block: tokens per prefill block with flash_prefill; bounds the activations held at once. 0 leaves it to
            the device.
        draft_window: sliding window of the draft's flash prefill in tokens; 0 is full causal attention.
        drafting: who proposes: the loaded draft "model"; "self", the target over a part of its own cache; "hierarchy",
            the model for the target's self and that for the target; "lookup", n-grams of the context; "none" for
            autoregressive decoding, "hugging_face" for transformers' own. All but "model" draft chains of
            `tree.max_depth` tokens at most.
    """

    flash_prefill: bool = False
    hybrid_tree_attention: bool = False
    draft_cache: DraftCacheKind = "full"
    prefill_block: int = 0
    draft_window: int = 512
    drafting: DraftKind = "model"
    tree: TreeConfig = field(default_factory=TreeConfig)
    retrieval: RetrievalConfig = field(default_factory=RetrievalConfig)

    def __post_init__(self) -> None:
        _require(
            self.draft_cache in DRAFT_CACHES,
            f"draft_cache is {self.draft_cache!r}; choose one of {', '.join(DRAFT_CACHES)}",
        )
        _require(self.drafting in DRAFTS, f"drafting is {self.drafting!r}; choose one of {', '.join(DRAFTS)}")
        is_part = self.drafting not in ("self", "hierarchy") or self.draft_cache != "full"
        _require(
            is_part,
            f"drafting is {self.drafting!r} with a full cache, the target itself; choose streaming or retrieval",
        )
        _require(self.prefill_block >= 0, f"prefill_block is {self.prefill_block}; it must be 0 (auto) or more tokens")
        _require(self.draft_window >= 0, f"draft_window is {self.draft_window}; it must be 0 (off) or more tokens")

    @property
    def slots(self) -> RoundSlots:
        """Cache slots that a round under this setting may need."""
        tree, retrieval = self.tree, self.retrieval
        if self.drafting in ("none", "hugging_face"):
            return RoundSlots(1, 1, 0, None)
        path = tree.max_depth + 1
        working = retrieval.top_k * retrieval.chunk_size + (retrieval.every_n_steps + 1) * path
        verify = tree.nodes + 1 if self.drafting == "model" else path
        return RoundSlots(verify, path, tree.nodes * tree.max_depth, None if self.draft_cache == "full" else working)

    @classmethod
    def standard(cls, **settings) -> SpecExtendConfig:
        """Standard tree speculative decoding, the paper's baseline."""
        return cls(**settings)

    @classmethod
    def specextend(cls, **settings) -> SpecExtendConfig:
        """SpecExtend with all of its parts."""
        return replace(cls(flash_prefill=True, hybrid_tree_attention=True, draft_cache="retrieval"), **settings)


def override(config: SpecExtendConfig, settings: Mapping[str, Any]) -> SpecExtendConfig:
    """`config` with some fields changed: its own, and by the same plain names those of its tree and its retrieval.

    Args:
        settings: as {"draft_cache": "full", "nodes": 20, "top_k": 16}; ConfigError for a name nobody has.
    """
    names = {part: [one.name for one in fields(kind)] for part, kind in _PARTS.items()}
    unknown = [name for name in settings if not any(name in known for known in names.values())]
    if unknown:
        known = ", ".join(name for part in names.values() for name in part)
        raise ConfigError(f"setting {unknown[0]!r} is unknown; there are {known}")

    def given(part: str) -> dict[str, Any]:
        return {name: value for name, value in settings.items() if name in names[part]}

    config = replace(config, **given(""))
    return replace(config, **{part: replace(getattr(config, part), **given(part)) for part in ("tree", "retrieval")})


_PARTS = {"": SpecExtendConfig, "tree": TreeConfig, "retrieval": RetrievalConfig}


def prefill_block(config: SpecExtendConfig, device: torch.device) -> int | None:
    """Tokens per prefill block; None runs the whole prompt at once."""
    if not config.flash_prefill:
        return None
    return config.prefill_block or (8192 if device.type == "cuda" else 1024)

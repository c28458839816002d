"""Settings as frozen dataclasses, validated on construction; the defaults are the paper's (Appendix D).

`SpecExtendConfig.standard()` is the paper's baseline (dense attention, full draft cache) and
`SpecExtendConfig.specextend()` turns on all three parts; `methods.py` names these and the settings in between.
Every number has bounds: beyond them nothing could be held or would ever end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from numbers import Integral, Real
from typing import Any, Literal

import torch

from specextend.errors import ConfigError

DraftCacheKind = Literal["full", "streaming", "retrieval"]
DRAFT_CACHES: tuple[str, ...] = ("full", "streaming", "retrieval")
Drafting = Literal["model", "self", "hierarchy", "lookup", "none", "hugging_face"]
TreeRule = Literal["fixed", "price"]
TREE_RULES: tuple[str, ...] = ("fixed", "price")
DRAFTINGS: tuple[str, ...] = ("model", "self", "hierarchy", "lookup", "none", "hugging_face")
WITHOUT_DRAFT_CACHE = ("lookup", "none", "hugging_face")
MAX_NODES, MAX_DEPTH = 1024, 128
CALIBRATION_CELLS = 12  # of a draft's probabilities, see `policy/calibration.py`
MAX_TOKENS = 1 << 20  # of anything that is counted in tokens, chunks or rounds: more than any model holds


@dataclass(frozen=True)
class TreeConfig:
    """OPT-Tree draft trees ("Hybrid Tree Attention"; Appendix D).

    Args:
        rule: "fixed", the same bounds in every round, as the paper has it; "price", each round drafts and verifies
            what earns its time (`policy/`): of the others it obeys `nodes` and `max_depth` alone.
        nodes: draft tokens per tree, the root (a token already emitted) not counted.
        max_depth: longest path of draft tokens, hence draft forward passes per round at most.
        threshold: stop deepening when one more level adds less than this to the expected accepted length.
        min_probability: leave out nodes that are reached with less than this; 0 keeps the best `nodes` whatever they
            are. Ours, not the paper's: where every node costs time (a CPU), one that is hardly ever reached is a loss.
        lookup_branch: priced trees have one more branch: what followed the newest tokens where they stood before.
    """

    nodes: int = 50
    max_depth: int = 10
    threshold: float = 0.7
    min_probability: float = 0.0
    lookup_branch: bool = False
    rule: TreeRule = "fixed"

    @classmethod
    def priced(cls) -> TreeConfig:
        """Trees that earn their time."""
        return cls(nodes=63, max_depth=12, threshold=0.0, lookup_branch=True, rule="price")

    def given(self, bounds: Mapping[str, Any]) -> TreeConfig:
        """With some fields changed; who gives a bound to priced trees, and no rule, means a tree of fixed bounds."""
        is_fixed = self.rule == "price" and "rule" not in bounds and bool(bounds.keys() - {"lookup_branch"})
        return replace(TreeConfig() if is_fixed else self, **bounds)

    def __post_init__(self) -> None:
        _require(self.rule in TREE_RULES, "tree.rule", self.rule, f"choose one of {', '.join(TREE_RULES)}")
        _check_integer("tree.nodes", self.nodes, 1, MAX_NODES, "draft tokens")
        _check_integer("tree.max_depth", self.max_depth, 1, MAX_DEPTH, "levels")
        _check_number("tree.threshold", self.threshold)
        _require(self.threshold >= 0, "tree.threshold", self.threshold, "it must be 0 (always deepen) or more")
        _check_number("tree.min_probability", self.min_probability)
        probable = 0 <= self.min_probability < 1
        _require(probable, "tree.min_probability", self.min_probability, "it must lie in 0 (keep all) .. 1, 1 excluded")
        for name in ("threshold", "min_probability") if self.rule == "price" else ():
            value = getattr(self, name)
            _require(value == 0, f"tree.{name}", value, "priced trees have no such bound: leave it out")
        fixed = self.lookup_branch and self.rule == "fixed"
        _require(
            not fixed, "tree.lookup_branch", True, "it has a place in priced trees alone: tree=price, or leave it out"
        )


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
        _check_integer("retrieval.chunk_size", self.chunk_size, 1, MAX_TOKENS, "tokens")
        _check_integer("retrieval.top_k", self.top_k, 1, MAX_TOKENS, "chunks")
        _check_integer("retrieval.every_n_steps", self.every_n_steps, 1, MAX_TOKENS, "rounds")
        _check_integer("retrieval.sink", self.sink, 0, MAX_TOKENS, "chunks")
        _check_integer("retrieval.recent", self.recent, 1, MAX_TOKENS, "chunks")
        kept = self.sink + self.recent
        _require(self.top_k >= kept, "retrieval.top_k", self.top_k, f"it must hold sink + recent = {kept} chunks")
        _require(
            self.top_k * self.chunk_size <= MAX_TOKENS,
            "retrieval.top_k",
            self.top_k,
            f"in chunks of {self.chunk_size} tokens it may be at most {MAX_TOKENS // self.chunk_size}",
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
        _check_number("sampling.temperature", self.temperature)
        finite = 0 <= self.temperature < float("inf")
        _require(finite, "sampling.temperature", self.temperature, "it must be 0 (greedy) or more, and finite")
        _check_number("sampling.top_p", self.top_p)
        _require(0 < self.top_p <= 1, "sampling.top_p", self.top_p, "it must lie in (0, 1]")
        _check_integer("sampling.top_k", self.top_k, 0, 2**31 - 1, "tokens to choose from, 0 is off")
        _check_integer("sampling.seed", self.seed, 0, 2**63 - 1)


@dataclass(frozen=True)
class RoundSlots:
    """How many tokens one round can need in each cache.

    Args:
        verify: nodes the target verifies at once, the root included.
        path: most tokens a round can emit: a whole path and the bonus token.
        draft: scratch slots of the draft, for the nodes it expands.
        working: tokens the draft's working cache must hold: what is kept, and what comes until the next refresh;
            None where the draft keeps its full cache or has none.
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
    drafting: Drafting = "model"
    tree: TreeConfig = field(default_factory=TreeConfig)
    retrieval: RetrievalConfig = field(default_factory=RetrievalConfig)

    def __post_init__(self) -> None:
        _require(
            self.draft_cache in DRAFT_CACHES,
            "draft_cache",
            self.draft_cache,
            f"choose one of {', '.join(DRAFT_CACHES)}",
        )
        _require(self.drafting in DRAFTINGS, "drafting", self.drafting, f"choose one of {', '.join(DRAFTINGS)}")
        _check_integer("prefill_block", self.prefill_block, 0, MAX_TOKENS, "tokens, 0 leaves it to the device")
        _check_integer("draft_window", self.draft_window, 0, MAX_TOKENS, "tokens, 0 is off")
        if self.drafting in ("self", "hierarchy"):
            _require(
                self.draft_cache != "full",
                "draft_cache",
                self.draft_cache,
                f"with drafting {self.drafting!r} that is the target itself: choose streaming or retrieval",
            )
        if self.drafting in WITHOUT_DRAFT_CACHE:
            _require(
                self.draft_cache == "full",
                "draft_cache",
                self.draft_cache,
                f"drafting {self.drafting!r} has no draft cache: leave it out",
            )

    @classmethod
    def standard(cls, **settings) -> SpecExtendConfig:
        """Standard tree speculative decoding, the paper's baseline."""
        return cls(**settings)

    @classmethod
    def specextend(cls, **settings) -> SpecExtendConfig:
        """SpecExtend with all of its parts."""
        return replace(cls(flash_prefill=True, hybrid_tree_attention=True, draft_cache="retrieval"), **settings)

    @property
    def slots(self) -> RoundSlots:
        """What one round can need; the one place that says so."""
        nodes, depth = self.tree.nodes, self.tree.max_depth
        path = 1 if self.drafting in ("none", "hugging_face") else depth + 1
        verify = nodes + 1 if self.drafting == "model" else path  # all others draft chains
        draft = {"model": nodes * depth, "hierarchy": nodes * depth, "self": depth}.get(self.drafting, 0)
        working = None
        if self.draft_cache != "full":
            # between two refreshes it grows by at most a path per round
            kept = self.retrieval.top_k * self.retrieval.chunk_size
            working = kept + (self.retrieval.every_n_steps + 1) * path
        return RoundSlots(verify=verify, path=path, draft=draft, working=working)


_PARTS = {"tree": TreeConfig, "retrieval": RetrievalConfig}


def override(config: SpecExtendConfig, settings: Mapping[str, Any]) -> SpecExtendConfig:
    """`config` with some fields changed.

    Args:
        settings: as {"draft_cache": "full", "tree": {"nodes": 20}, "retrieval": {"top_k": 16}}; tree and retrieval
            are mappings of what changes, or the dataclasses themselves; a tree with a bound given and no rule is one
            of fixed bounds, the paper's where none is given. ConfigError for a name nobody has.
    """
    changed = dict(settings)
    _check_names(changed, SpecExtendConfig, "setting")
    for part, kind in _PARTS.items():
        given = changed.setdefault(part, getattr(config, part))
        if isinstance(given, Mapping):
            _check_names(given, kind, f"{part} setting")
            base = getattr(config, part)
            changed[part] = base.given(given) if isinstance(base, TreeConfig) else replace(base, **given)
        elif not isinstance(given, kind):
            first = fields(kind)[0].name
            raise ConfigError(
                f'{part} is {given!r}; give a mapping like {part}={{"{first}": 20}} or a {kind.__name__}', setting=part
            )
    return replace(config, **changed)


def prefill_block(config: SpecExtendConfig, device: torch.device) -> int | None:
    """Tokens per prefill block; None runs the whole prompt at once."""
    if not config.flash_prefill:
        return None
    return config.prefill_block or (8192 if device.type == "cuda" else 1024)


def _check_names(given: Mapping[str, Any], kind: type, what: str) -> None:
    """ConfigError for the first name that `kind` has no field for; a nested one is shown as it must be written."""
    known = [one.name for one in fields(kind)]
    for name, value in given.items():
        if name in known:
            continue
        for part, nested in _PARTS.items():
            if kind is SpecExtendConfig and name in [one.name for one in fields(nested)]:
                raise ConfigError(f'{name} is a setting of the {part}; write {part}={{"{name}": {value!r}}}')
        raise ConfigError(f"{what} {name!r} is unknown; there are {', '.join(known)}")


def _check_integer(setting: str, value: Any, low: int, high: int, unit: str = "") -> None:
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    allowed = f"give a whole number from {low} to {high} {unit}".rstrip()
    _require(whole and low <= value <= high, setting, value, allowed)


def _check_number(setting: str, value: Any) -> None:
    _require(isinstance(value, Real) and not isinstance(value, bool), setting, value, "it must be a number")


def _require(condition: bool, setting: str, value: Any, allowed: str) -> None:
    """ConfigError unless `condition`; `setting` as "tree.nodes" names the field."""
    if not condition:
        part, _, name = setting.rpartition(".")
        shown = f"retrieval {name}" if part == "retrieval" else name
        raise ConfigError(f"{shown} is {value!r}; {allowed}", setting=setting)


TREES = {"paper": TreeConfig(), "price": TreeConfig.priced()}  # where a tree's settings begin, by name

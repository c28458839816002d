"""The methods that are compared, by name: each one setting of the same objects, in the same loop.

A method is its switches (`SpecExtendConfig`); the tree, the retrieval and the models are the run's, except where a
method drafts chains of its own length or keeps chunks of its own size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from specextend.config import RetrievalConfig, SpecExtendConfig, TreeConfig
from specextend.errors import ConfigError

SWITCHES = ("flash_prefill", "hybrid_tree_attention", "draft_cache", "drafting")
FAST = {"flash_prefill": True, "hybrid_tree_attention": True}
LINEAR = TreeConfig(nodes=6, max_depth=6)  # TriForce's six drafts per verification
LOOKUP = TreeConfig(nodes=10, max_depth=10)  # prompt lookup's ten


@dataclass(frozen=True)
class Method:
    """A named setting.

    Args:
        summary: one line for `--list_methods`.
        switches: fields of `SpecExtendConfig` in which it differs from standard decoding.
        chain: its draft length, for methods that draft chains; None takes the run's tree.
        chunk_size: its own chunks, as many as fill the run's working cache; None takes the run's.
        looks_up: takes the lookup branch of the run's tree, which is no part of what others are known for; whoever
            asks for it by name has it with any method.
        label: its name in figures.
    """

    summary: str
    switches: Mapping[str, Any] = field(default_factory=dict)
    chain: TreeConfig | None = None
    chunk_size: int | None = None
    looks_up: bool = False
    label: str = ""

    @property
    def drafts_with_model(self) -> bool:
        """Whether it needs the small model or EAGLE head that is loaded as draft."""
        return self.switches.get("drafting", "model") in ("model", "hierarchy")

    def config(self, tree: TreeConfig, retrieval: RetrievalConfig) -> SpecExtendConfig:
        """Its setting in a run with this tree and this retrieval."""
        if self.chunk_size is not None:
            retrieval = _rechunked(retrieval, self.chunk_size)
        return SpecExtendConfig(**self.switches, tree=self.tree(tree), retrieval=retrieval)

    def tree(self, tree: TreeConfig) -> TreeConfig:
        """What it makes of the run's tree."""
        return self.chain or (tree if self.looks_up else replace(tree, lookup_branch=False))


def _rechunked(retrieval: RetrievalConfig, size: int) -> RetrievalConfig:
    """The same tokens in chunks of `size`: kept in all, at the beginning and newest."""
    chunks = {name: -(-getattr(retrieval, name) * retrieval.chunk_size // size) for name in ("top_k", "sink", "recent")}
    return replace(retrieval, chunk_size=size, **chunks)


METHODS = {
    "autoregressive": Method(
        "the target alone: our own loop with flash decoding", FAST | {"drafting": "none"}, label="autoregressive"
    ),
    "autoregressive_hf": Method(
        "the target alone: Hugging Face's `generate` with eager attention",
        {"drafting": "hugging_face"},
        label="autoregressive, Hugging Face",
    ),
    "prompt_lookup": Method(
        "drafts copied from where the last n-gram stood", FAST | {"drafting": "lookup"}, LOOKUP, label="prompt lookup"
    ),
    "standard": Method("tree speculative decoding: dense attention, full draft cache", label="standard"),
    "fa": Method("standard + FlashAttention prefill", {"flash_prefill": True}, label="+ FlashAttention"),
    "hta": Method("standard + Hybrid Tree Attention", {"hybrid_tree_attention": True}, label="+ Hybrid Tree Attention"),
    "streaming": Method(
        "standard + StreamingLLM draft cache (sink + window)", {"draft_cache": "streaming"}, label="+ StreamingLLM"
    ),
    "cmr": Method(
        "standard + Cross-model Retrieval draft cache", {"draft_cache": "retrieval"}, label="+ Cross-model Retrieval"
    ),
    "fa_hta": Method("standard + FlashAttention prefill + Hybrid Tree Attention", FAST, label="+ FA + HTA"),
    "fa_hta_streaming": Method(
        "SpecExtend with a StreamingLLM draft cache of the same size",
        FAST | {"draft_cache": "streaming"},
        label="+ FA + HTA + StreamingLLM",
    ),
    "specextend": Method(
        "all three parts of SpecExtend", FAST | {"draft_cache": "retrieval"}, looks_up=True, label="SpecExtend"
    ),
    "magicdec": Method(
        "self-speculation: the target over sink + window of its own cache",
        FAST | {"draft_cache": "streaming", "drafting": "self"},
        LINEAR,
        label="MagicDec",
    ),
    "self_retrieval": Method(
        "self-speculation: the target over retrieved chunks of its own cache",
        FAST | {"draft_cache": "retrieval", "drafting": "self"},
        LINEAR,
        chunk_size=8,
        label="self-retrieval",
    ),
    "triforce": Method(
        "the draft model proposes for self_retrieval's draft, and that for the target",
        FAST | {"draft_cache": "retrieval", "drafting": "hierarchy"},
        LINEAR,
        chunk_size=8,
        label="TriForce",
    ),
}


def find_method(name: str) -> Method:
    if name not in METHODS:
        raise ConfigError(f"method {name!r} is unknown; choose one of {', '.join(METHODS)}")
    return METHODS[name]


def drafting_of(recorded: Mapping[str, Any]) -> str:
    """Who proposed, by the setting of a record; older records call it "draft"."""
    return recorded.get("drafting", recorded.get("draft", "model"))


def name_of(config: SpecExtendConfig) -> str:
    """The method a setting belongs to, whatever its tree and chunks; else its parts joined by a dash."""
    plain = SpecExtendConfig()
    for name, method in METHODS.items():
        if all(getattr(config, switch) == method.switches.get(switch, getattr(plain, switch)) for switch in SWITCHES):
            return name
    parts = {
        "fa": config.flash_prefill,
        "hta": config.hybrid_tree_attention,
        config.draft_cache: config.draft_cache != "full",
        config.drafting: config.drafting != "model",
    }
    return "-".join(part for part, is_on in parts.items() if is_on)

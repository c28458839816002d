"""Needles and analyses as tables of numbers, for those who print them and those who draw them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

METHODS = {  # in the order of specextend.methods, which a script without PyTorch cannot import
    "autoregressive": "autoregressive",
    "autoregressive_hf": "autoregressive, Hugging Face",
    "prompt_lookup": "prompt lookup",
    "standard": "standard",
    "fa": "+ FlashAttention",
    "hta": "+ Hybrid Tree Attention",
    "streaming": "+ StreamingLLM",
    "cmr": "+ Cross-model Retrieval",
    "fa_hta": "+ FA + HTA",
    "fa_hta_streaming": "+ FA + HTA + StreamingLLM",
    "specextend": "SpecExtend",
    "magicdec": "MagicDec",
    "self_retrieval": "self-retrieval",
    "triforce": "TriForce",
}
CACHES = ("full", "streaming", "cmr", "target_retrieval", "target")
CACHE_NAMES = {
    "full": "draft, full cache",
    "streaming": "draft, StreamingLLM",
    "cmr": "draft, Cross-model Retrieval",
    "target_retrieval": "target, retrieved chunks",
    "target": "target, full cache",
}


def read_records(results: Path, name: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Files called `name` anywhere under `results`, with their content."""
    for path in sorted(results.rglob(name)):
        yield path, json.loads(path.read_text(encoding="utf-8"))


def title_of_records(content: dict[str, Any]) -> str:
    setting, environment = content["setting"], content["environment"]
    hardware = environment["hardware"]
    cpu = f"{hardware['cpu']} with {environment['threads']} of {hardware['cores']} cores"
    place = hardware["gpu"] if setting["device"] == "cuda" else cpu
    return f"{setting['model']} with {setting['draft']}, {setting['dtype']}, {place}; {setting['data']}"


def needle_shares(records: Iterable[dict[str, Any]], by: list[str]) -> pd.DataFrame:
    """Accuracy and perplexity of each cache on the answer tokens that nobody can guess, by columns `by`.

    Args:
        records: of eval_needle.py; a token is guessed if the draft is right where the fact is not stated.
    """
    rows = [
        {"length": record["length"], "depth": record["depth"], "cache": cache, "right": right, "nll": nll}
        for record in records
        for cache in CACHES
        for right, nll, guessed in zip(*record[cache].values(), record["not_stated"]["right"], strict=True)
        if not guessed
    ]
    groups = pd.DataFrame(rows).groupby([*by, "cache"], sort=False)
    means = groups[["right", "nll"]].mean()
    shares = pd.DataFrame({"accuracy": means["right"], "perplexity": np.exp(means["nll"]), "tokens": groups.size()})
    return shares.reset_index()


def analysis_parts(content: dict[str, Any]) -> dict[str, pd.DataFrame]:
    """The records of each part of analyse.py, a row each; dictionaries become dotted columns."""
    parts: dict[str, list[dict[str, Any]]] = {}
    for record in content["records"]:
        parts.setdefault(record["part"], []).append(record)
    return {part: pd.json_normalize(records, max_level=1) for part, records in parts.items()}


def entropy_shares(rows: pd.DataFrame, groups: int = 10) -> pd.DataFrame:
    """Share of accepted drafts among output tokens, by method and by tenth of the target's entropy (all methods')."""
    tokens = (
        rows[["method", "length", "entropy", "accepted"]]
        .explode(["entropy", "accepted"])
        .astype({"entropy": float, "accepted": float})
    )
    tokens["group"] = pd.qcut(tokens["entropy"].rank(method="first"), groups, labels=range(1, groups + 1))
    return tokens.groupby(["method", "group"], observed=True)["accepted"].mean().reset_index()

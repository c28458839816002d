"""What `scripts.analysis` measured, as tables of numbers for those who print them and those who draw them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd

CACHE_NAMES = {
    "full": "draft, full cache",
    "streaming": "draft, StreamingLLM",
    "cmr": "draft, Cross-model Retrieval",
    "target_retrieval": "target, retrieved chunks",
    "target": "target, full cache",
}
CACHES = tuple(CACHE_NAMES)


def needle_shares(records: Iterable[dict[str, Any]], by: list[str]) -> pd.DataFrame:
    """Accuracy and perplexity of each cache on the answer tokens that nobody can guess, by columns `by`.

    Args:
        records: of needle.py; a token is guessed if the draft is right where the fact is not stated.
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
    return pd.DataFrame({"accuracy": means["right"], "perplexity": np.exp(means["nll"])}).reset_index()


def parts_of(content: dict[str, Any]) -> dict[str, pd.DataFrame]:
    """The records of each part of analyse.py, a row each; dictionaries become dotted columns."""
    parts: dict[str, list[dict[str, Any]]] = {}
    for record in content["records"]:
        parts.setdefault(record["part"], []).append(record)
    return {part: pd.json_normalize(records, max_level=1) for part, records in parts.items()}


def entropy_shares(rows: pd.DataFrame, groups: int = 10) -> pd.DataFrame:
    """Share of accepted drafts among output tokens, by method and by tenth of the target's entropy (all methods')."""
    tokens = rows[["method", "length", "entropy", "accepted"]].explode(["entropy", "accepted"])
    tokens = tokens.astype({"entropy": float, "accepted": float})
    tokens["group"] = pd.qcut(tokens["entropy"].rank(method="first"), groups, labels=range(1, groups + 1))
    return tokens.groupby(["method", "group"], observed=True)["accepted"].mean().reset_index()

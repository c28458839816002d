"""How many drafts are accepted where the answer refers back: by depth, task, and the draft's working cache.

One row of the frame is a prompt under one cache, whoever measured it: `quotations.py` with the answer forced or free,
or an evaluation (`eval_classic.py`, `eval_eagle.py`), whose journals are free.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from scripts.report.markdown import cell, lines_of
from scripts.report.records import read_documents
from specextend.config import RetrievalConfig
from specextend.data.prompts import Prompt
from specextend.errors import InputError
from specextend.evaluation.panel_figures import interval
from specextend.evaluation.records import SampleRecord
from specextend.methods import drafting_of

CACHES = {"full": "full", "streaming": "window", "retrieval": "CMR"}
FORCED, FREE = "forced", "free"
SHARES = {
    "known": "of the true answer's tokens, each given those before it",
    "quoted": "of the true answer's 4-grams of words, in the target's own",
    "copied": "of its own answer's 4-grams, in the prompt",
}


def cache_of(config: Mapping[str, Any]) -> str:
    """What the draft reads under a recorded setting: "CMR 8", "window 8" (chunks), "full", or who else drafts."""
    drafting = drafting_of(config)
    if drafting != "model":
        return drafting
    name = CACHES[config.get("draft_cache", "full")]
    return name if name == "full" else f"{name} {config['retrieval'].get('top_k', RetrievalConfig().top_k)}"


def journal_rounds(path: Path) -> Iterator[tuple[str, tuple[str, int], list[int], str]]:
    """What a journal of an evaluation holds: cache, (bucket, sample), accepted drafts per round, the prompt's hash."""
    lines = path.read_text(encoding="utf-8").splitlines()
    if len(lines) < 2:
        raise InputError(f"{path} holds no record; give the .jsonl that eval_eagle.py or eval_classic.py wrote")
    cache = cache_of(json.loads(lines[0])["setting"]["config"])
    for line in lines[1:]:
        one = SampleRecord.from_json(json.loads(line))
        yield cache, (one.bucket, one.sample), one.accepted, one.prompt_sha256


def frame_of_journals(paths: Iterable[Path], prompts: Mapping[str, list[Prompt]], hashes: Mapping) -> pd.DataFrame:
    """Rows of journals, with the tasks and depths of the prompts that they measured.

    Args:
        prompts: by bucket, as the evaluation read them; hashes: of their texts, by (bucket, sample).
    """
    rows = []
    for path in paths:
        for cache, key, accepted, sha256 in journal_rounds(path):
            if hashes.get(key) != sha256:
                raise InputError(f"{path} was measured on other prompts than these (length {key[0]}, sample {key[1]})")
            extra = prompts[key[0]][key[1]].extra
            rows.append(_row(key, cache, FREE, accepted, extra))
    return pd.DataFrame(rows)


def frame_of_scores(records: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Rows of what `quotations.py score` measured, two for each of its records."""
    return pd.DataFrame(
        [
            _row((record["length"], record["sample"]), record["cache"], kind, record[kind], record)
            for record in records
            for kind in (FORCED, FREE)
        ]
    )


def _row(key: tuple[str, int], cache: str, kind: str, accepted: list[int], about: Mapping[str, Any]) -> dict[str, Any]:
    shares = {name: about.get(name) for name in SHARES}
    return {
        "length": key[0], "sample": key[1], "cache": cache, "answer": kind, "task": about["task"],
        "depth": f"{about['depth']:g}", "accepted": sum(accepted), "rounds": len(accepted), **shares,
    }  # fmt: skip


def tables(frame: pd.DataFrame) -> str:
    """A table per length and kind of answer, and what retrieval gains over a window of its size, prompt by prompt."""
    parts = []
    for (length, kind), rows in frame.groupby(["length", "answer"], sort=False):
        prompts = rows["sample"].nunique()
        parts.append(
            f"Drafts accepted per round, {length}, {prompts} prompts, answers {kind}:\n\n{_acceptance(rows)}\n\n"
            f"CMR less a window of its size, mean over prompts with a 95 % interval:\n\n{_gains(rows)}".strip()
        )
    asked = frame[frame["quoted"].notna()].drop_duplicates(["length", "sample"])
    if len(asked):
        means = asked.groupby(["length", "task"], sort=False)[list(SHARES)].mean()
        lines = {
            f"{length}, {task}": {name: cell(row[name]) for name in SHARES} for (length, task), row in means.iterrows()
        }
        what = "; ".join(f"{name}: {text}" for name, text in SHARES.items())
        parts.append(f"Share that the target has right ({what}):\n\n{lines_of(lines, 'prompts')}")
    return "\n\n".join(parts)


def _acceptance(rows: pd.DataFrame) -> str:
    """Sums over rounds, so that each round counts alike."""
    lines: dict[str, dict[str, str]] = {}
    for name, by in (("depth", "depth"), ("task", "task"), ("all", None)):
        groups = rows.groupby(["cache", by] if by else ["cache"], sort=False)[["accepted", "rounds"]].sum()
        for key, row in groups.iterrows():
            cache, column = (key[0], key[1]) if by else (key[0] if isinstance(key, tuple) else key, name)
            lines.setdefault(cache, {})[column] = cell(row["accepted"] / max(row["rounds"], 1))
    columns = [*sorted(rows["depth"].unique()), *rows["task"].unique(), "all"]
    ordered = sorted(lines, key=_place)
    return lines_of({cache: {name: lines[cache].get(name, "") for name in columns} for cache in ordered}, "cache")


def _gains(rows: pd.DataFrame) -> str:
    rows = rows.assign(rate=rows["accepted"] / rows["rounds"].clip(lower=1))
    wide = rows.pivot_table(index=["sample", "depth", "task"], columns="cache", values="rate")
    lines = {}
    for cache in sorted(wide.columns, key=_place):
        name, _, chunks = cache.partition(" ")
        window = f"window {chunks}"
        if name == "CMR" and window in wide:
            gain = (wide[cache] - wide[window]).dropna().reset_index(name="gain")
            groups = [*gain.groupby("depth"), *gain.groupby("task", sort=False), ("all", gain)]
            lines[f"{chunks} chunks"] = {key: _interval(group["gain"]) for key, group in groups}
    return lines_of(lines, "size") if lines else ""


def _interval(values: pd.Series) -> str:
    half = 1.96 * values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
    return f"{values.mean():+.2f}" + (f" ± {half:.2f}" if half == half else "")


def _place(cache: str) -> tuple[int, int, str]:
    """Who keeps nothing of its own first, then by size, the window before retrieval."""
    name, _, chunks = cache.partition(" ")
    return (1, int(chunks), {"window": "0", "CMR": "1"}.get(name, name)) if chunks else (0, 0, name)


# --- in the report --------------------------------------------------------------------------------------------------


def sections(results: Path) -> Iterator[str]:
    """Retrieval against a window where the answer refers back."""
    lines: dict[str, dict[str, str]] = {}
    for _, content in read_documents(results, "quotations_*.json"):
        frame = frame_of_scores(content["records"])
        name = f"{Path(content['setting']['draft']).name}, {frame['length'].iloc[0]}"
        lines[name] = {"prompts": str(frame["sample"].nunique())} | acceptance(frame[frame["answer"] == FORCED])
    if lines:
        yield (
            "## Where retrieval wins, and where it does not\n\nOn summaries retrieval and a window of the same size "
            "tie. Here the answer refers back: quote a paragraph, continue one, find a needle, at five depths of the "
            "document, and is forced to be the true one (SmolLM2, float16, temperature 0; accepted drafts per round, "
            "and CMR less window with 95 % interval):"
        )
        yield lines_of(lines, "head, length")
        yield (
            "With 8 chunks and the true answer retrieval gains a little, most for EAGLE-3 and for needles, far from "
            "the 1.5 times that was hoped for; on the model's own answers, which rarely quote what they are asked to, "
            "it gains nothing. Prompt lookup is the best draft of such text. By depth and task, and answered freely: "
            "[quotations](tables/quotations.md)."
        )


def acceptance(rows: pd.DataFrame) -> dict[str, str]:
    """Accepted per round of each cache, and what retrieval adds to a window of its size."""
    sums = rows.groupby("cache")[["accepted", "rounds"]].sum()
    rates = sums["accepted"] / sums["rounds"]
    wide = rows.assign(rate=rows["accepted"] / rows["rounds"].clip(lower=1)).pivot(
        index="sample", columns="cache", values="rate"
    )
    found = {"full": cell(rates["full"]), "prompt lookup": cell(rates["lookup"])}
    for size in (8, 32):
        gain = interval((wide[f"CMR {size}"] - wide[f"window {size}"]).dropna().to_numpy())
        found[f"window → CMR, {size} chunks"] = (
            f"{cell(rates[f'window {size}'])} → {cell(rates[f'CMR {size}'])} "
            f"({gain.mean:+.2f} [{gain.low:+.2f}, {gain.high:+.2f}])"
        )
    return found

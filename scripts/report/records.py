"""What lies under results/: the records of all evaluations as one tidy table, and the other measurements' JSON files.

A row of the table is one measured generation: the columns of its setting (`RUN`, data, temperature, method), of its
prompt, and `record`. Figures of any selection of rows are those of an evaluation (`aggregate`), so methods can be
compared on the prompts they share. A damaged file is named in one line on stderr and left out.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd

from specextend.data.prompts import ALL_LENGTHS, parse_length
from specextend.errors import InputError, SpecExtendError
from specextend.evaluation.aggregate import aggregate
from specextend.evaluation.records import SampleRecord
from specextend.methods import METHODS

T = TypeVar("T")
RUN = ["folder", "model", "draft", "dtype", "device", "hardware", "tree", "max_gen_len"]
PART = [*RUN, "data", "temperature"]  # what one table shows
FIGURES_BY = [*PART, "length", "method"]
STANDARD, SPECEXTEND = "standard", "specextend"
PAIR = (STANDARD, SPECEXTEND)
LEADS = ["avg_accept_length", "speedup_decode", "speedup"]
NAMED_SINCE = {
    "8cb513595f510320": ("target", "bundled_128k")
}  # by their weights: models measured before they had a name
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, ArithmeticError, SpecExtendError)


def attempt(path: Path, read: Callable[[], T]) -> T | None:
    """What `read` makes of a file; None, and a line that names the file, where it is damaged."""
    try:
        return read()
    except UNREADABLE as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        print(f"{path} is damaged and left out ({reason}); remove it or measure it anew", file=sys.stderr)
        return None


def read_records(results: Path) -> pd.DataFrame:
    """Every record of every journal under `results`, by setting, shortest prompts first, methods in their order."""
    found = [attempt(path, lambda path=path: _journal(path, results)) for path in sorted(results.rglob("*.jsonl"))]
    rows = [row for journal in found if journal for row in journal]
    if not rows:
        raise InputError(
            f"no records of eval_classic.py or eval_eagle.py under {results}; run one, or name another --results"
        )
    records = pd.DataFrame(rows)
    others = [name for name in RUN if name != "tree"]  # chains belong to the run whose folder they lie in
    records["tree"] = records["tree"].fillna(records.groupby(others)["tree"].transform("first")).fillna("chains")
    twice = records.groupby(FIGURES_BY)["file"].transform("nunique") > 1
    twice = records["file"].isin(records.loc[twice, "file"])
    records["method"] = records["method"].mask(twice, records["method"] + " (" + records["file"] + ")")
    places = {name: place for place, name in enumerate(METHODS)}
    order = records["method"].map(lambda name: places.get(name, len(places)))
    size = records["length"].map(lambda name: math.inf if name == ALL_LENGTHS else parse_length(name))
    by = [*PART, "size", "order", "file", "sample", "run"]
    return records.assign(order=order, size=size).sort_values(by, ignore_index=True).drop(columns=["order", "size"])


def _journal(path: Path, results: Path) -> list[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()  # being written, or cut off by a kill
    if not lines:
        return []
    manifest = json.loads(lines[0])
    if "arms" in manifest["setting"]:
        return []  # several arms beside each other have pages of their own (`evidence.py`)
    setting = _setting(manifest)
    setting |= {"file": path.relative_to(results).as_posix(), "folder": path.parent.relative_to(results).as_posix()}
    records = [SampleRecord.from_json(json.loads(line)) for line in lines[1:]]
    whole = aggregate(records)  # fails on numbers that are none, too
    return [
        setting
        | {
            # part of the hardware: workers side by side are slower than one alone, and no table mixes the two
            "hardware": setting["hardware"] + _workers(whole[one.bucket]["workers_on_host"]),
            "length": one.bucket,
            "sample": one.sample,
            "run": one.run,
            "prompt": one.prompt_sha256,
            "record": one,
        }
        for one in records
    ]


def _setting(manifest: dict[str, Any]) -> dict[str, Any]:
    setting, environment = manifest["setting"], manifest["environment"]
    config = setting["config"]
    drafts_trees = config.get("drafting", config.get("draft", "model")) == "model"
    return {
        **{name: setting[name] for name in ("data", "method", "model", "draft", "dtype", "device", "max_gen_len")},
        "temperature": setting["sampling"]["temperature"],
        "hardware": place_of(setting, environment),
        "tree": _tree(config["tree"]) if drafts_trees else None,
        "versions": f"torch {environment['torch']}, transformers {environment['transformers']}",
    }


def place_of(setting: dict[str, Any], environment: dict[str, Any]) -> str:
    """The processor that decoded."""
    hardware = environment["hardware"]
    cpu = f"{hardware['cpu']} with {environment['threads']} of {hardware['cores']} cores"
    return hardware["gpu"] if setting["device"] == "cuda" else cpu


def models_and_place(setting: dict[str, Any], environment: dict[str, Any]) -> str:
    """Target, draft, dtype and processor, as a title begins."""
    model = setting["model"]
    if names := NAMED_SINCE.get(setting.get("weights", {}).get("target", "")):
        model = model.replace(*names, 1)
    return f"{model} with {setting['draft']}, {setting['dtype']}, {place_of(setting, environment)}"


def _workers(on_host: list[int]) -> str:
    """What is said of workers that shared a host, and nothing of one alone."""
    if on_host == [1]:
        return ""
    return f", {' or '.join(map(str, on_host))} workers per host" + (" (speeds do not compare)" * (len(on_host) > 1))


def _tree(tree: dict[str, Any]) -> str:
    if tree.get("rule") == "price":
        branch = ", one branch looked up in the text" if tree.get("lookup_branch") else ""
        return f"priced, at most {tree['nodes']} nodes, depth {tree['max_depth']}{branch}"
    floor = tree.get("min_probability")
    text = f"{tree['nodes']} nodes, depth {tree['max_depth']}, threshold {tree['threshold']:g}"
    return f"{text}, nodes reached with at least {floor:g}" if floor else text


# --- figures of rows ------------------------------------------------------------------------------------------------


def figures_of(records: pd.DataFrame) -> pd.DataFrame:
    """A row per setting, length and method: the columns of the setting and the figures of `aggregate`, dotted names."""
    rows = [
        dict(zip(FIGURES_BY, key, strict=True)) | next(iter(aggregate(group["record"]).values()))
        for key, group in records.groupby(FIGURES_BY, sort=False)
    ]
    return pd.json_normalize(rows) if rows else pd.DataFrame(columns=[*FIGURES_BY, "samples"])


def shared(records: pd.DataFrame, methods: tuple[str, ...] | None = None) -> pd.DataFrame:
    """The records of `methods` (all of them) on the prompts that all methods measured at that length have answered."""
    if methods is not None:
        records = records[records["method"].isin(methods)]
    cell = [*PART, "length"]
    measured = records.groupby(cell)["method"].transform("nunique")
    answered = records.groupby([*cell, "sample", "run", "prompt"])["method"].transform("nunique")
    return records[answered == measured]


def leads(records: pd.DataFrame) -> pd.DataFrame:
    """Each method's figures over each other's, on the prompts both have answered: by (one, other, length).

    Args:
        records: of one setting, data set and temperature.
    """
    rows = {}
    for length, group in records.groupby("length", sort=False):
        held = {
            method: {(one.sample, one.run, one.prompt_sha256): one for one in of["record"]}
            for method, of in group.groupby("method", sort=False)
        }
        for pair in combinations(held, 2):
            keys = sorted(held[pair[0]].keys() & held[pair[1]].keys())
            if keys:
                found = [next(iter(aggregate(held[method][key] for key in keys).values())) for method in pair]
                one, other = (pd.Series([figures[name] for name in LEADS], LEADS, dtype=float) for figures in found)
                rows |= {(*pair, length): one / other, (*pair[::-1], length): other / one}
    table = pd.DataFrame(rows.values(), columns=LEADS)
    return table.set_index(pd.MultiIndex.from_tuples(rows, names=["one", "other", "length"])) if rows else table


def pivot(figures: pd.DataFrame, name: str) -> pd.DataFrame:
    """A figure by length and method; standard and SpecExtend are there, all NaN where they were not measured."""
    lengths, methods = figures["length"].unique(), figures["method"].unique()
    table = figures.pivot(index="length", columns="method", values=name).astype(float)
    return table.reindex(index=lengths, columns=list(dict.fromkeys((*PAIR, *methods))))


def title_of(run: pd.Series) -> str:
    models = f"{run['model']} with {run['draft']}, {run['dtype']}, {run['hardware']}"
    return f"{models}; tree: {run['tree']}; {run['max_gen_len']} new tokens"


def by(records: pd.DataFrame, columns: list[str]) -> Iterator[tuple[pd.Series, pd.DataFrame]]:
    """Parts of the table that agree in `columns`, each with its first row."""
    for _, rows in records.groupby(columns, sort=False):
        yield rows.iloc[0], rows


# --- measurements that are no generations ---------------------------------------------------------------------------


def read_documents(results: Path, name: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Files called `name` anywhere under `results`, with their content."""
    for path in sorted(results.rglob(name)):
        content = attempt(path, lambda path=path: dict(json.loads(path.read_text(encoding="utf-8"))))
        if content is not None:
            yield path, content


def title_of_document(content: dict[str, Any]) -> str:
    setting = content["setting"]
    return f"{models_and_place(setting, content['environment'])}; {setting['data']}"

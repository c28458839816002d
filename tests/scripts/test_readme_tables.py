"""A column of the README's table and of the report's first ones, computed again from the records, by own sums."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BENCH = json.loads((ROOT / "results" / "h200" / "bench.json").read_text())
RUNS = [path.name for path in (ROOT / "results" / "cpu").iterdir() if (path / "govreport_standard.jsonl").exists()]


def tables(text: str) -> list[list[dict[str, str]]]:
    """The tables of a page: a row as a dictionary by heading."""
    found = []
    for block in re.findall(r"(?:^\|.*\|\n)+", text, re.M):
        header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines())
        found.append([dict(zip(header, row, strict=True)) for row in rows])
    return found


(HEADLINE,) = tables(
    (ROOT / "README.md").read_text().split("<!-- results:begin -->")[1].split("<!-- results:end -->")[0]
)
REPORT = (ROOT / "results" / "REPORT.md").read_text()
ACCEPTED, SPEED = tables(REPORT.split("## At a glance")[1])[:2]
STAGES = tables(REPORT.split("Milliseconds of the steps")[1])[0]


def decoded(method: str, tokens: int, temperature: float) -> dict[tuple[str, int], tuple[int, float]]:
    """Tokens and seconds by data set and number of the prompt."""
    found: dict[tuple[str, int], tuple[int, float]] = {}
    for row in BENCH["decode"]:
        if (row["method"], row["tokens"], row["temperature"]) == (method, tokens, temperature):
            number = sum(data == row["data"] for data, _ in found)
            count = row["new_tokens"] - 1
            found[row["data"], number] = count, count / row["decode_tokens_per_s"]
    return found


def test_rates_on_the_gpu_are_tokens_over_time():
    names = {"AR, ours": "autoregressive captured", "standard": "standard captured", "SpecExtend": "specextend"}
    assert {row["temperature"] for row in HEADLINE} == {"0.0", "0.8"}
    for row in HEADLINE:
        rates, temperature = {}, float(row["temperature"])
        of = {name: decoded(method, int(row["prompt tokens"]), temperature) for name, method in names.items()}
        assert set(of["AR, ours"]) == set(of["SpecExtend"]) == set(of["standard"])  # so the gains are ratios of rates
        for name, prompts in of.items():
            rates[name] = sum(count for count, _ in prompts.values()) / sum(time for _, time in prompts.values())
            assert row[name] == f"{rates[name]:.0f}"
        assert row["SpecExtend over AR, ours"] == f"{rates['SpecExtend'] / rates['AR, ours']:.2f}"
        assert row["over standard"] == f"{rates['SpecExtend'] / rates['standard']:.2f}"


def test_steps_on_the_gpu_are_those_recorded():
    for row, measured in zip(STAGES, BENCH["stages"], strict=True):
        assert row["prompt tokens"] == str(measured["tokens"])
        assert row["verify"] == f"{measured['verify_ms']:.2f}" and row["whole round"] == f"{measured['round_ms']:.2f}"


def records(run: str, data: str, method: str, length: str) -> dict[tuple[int, int], dict]:
    lines = (ROOT / "results" / "cpu" / run / f"{data}_{method}.jsonl").read_text().splitlines()[1:]
    return {(one["sample"], one["run"]): one for one in map(json.loads, lines) if one["bucket"] == length}


@pytest.mark.parametrize("run", RUNS)
def test_standard_and_specextend_are_compared_on_the_prompts_that_both_answered(run):
    (column,) = (name for name in ACCEPTED[0] if name.startswith(f"{run},"))
    compared = 0
    for accepted, speed in zip(ACCEPTED, SPEED, strict=True):
        assert accepted["prompts"] == speed["prompts"]
        data, length = accepted["prompts"].split(", ")
        standard, ours = (records(run, data, method, length) for method in ("standard", "specextend"))
        both = sorted(set(standard) & set(ours))
        if not both:
            continue
        cells: tuple[list[str], list[str]] = [], []
        for held in (standard, ours):
            rounds = [count for key in both for count in held[key]["accepted"]]
            cells[0].append(f"{sum(rounds) / len(rounds):.2f}")
            rates = [
                sum(held[key][of]["new_tokens"] - 1 for key in both) / sum(held[key][of]["decode_s"] for key in both)
                for of in ("method", "autoregressive")
            ]
            cells[1].append(f"{rates[0] / rates[1]:.2f}")
        assert (accepted[column], speed[column]) == tuple(" → ".join(pair) for pair in cells)
        compared += 1
    assert compared >= 4


def speedups(arm: str) -> dict[tuple[str, str], float]:
    """Decoding over AR, mean of the prompts' own ratios, by temperature and length."""
    lines = (ROOT / "results" / "cpu" / "policy" / "policy.jsonl").read_text().splitlines()
    found: dict[tuple[str, str], list[float]] = {}
    for row in map(json.loads, lines[1:]):
        own, alone = row["arms"][arm]["timing"], row["autoregressive"]["timing"]
        ratio = own["decode_tokens_per_s"] / alone["decode_tokens_per_s"]
        found.setdefault((f"{row['temperature']:g}", row["bucket"]), []).append(ratio)
    assert {len(ratios) for ratios in found.values()} == {16}
    return {cell: sum(ratios) / len(ratios) for cell, ratios in found.items()}


PRICED = speedups("specextend:tree=price")
TUNED = speedups("specextend:nodes=12,max_depth=8,threshold=0.35,min_probability=0.06")


def test_speeds_of_priced_trees_are_means_of_the_prompts_ratios():
    (table,) = [one for one in tables((ROOT / "docs" / "policy.md").read_text()) if "512" in one[0]]
    for row in table:
        temperature, tree = re.fullmatch(r"temperature ([\d.]+), (priced|12 nodes)", [*row.values()][0]).groups()
        of = PRICED if tree == "priced" else TUNED
        lengths = {name: value for name, value in row.items() if name in ("512", "1K", "4K")}
        assert lengths == {name: f"{of[temperature, name]:.2f}" for name in ("512", "1K", "4K")}


def test_what_the_readme_says_below_its_first_command_is_in_the_record():
    said = r"decodes ([\d.]+) to ([\d.]+) times as fast as autoregressively at temperature 0, and ([\d.]+) to ([\d.]+)"
    figures = re.search(said, " ".join((ROOT / "README.md").read_text().split())).groups()
    for (low, high), temperature in zip((figures[:2], figures[2:]), ("0", "0.8"), strict=True):
        cells = [value for (at, _), value in PRICED.items() if at == temperature]
        assert (low, high) == (f"{min(cells):.1f}", f"{max(cells):.1f}")

"""Our engine beside vLLM: the report's cells follow from the record, and one clock is used for both engines."""

from __future__ import annotations

import importlib.util
import json
import statistics
from pathlib import Path

import pytest

from scripts.bench.vllm import NEW_TOKENS, WARM_UP, Prompt, measured
from scripts.report.vllm import vllm_reports

RESULTS = Path(__file__).parents[2] / "results"
ROWS = json.loads((RESULTS / "h200" / "vllm.json").read_text())["rows"]


def rate(method: str, tokens: int) -> float:
    """Decoded tokens of the first prompt of both data sets over their seconds."""
    chosen = [row for row in ROWS if (row["method"], row["tokens"], row["sample"]) == (method, tokens, 0)]
    assert [row["data"] for row in chosen] == ["govreport", "pg19"]
    seconds = [statistics.median(row["all_tokens_s"]) - statistics.median(row["one_token_s"]) for row in chosen]
    return sum(row["decoded"] for row in chosen) / sum(seconds)


def test_the_report_says_what_the_record_holds():
    (section,) = vllm_reports(RESULTS)
    assert section in (RESULTS / "REPORT.md").read_text()
    (line,) = (line for line in section.splitlines() if line.startswith("| 16000 |"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[5] == f"{rate('ours_tree_0.05', 16000):,.0f}" and cells[9] == f"{rate('vllm_ngram', 16000):,.0f}"
    assert cells[10] == f"{rate('ours_tree_0.05', 16000) / rate('vllm_ngram', 16000):.2f}"
    assert cells[3] == f"{rate('ours_ar', 16000):,.0f}" and cells[6] == f"{rate('vllm_ar', 16000):,.0f}"


def test_a_prompt_is_read_for_one_token_and_for_many_and_its_rounds_are_those_of_the_long_calls():
    asked: list[tuple[int, int]] = []

    def answer(ids: list[int], new_tokens: int) -> list[int]:
        asked.append((ids[0], new_tokens))
        return list(range(new_tokens))

    prompts = [Prompt("pg19", 1000, 0, [7]), Prompt("pg19", 1000, 1, [8])]
    first, second = measured("any", answer, lambda: sum(count for _, count in asked), prompts, 2)
    calls = [1, 1, NEW_TOKENS, NEW_TOKENS]
    assert asked == [(7, n) for n in (NEW_TOKENS, *calls)] + [(8, n) for n in (WARM_UP, *calls)]
    assert first["rounds"] == second["rounds"] == NEW_TOKENS and first["decoded"] == NEW_TOKENS - 1
    assert len(first["one_token_s"]) == len(first["all_tokens_s"]) == 2 and first["sha256"] == second["sha256"]


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
@pytest.mark.xdist_group("warm")
def test_without_vllm_it_says_so_in_one_line(warm, tmp_path):
    run = warm.run("scripts.bench.vllm", "--data_dir", tmp_path, "--output", tmp_path)
    assert run.returncode == 2 and run.stderr.count("\n") == 1 and "pip install vllm" in run.stderr
    assert not list(tmp_path.iterdir())

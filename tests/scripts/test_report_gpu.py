"""What is said of a GPU's record follows from the record."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest

from scripts.report.gpu import policy_reports, slot_reports, step_reports, summary

RESULTS = Path(__file__).parents[2] / "results"
RECORDS = sorted(RESULTS.glob("*/bench.json"))


def test_the_summary_holds_what_was_measured_and_nothing_else():
    bandwidth = {"copy_tb_s": 4.3, "read_tb_s": 4.0}
    kernels = [{"tokens": 16000, "slots": 64, "tb_s": 3.0}, {"tokens": 16000, "slots": 1, "tb_s": 1.0}]
    assert summary({"kernels": kernels}) == {}
    found = summary({"bandwidth": bandwidth, "kernels": kernels})
    assert found == {"copy_bandwidth_tb_s": 4.3, "read_bandwidth_tb_s": 4.0, "hta_bandwidth_fraction_16k": 0.75}


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.parent.name)
def test_the_committed_summary_is_that_of_the_record(path):
    found = json.loads(path.with_name("summary.json").read_text())
    assert summary(json.loads(path.read_text())) == pytest.approx(found)


def test_a_record_says_what_a_round_costs(tmp_path):
    record = json.loads((RESULTS / "h200" / "bench.json").read_text())
    (tmp_path / "gpu").mkdir()
    (tmp_path / "gpu" / "bench.json").write_text(json.dumps(record))
    (section,) = step_reports(tmp_path)
    shown = next(one for one in record["stages"] if one["tokens"] == 16000)
    assert "whole round" in section and f"| {shown['round_ms']:.2f} |" in section


@pytest.mark.parametrize(("gpu", "fewest"), [("h100", 1), ("h200", 8)])
def test_verifications_stand_by_their_slots_and_more_slots_cost_no_less(gpu, fewest):
    record = json.loads((RESULTS / gpu / "bench.json").read_text())
    (section,) = slot_reports(RESULTS / gpu)
    assert section in (RESULTS / "tables" / "gpu.md").read_text()
    for tokens in (1000, 16000):
        rows = [row for row in sorted(record["slots"], key=lambda row: row["slots"]) if row["tokens"] == tokens]
        assert f"| {tokens} | {' | '.join('{:.2f}'.format(row['ms']) for row in rows)} |" in section
        times = [row["ms"] for row in rows if row["slots"] >= fewest]
        assert times == sorted(times) and len(rows) == 7


def test_deciding_about_trees_costs_nothing_on_a_gpu():
    record = json.loads((RESULTS / "h200" / "bench.json").read_text())
    (section,) = policy_reports(RESULTS / "h200")
    assert section in (RESULTS / "tables" / "gpu.md").read_text()
    for row in record["policy"]:
        over = [turn["decided"]["round_ms"] / turn["fixed"]["round_ms"] for turn in row["turns"]]
        assert f"{statistics.median(over):.2f}" == "0.98"  # as docs/policy.md says
        assert row["decided_tokens"] == row["fixed_tokens"]
        assert f"| {row['tokens']} | {row['fixed_round_ms']:.2f} | {row['decided_round_ms']:.2f} |" in section

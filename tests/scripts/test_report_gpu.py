"""What is said of a GPU's record follows from the record."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts.report.gpu import slot_reports, step_reports, summary

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


def test_verifications_stand_by_their_slots_and_more_slots_cost_no_less():
    record = json.loads((RESULTS / "h100" / "bench.json").read_text())
    (section,) = slot_reports(RESULTS / "h100")
    assert section in (RESULTS / "tables" / "gpu.md").read_text()
    for tokens in (1000, 16000):
        times = [row["ms"] for row in sorted(record["slots"], key=lambda row: row["slots"]) if row["tokens"] == tokens]
        assert times == sorted(times) and len(times) == 7
        assert f"| {tokens} | {' | '.join(f'{one:.2f}' for one in times)} |" in section

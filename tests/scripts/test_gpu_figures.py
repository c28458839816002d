"""What is said of a GPU's record follows from the record."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from gpu_figures import CAPTURED, SPECEXTEND, rates, summary

RECORDS = sorted((Path(__file__).parents[2] / "results").glob("*/bench.json"))


def row(method, tokens, accepted, ms):
    return {"method": method, "tokens": tokens, "temperature": 0, "accepted_per_round": accepted, "ms_per_round": ms}


def test_a_rate_is_the_tokens_of_all_prompts_over_their_time():
    rows = [row(SPECEXTEND, 1000, 3.0, 8.0), row(SPECEXTEND, 1000, 1.0, 7.0), row(CAPTURED, 1000, 0.0, 5.0)]
    rows.append(row(CAPTURED, 1000, None, 3.0))
    found = rates(rows).loc[1000]
    assert found[SPECEXTEND] == pytest.approx(1000 * 6 / 15) and found[CAPTURED] == pytest.approx(1000 * 2 / 8)


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

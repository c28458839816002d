"""What is said of a GPU's record follows from the record, with the decoding rates of older ones or without."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts.report.gpu import CAPTURED, EAGER, SPECEXTEND, gains, gpu_reports, rates, summary

RECORDS = sorted((Path(__file__).parents[2] / "results").glob("*/bench.json"))


def row(method, tokens, new_tokens, rate, data="pg19"):
    measured = {"new_tokens": new_tokens, "decode_tokens_per_s": rate}
    return {"data": data, "method": method, "tokens": tokens, "temperature": 0} | measured


def test_a_rate_is_the_tokens_of_all_prompts_over_their_time():
    # 200 tokens in 0.2 s and 100 in 1 s: not the mean of 1,000 and 100
    rows = [row(SPECEXTEND, 1000, 201, 1000.0), row(SPECEXTEND, 1000, 101, 100.0), row(CAPTURED, 1000, 101, 50.0)]
    found = rates(rows).loc[1000]
    assert found[SPECEXTEND] == pytest.approx(300 / 1.2) and found[CAPTURED] == pytest.approx(50)


def test_a_gain_is_over_the_prompts_that_both_decoded():
    rows = [row(SPECEXTEND, 1000, 101, 100.0), row(SPECEXTEND, 1000, 101, 900.0)]
    rows += [row(SPECEXTEND, 1000, 101, 300.0, "govreport"), row(SPECEXTEND, 512, 101, 800.0)]
    rows += [row(EAGER, 1000, None, 20.0), row(EAGER, 1000, None, 30.0, "govreport")]
    # a step each of Hugging Face's: 2 tokens in 1/20 + 1/30 s; SpecExtend's first prompts: 200 in 1 + 1/3 s
    assert gains(rows, EAGER).to_dict() == {1000: pytest.approx(150 / 24)}
    # the number of a prompt may stand in its row
    numbered = [row(SPECEXTEND, 512, 101, 800.0) | {"sample": 1}, row(CAPTURED, 512, 101, 400.0) | {"sample": 0}]
    assert gains([*numbered, row(CAPTURED, 512, 101, 200.0) | {"sample": 1}], CAPTURED)[512] == pytest.approx(4)


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


def test_a_record_without_decoding_rates_says_what_a_round_costs(tmp_path):
    (old,) = (json.loads(path.read_text()) for path in RECORDS)
    new = {name: value for name, value in old.items() if name not in ("decode", "stages")} | {"steps": old["stages"]}
    (tmp_path / "gpu").mkdir()
    (tmp_path / "gpu" / "bench.json").write_text(json.dumps(new))
    (section,) = gpu_reports(tmp_path)
    assert "whole round" in section and "Decode tokens/s" not in section
    assert f"| {old['stages'][0]['round_ms']:.2f} |" in section
    assert summary(new) == {
        name: value for name, value in summary(old).items() if "decode" not in name and name != "ar_eager_ms_16k"
    }

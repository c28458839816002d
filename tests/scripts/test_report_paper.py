"""Which of the paper's tables stand beside ours, and with which rows."""

from __future__ import annotations

import pandas as pd
import pytest
from made_records import record, timing

from scripts.report.paper import tables_beside
from scripts.report.records import RUN
from specextend.evaluation.records import SampleRecord


def measured(data: str, temperature: float, model: str, draft: str, lengths: list[str], methods: str) -> pd.DataFrame:
    """Records as the reader gives them; method i accepts 1 + i drafts, and is 1 + i times as fast."""
    setting = {"data": data, "temperature": temperature, "model": model, "draft": draft}
    fixed = dict.fromkeys(RUN, "") | setting | {"sample": 0, "run": 0, "prompt": "a"}
    return pd.DataFrame(
        [
            {**fixed, "method": method, "length": length, "record": made(length, 1 + i)}
            for i, method in enumerate(methods.split())
            for length in lengths
        ]
    )


def made(length: str, gain: int) -> SampleRecord:
    times = {"method": timing(100, 0.0, 1.0 / gain), "autoregressive": timing(100, 0.0, 1.0)}
    return record(length, accepted=[gain] * 5, **times)


@pytest.mark.parametrize(
    "setting, beside, row",
    [
        (("govreport", 0.0, "bundled", "bundled/draft", ["1K", "512"]), "table 2 (vicuna_7b, vicuna_68m)",
         "| 1K | 2.73 → 3.80 | 1.00 → 2.00 | 1.78 → 2.28 | 1.00 → 2.00 |"),
        (("pg19", 0.0, "longchat_7b", "x/EAGLE-longchat", ["2K"]), "table 2 (longchat_7b, eagle)",
         "| 2K | 3.00 → 3.02 |"),
        (("govreport", 0.0, "llama31_8b", "x/EAGLE3", ["16K"]), "table 5", "| 16K | 1.49 → 3.80 | 1.00 → 2.00 |"),
        (("pg19", 0.0, "llama31_8b", "x/EAGLE3", ["64K"]), "table 6", "| 64K | – → 2.71 | 1.00 → 2.00 | – → – |"),
        (("aime24", 0.5, "r1_distill_llama_8b", "x/EAGLE3", ["all"]), "figure 6",
         "| specextend | 5.95 | 3.73 | 2.00 | 2.00 |"),
    ],
)  # fmt: skip
def test_standard_and_specextend_stand_beside_the_papers_rows(setting, beside, row):
    (table,) = tables_beside(measured(*setting, methods="standard specextend"))
    assert beside in table and f"\n{row}" in table
    assert "512" not in table  # the paper has no such length


def test_rivals_and_ablation_stand_beside_tables_3_and_4():
    methods = "autoregressive_hf standard fa hta streaming cmr specextend triforce magicdec"
    _, table3, table4 = tables_beside(measured("govreport", 0.0, "bundled", "bundled/draft", ["8K"], methods))
    # over Hugging Face's: standard is method 1, triforce 7, magicdec 8, specextend 6
    assert "| 8K | 1.18 / 8.00 | 1.13 / 9.00 | 1.08 / 2.00 | 2.29 / 7.00 |" in table3
    assert "| Standard+CMR | 2.78 / 6.00 | 1.35 / 3.00 |" in table4


def test_nothing_stands_beside_what_the_paper_has_not():
    for data, temperature in (("builtin", 0.0), ("govreport", 0.8)):
        rows = measured(data, temperature, "bundled", "bundled/draft", ["1K"], "standard specextend")
        assert tables_beside(rows) == []

"""Figures of arms beside each other: against numbers worked out by hand, and against other bootstraps."""

import numpy as np
import pytest
from made_records import answer, panel, write_panels
from scipy import stats

from specextend.errors import InputError
from specextend.evaluation.panel_figures import (
    POOLED,
    RESAMPLES,
    SEED,
    figures_of,
    interval,
    paired_difference,
    paired_ratio,
    pooled,
    read_panels,
)


def row_of(panels, arm: str = "specextend", data: str = "govreport", bucket: str = "1K"):
    (row,) = [one for one in figures_of(panels) if (one["arm"], one["data"], one["length"]) == (arm, data, bucket)]
    return row


def test_figures_of_two_prompts_are_what_a_hand_works_out():
    panels = [
        # eight tokens behind the first: in 2 s against 4 s, and in 8 s against 4 s; prefills of 1 s
        panel({"specextend": answer(9, 2.0, (3, 1))}, sample=0, ar_s=4.0),
        panel({"specextend": answer(9, 8.0, (0, 0, 0, 0))}, sample=1, ar_s=4.0),
    ]
    row = row_of(panels)
    assert (row["prompts"], row["runs"], row["equal"], row["loops"]) == (2, 2, 2, 0)
    accepted, decode, whole = (row[name] for name in ("accepted", "speedup_decode", "speedup"))
    assert (accepted["mean"], accepted["total"]) == (1.0, pytest.approx(4 / 6))
    assert (decode["mean"], decode["smallest"]) == (1.25, 0.5) and decode["total"] == pytest.approx(8 / 10)
    assert whole["mean"] == pytest.approx((5 / 3 + 5 / 9) / 2) and whole["total"] == pytest.approx(10 / 12)
    assert (decode["low"], decode["high"]) == (0.5, 2.0)  # of two prompts: either of them twice
    assert (decode["total_low"], decode["total_high"]) == (0.5, 2.0)
    assert decode["p10"] is None and decode["p90"] is None
    assert row["decode_tokens_per_s"] == pytest.approx(1.6) and row["ar_decode_tokens_per_s"] == 2
    assert row["without_loops"]["prompts"] == 2


def test_runs_of_a_prompt_are_one_prompt():
    panels = [
        panel({"specextend": answer(9, 2.0, (3, 1))}, run=0),
        panel({"specextend": answer(9, 6.0, (0, 0), first_difference=4)}, run=1),
    ]
    row = row_of(panels)
    assert (row["prompts"], row["runs"], row["equal"]) == (1, 2, 0)
    assert row["speedup_decode"]["mean"] == 1.0 and row["accepted"]["mean"] == 1.0
    assert row["speedup_decode"]["low"] is None


def test_percentiles_are_there_from_twenty_prompts_on():
    panels = [panel({"specextend": answer(9, 1.0 + sample)}, sample=sample) for sample in range(20)]
    assert row_of(panels[:19])["speedup_decode"]["p10"] is None
    found = row_of(panels)["speedup_decode"]
    assert (found["p10"], found["p90"]) == pytest.approx(tuple(np.percentile(4 / np.arange(1.0, 21), [10, 90])))


def test_prompts_on_which_anybody_loops_are_left_out_for_all():
    panels = [
        panel({"standard": answer(9, 2.0), "specextend": answer(9, 1.0, loops=True)}, sample=0),
        panel({"standard": answer(9, 4.0), "specextend": answer(9, 2.0)}, sample=1),
    ]
    assert row_of(panels)["loops"] == 0.5 and row_of(panels, "standard")["loops"] == 0
    for arm, gain in (("standard", 1.0), ("specextend", 2.0)):
        clean = row_of(panels, arm)["without_loops"]
        assert (clean["prompts"], clean["speedup_decode"]["mean"]) == (1, gain)
    assert row_of(panels[:1])["without_loops"] is None


def test_data_sets_have_rows_of_their_own_and_together_in_order_of_length():
    panels = [
        panel({"specextend": answer(9, decode_s)}, data=data, bucket=bucket, temperature=temperature)
        for data, decode_s in (("pg19", 1.0), ("govreport", 4.0))
        for bucket in ("16K", "512", "4K")
        for temperature in (0.0, 0.7)
    ]
    rows = figures_of(panels)
    assert [(row["length"], row["data"]) for row in rows if row["temperature"] == 0.7] == [
        (length, data) for length in ("512", "4K", "16K") for data in ("pg19", "govreport", POOLED)
    ]
    assert rows[0]["temperature"] == 0.7 and len(pooled(rows)) == 6
    assert pooled(rows)[0]["speedup_decode"]["mean"] == 2.5
    alone = figures_of([one for one in panels if one.data == "pg19"])
    assert {row["data"] for row in alone} == {"pg19"} and pooled(alone) == alone


def test_arms_are_compared_on_the_prompts_that_both_answered():
    panels = [
        panel({"standard": answer(9, 2.0, (1,)), "specextend": answer(9, 1.0, (3,))}, sample=0),
        panel({"standard": answer(9, 4.0, (1,)), "specextend": answer(9, 1.0, (2,))}, sample=1),
        panel({"standard": answer(9, 9.0, (9,))}, sample=2),
    ]
    found = paired_difference(panels, "specextend", "standard", "speedup_decode")
    assert (found.mean, found.low, found.high, found.prompts) == (2.5, 2.0, 3.0, 2)
    assert paired_ratio(panels, "specextend", "standard", "speedup_decode").mean == 3.0
    assert paired_difference(panels, "specextend", "standard", "accepted").mean == 1.5
    assert paired_difference(panels, "specextend", "triforce", "accepted").prompts == 0


def test_an_answer_of_one_token_has_no_decoding_speed():
    panels = [
        panel({"specextend": answer(1, 0.0, ())}, sample=0),
        panel({"specextend": answer(9, 2.0)}, sample=1),
    ]
    assert row_of(panels)["speedup_decode"]["mean"] == 2.0
    alone = row_of(panels[:1])
    assert alone["speedup_decode"]["mean"] is None and alone["speedup_decode"]["total"] is None


def test_intervals_are_those_of_a_plain_bootstrap():
    values = np.random.default_rng(3).gamma(2.0, 1.0, 30)
    found = interval(values)
    drawn = np.random.default_rng(SEED).integers(0, 30, (RESAMPLES, 30))
    plain = np.percentile([values[one].mean() for one in drawn], [2.5, 97.5])
    assert (found.low, found.high) == pytest.approx(tuple(plain))
    scipys = stats.bootstrap((values,), np.mean, n_resamples=RESAMPLES, method="percentile", rng=1).confidence_interval
    assert (found.low, found.high) == pytest.approx(tuple(scipys), abs=0.02)
    assert interval(values) == found and found.mean == pytest.approx(values.mean())


def test_the_interval_of_totals_is_that_of_a_plain_bootstrap():
    seconds = np.random.default_rng(4).uniform(1, 5, 12)
    alone = np.random.default_rng(5).uniform(3, 9, 12)
    pairs = enumerate(zip(seconds, alone, strict=True))
    panels = [panel({"specextend": answer(9, own)}, sample=sample, ar_s=ar) for sample, (own, ar) in pairs]
    drawn = np.random.default_rng(SEED).integers(0, 12, (RESAMPLES, 12))
    plain = np.percentile(alone[drawn].sum(1) / seconds[drawn].sum(1), [2.5, 97.5])
    found = row_of(panels)["speedup_decode"]
    assert (found["total_low"], found["total_high"]) == pytest.approx(tuple(plain))


def test_a_journal_is_read_as_it_was_written_up_to_a_line_that_is_being_written(tmp_path):
    path, panels = tmp_path / "a.jsonl", [panel({"specextend": answer()}, sample=sample) for sample in range(2)]
    write_panels(path, panels)
    assert read_panels(path)[1] == panels
    path.write_bytes(path.read_bytes()[:-5])
    assert read_panels(path)[1] == panels[:1]
    path.write_text('{"setting": {"method": "standard"}}\n')
    with pytest.raises(InputError, match="is no journal of several arms"):
        read_panels(path)

"""What the report's sentences claim beyond their numbers holds in the records."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path

import pytest

from scripts.report import arms, beside, judgements, story
from scripts.report.evidence import journals_in
from specextend.evaluation.panel_figures import figures_of, paired_difference, pooled, read_panels

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results"
PUBLISHED = story.CHAPTERS[:2]
BUNDLED, TABLES, HEAD, INPUTS, LONG, HARD, PUBLISHED_CPU, CPU = story.CHAPTERS[2:]
LENGTHS = ("1K", "2K", "4K", "8K", "16K")


def rows_of(chapter):
    return rows_by_title(chapter.title)


@cache
def rows_by_title(title):
    chapter = next(one for one in story.CHAPTERS if one.title == title)
    _, panels = story.read_chapter(RESULTS, chapter)
    return panels, story.rows_of(chapter, panels)


@cache
def with_the_shortest():
    """The bundled pair at the size of 7B, 512 tokens with it."""
    _, panels = story._read(RESULTS, (story.SHORTEST, *BUNDLED.journals))
    return panels, pooled(figures_of(panels))


def speed(rows, arm, length, temperature):
    return judgements.row_of(rows, arm, length, temperature)["speedup_decode"]


@pytest.mark.parametrize("chapter", PUBLISHED, ids=lambda chapter: chapter.title)
def test_on_a_published_model_a_small_cache_mends_the_collapse_and_a_window_does_as_well(chapter):
    panels, rows = rows_of(chapter)
    assert judgements.kept(rows, arms.FULL, "8K", "512", 0.7) < 0.6
    assert 0.75 < judgements.kept(rows, arms.PAPERS, "8K", "512", 0.7) < 0.9  # "four fifths of it, not all"
    at = [one for one in panels if one.bucket == "8K" and one.temperature == 0.7]
    tie = paired_difference(at, arms.PAPERS, arms.WINDOW, "accepted")
    assert tie.low < 0 < tie.high
    for length in ("512", "1K", "2K", "4K", "8K"):
        others = (speed(rows, arm, length, 0.7)["mean"] for arm in (arms.FULL, arms.WINDOW, arms.PAPERS))
        assert speed(rows, arms.PRICED, length, 0.7)["mean"] > max(others)
    if chapter == PUBLISHED[0]:  # "Standard is slower than AR there"
        assert speed(rows, arms.STANDARD, "8K", 0.7)["high"] < 1


def test_at_the_size_of_7b_fast_attention_and_a_small_cache_mend_standard():
    _, rows = rows_of(BUNDLED)
    for temperature in (0.8, 0.0):
        for length in ("2K", "4K", "8K", "16K"):
            standard, full = (speed(rows, arm, length, temperature) for arm in (arms.STANDARD, arms.FULL))
            assert standard["high"] < full["low"] > 1
            if length == "2K":  # "level with AR"
                assert 0.95 < standard["mean"] < 1.1
            else:
                assert standard["high"] < 1
            kept = [
                judgements.row_of(rows, arm, length, temperature)["accepted"]["mean"]
                for arm in (arms.PAPERS, arms.FULL)
            ]
            assert kept[0] > (1.8 if length == "2K" else 2) * kept[1]
    _, rows = with_the_shortest()
    for length in ("512", *LENGTHS):
        greedy, sampled = (
            speed(rows, arms.PRICED, length, temperature)["mean"]
            / speed(rows, arms.PAPERS, length, temperature)["mean"]
            for temperature in (0.0, 0.8)
        )
        assert greedy > 1.5 and sampled > 1


def test_threats_name_how_many_prompts_there_are():
    apart = (HARD, LONG, INPUTS, TABLES)
    cells = [(chapter, row) for chapter in story.CHAPTERS if chapter not in apart for row in rows_of(chapter)[1]]
    counts = [row["prompts"] for chapter, row in cells if (chapter, row["length"]) != (CPU, "16K")]
    assert {row["prompts"] for chapter, row in cells if (chapter, row["length"]) == (CPU, "16K")} == {5}
    random, _ = hard()
    alone, rivals, sweep = (pooled(figures_of(read_panels(RESULTS / name)[1])) for name in TABLES.journals[:3])
    few = [{row["prompts"] for row in rows} for rows in (random, sweep, rows_of(LONG)[1], alone)]
    assert few == [{7, 9}, {7}, {4}, {4}]
    assert {row["prompts"] for row in [*rivals, *rows_of(INPUTS)[1]]} == {3, 4}
    said = f"{min(counts)} to {max(counts)} prompts per length from"
    assert any(said in point for point in story.THREATS) and f"{min(counts)} to" in story.NOT_REPRODUCED[0]


def test_what_is_said_of_the_bundled_head_counts_its_prompts():
    counts = {row["prompts"] for row in rows_of(HEAD)[1] if row["temperature"] == 0.8}
    assert f"({min(counts)} to {max(counts)} prompts per length)" in HEAD.judge(*rows_of(HEAD))


def test_priced_trees_are_level_with_the_best_fixed_tree_of_three_and_above_it_where_text_changes():
    panels, rows = with_the_shortest()
    best = set()
    for length in ("512", *LENGTHS):
        for temperature in (0.8, 0.0):
            assert all(judgements.over_fixed(rows, length, temperature, kind) > 0.95 for kind in ("mean", "total"))
            assert judgements.row_of(rows, arms.PRICED, length, temperature)["prompts"] >= (
                16 if length == "512" else 20
            )
            best.add(max(arms.FIXED, key=lambda arm: speed(rows, arm, length, temperature)["mean"]))  # noqa: B023
        fixed = max(judgements.alternating(panels, arm, length) for arm in arms.FIXED)
        assert judgements.alternating(panels, arms.PRICED, length) > fixed
    assert len(best) > 1  # "depends on text and temperature"


def test_all_parts_together_gain_more_than_the_parts_multiplied():
    panels, _ = rows_of(TABLES)
    rows = [line.strip("| ").split(" | ") for line in beside.beside_table_4(panels).splitlines()]
    for length in ("4K", "8K", "16K"):
        place = rows[0].index(length)
        reading, verifying, window, retrieval, together = (
            float(row[place].split("; ")[1].split()[0]) for row in rows[2:]
        )
        assert together > reading * verifying * max(window, retrieval)


def test_only_the_size_of_the_working_cache_matters():
    panels = [one for one in rows_of(TABLES)[0] if f"{arms.PAPERS},top_k=2" in one.arms]
    by_arm = {arm.removeprefix(f"{arms.PAPERS},"): beside.accepted(panels, arm) for arm in panels[0].arms}
    best = by_arm.pop("top_k=32")
    assert max(by_arm[f"top_k={chunks}"] for chunks in (2, 4, 8, 16, 64, 128, 256)) < 0.8 * best
    others = {arm: found for arm, found in by_arm.items() if not arm.startswith("top_k")}
    assert len(others) == 12 and all(abs(found / best - 1) < 0.07 for found in others.values())


def test_methods_that_draft_with_the_target_itself_do_not_gain():
    panels = [one for one in rows_of(TABLES)[0] if "magicdec" in one.arms]
    assert {panel.bucket for panel in panels} == set(LENGTHS) and len(panels) == 18
    for panel in panels:
        alone = panel.autoregressive.timing.decode_tokens_per_s
        speeds = {arm: answer.timing.decode_tokens_per_s / alone for arm, answer in panel.arms.items()}
        if panel.bucket == "16K":  # "until the context costs more"
            assert speeds["triforce"] < 0.35 and 1 < speeds["magicdec"] < 1.3 and speeds["autoregressive_hf"] < 0.3
            continue
        least = 0.95 if panel.bucket in ("1K", "8K") else 0.8  # where it rejects more, a step is paid for nothing
        assert speeds["triforce"] < 0.3 and least < speeds["magicdec"] < 1.05
        assert speeds["autoregressive_hf"] < 0.25  # "nearly all is won before anything is speculated"


def test_standard_reads_a_prompt_as_fast_as_transformers_does_eagerly():
    rows = json.loads((RESULTS / "h200" / "bench.json").read_text())["prefill"]
    for row in rows:
        if row["tokens"] >= 4000:
            assert row["standard_s"] < 1.1 * row["hugging_face_eager_s"]


def test_in_long_answers_a_full_cache_loses_what_a_small_one_keeps():
    panels, rows = rows_of(LONG)
    full, small, priced = (
        [float(mean) for mean in re.findall(r"\d+\.\d\d", said)] for said in judgements.by_output(panels).split("; ")
    )
    assert full[-1] < 0.65 * full[0] and small[-1] > 1.3 * small[0] and priced[-1] > priced[0]
    assert max(row["loops"] for row in rows) > 0.5  # "most of these answers end in a loop"


def test_beyond_16k_a_small_cache_keeps_what_a_full_one_loses():
    panels, rows = rows_of(INPUTS)
    for length in ("32K", "128K"):
        at = [one for one in panels if (one.bucket, one.temperature) == (length, 0.8)]
        assert beside.accepted(at, arms.PAPERS) > 3 * beside.accepted(at, arms.FULL)
        assert speed(rows, arms.PAPERS, length, 0.8)["low"] > 1
    assert speed(rows, arms.FULL, "128K", 0.8)["high"] < 1  # "slower than AR"
    assert {row["loops"] for row in rows if row["temperature"] == 0} == {1.0}  # "every answer ends in a loop"
    record = json.loads((ROOT / "specextend/models/bundled_128k/training_record.json").read_text())
    assert record["longer"]["training"]["budget_s"] == 240  # "four minutes"
    assert record["settings"]["long_context"] // 16384 == 8  # "eight times its positions"


def test_a_model_that_was_measured_before_it_had_a_name_has_it_in_titles():
    manifest, panels = story.read_chapter(RESULTS, INPUTS)
    assert story._about(manifest, panels).startswith("bundled_128k widened to llama31_8b with bundled/eagle3 widened")


def test_a_head_loses_less_with_a_full_cache_than_a_small_model():
    lost = []
    for chapter, short in ((HEAD, "1K"), (BUNDLED, "1K")):
        _, rows = rows_of(chapter)
        lost.append(judgements.kept(rows, arms.FULL, "16K", short, 0.8))
        assert judgements.kept(rows, arms.PAPERS, "16K", short, 0.8) > 1.3 * lost[-1]
    assert lost[0] > lost[1]


@cache
def hard():
    """Figures with a random draft, and of short answers."""
    return [pooled(figures_of(read_panels(RESULTS / journal)[1])) for journal in HARD.journals]


def test_where_the_draft_knows_nothing_priced_trees_stop_drafting():
    random, short = hard()
    for length in ("1K", "8K"):
        fixed, priced, full = (
            judgements.row_of(random, arm, length, 0.8)["speedup_decode"]
            for arm in (arms.PAPERS, arms.PRICED, arms.FULL_PRICED)
        )
        assert fixed["mean"] < 1 < priced["mean"] and full["mean"] > 0.975
        assert min(priced["smallest"], full["smallest"]) > 0.95
    assert all(row["speedup_decode"]["low"] > 1 for row in short)


def test_on_two_cores_the_published_model_gains_and_writes_what_autoregressive_decoding_writes():
    panels, rows = rows_of(PUBLISHED_CPU)
    assert all(answer.equal_to_autoregressive for panel in panels for answer in panel.arms.values())
    for temperature in (0.7, 0.0):
        assert all(speed(rows, arms.PRICED, length, temperature)["low"] > 1 for length in ("512", "2K", "4K"))
        # "more than its trees earn"
        assert judgements.row_of(rows, "standard:tree=price", "2K", temperature)["speedup"]["high"] < 1


def test_on_two_cores_a_fixed_tree_is_slower_than_autoregressive_decoding_when_sampled_and_a_priced_one_is_not():
    panels, rows = rows_of(CPU)
    assert all(answer.equal_to_autoregressive for panel in panels for answer in panel.arms.values())
    first = pooled(figures_of(story._read(RESULTS, CPU.again)[1]))
    for row in [*rows, *first]:
        if row["temperature"] == 0.8:
            found = row["speedup_decode"]
            if row["arm"] == arms.PRICED:
                assert found["high"] > 1 and found["mean"] > 0.97
            else:
                assert found["mean"] < 1 or row["length"] == "16K"  # "up to 8K"


def test_every_journal_of_several_arms_has_a_page_that_the_report_leads_to():
    report = (RESULTS / "REPORT.md").read_text()
    pages = [f"tables/{path.stem}.md" for path in journals_in([RESULTS])]
    assert len(pages) > 10 and all(f"({page})" in report and (RESULTS / page).exists() for page in pages)


def test_results_without_these_journals_have_no_story(tmp_path):
    assert not list(story.sections(tmp_path)) and not list(story.headlines(tmp_path))
    assert not story.pages_apart(tmp_path)


def test_what_is_said_of_the_heads_is_in_the_record_of_their_training():
    record = json.loads((ROOT / "specextend/models/heads/smollm2/training_record.json").read_text())
    first, third = (record[head]["training"]["validation"][-1]["same_argmax_1"] for head in ("eagle1", "eagle3"))
    report = " ".join((RESULTS / "REPORT.md").read_text().split())
    assert f"agree with their target on {first:.2f} (EAGLE-1) and {third:.2f} (EAGLE-3) of its own text" in report

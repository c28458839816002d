"""What the report's sentences claim beyond their numbers holds in the records."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts.report import story
from specextend.evaluation.panel_figures import figures_of, paired_difference, pooled

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results"
PUBLISHED, BUNDLED, CPU = story.CHAPTERS[:2], story.CHAPTERS[2], story.CHAPTERS[3]


def rows_of(chapter):
    _, panels = story.read_chapter(RESULTS, chapter)
    return panels, pooled(figures_of(panels))


def speed(rows, arm, length, temperature):
    return story._row(rows, arm, length, temperature)["speedup_decode"]


@pytest.mark.parametrize("chapter", PUBLISHED, ids=lambda chapter: chapter.title)
def test_on_a_published_model_a_small_cache_mends_the_collapse_and_a_window_does_as_well(chapter):
    panels, rows = rows_of(chapter)
    assert story.kept(rows, story.FULL, "8K", "512", 0.7) < 0.6
    assert 0.75 < story.kept(rows, story.PAPERS, "8K", "512", 0.7) < 0.9  # "four fifths of it, not all"
    tie = paired_difference([one for one in panels if one.bucket == "8K"], story.PAPERS, story.WINDOW, "accepted")
    assert tie.low < 0 < tie.high
    for length in ("512", "2K", "4K", "8K"):
        others = (speed(rows, arm, length, 0.7)["mean"] for arm in (story.FULL, story.WINDOW, story.PAPERS))
        assert speed(rows, story.PRICED, length, 0.7)["mean"] > max(others)


def test_at_the_size_of_7b_fast_attention_and_a_small_cache_mend_standard():
    _, rows = rows_of(BUNDLED)
    for temperature in (0.8, 0.0):
        assert (
            speed(rows, "standard", "4K", temperature)["high"] < 1 < speed(rows, story.FULL, "4K", temperature)["low"]
        )
        full, ours = (
            story._row(rows, arm, "4K", temperature)["accepted"]["mean"] for arm in (story.FULL, story.PAPERS)
        )
        assert ours > 2 * full
    for length in ("1K", "4K", "16K"):
        greedy, sampled = (
            speed(rows, story.PRICED, length, temperature)["mean"]
            / speed(rows, story.PAPERS, length, temperature)["mean"]
            for temperature in (0.0, 0.8)
        )
        assert greedy > 1.5 and sampled > 0.98


def test_on_two_cores_a_fixed_tree_is_slower_than_autoregressive_decoding_when_sampled():
    _, rows = rows_of(CPU)
    sampled = [row for row in rows if row["temperature"] == 0.8]
    for row in sampled:
        assert (row["speedup_decode"]["mean"] > 1) == (row["arm"] == story.PRICED)


def test_results_without_these_journals_have_no_story(tmp_path):
    assert not list(story.sections(tmp_path)) and not list(story.headlines(tmp_path))


def test_what_is_said_of_the_heads_is_in_the_record_of_their_training():
    record = json.loads((ROOT / "specextend/models/heads/smollm2/training_record.json").read_text())
    first, third = (record[head]["training"]["validation"][-1]["same_argmax_1"] for head in ("eagle1", "eagle3"))
    report = " ".join((RESULTS / "REPORT.md").read_text().split())
    assert f"agree with their target on {first:.2f} (EAGLE-1) and {third:.2f} (EAGLE-3) of its own text" in report

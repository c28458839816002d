"""The analyses (scripts/analyse.py) on the bundled pair in small: they watch the loop, and what they say adds up."""

from __future__ import annotations

import json

import analyse
import matplotlib.pyplot as plt
import pytest
import torch
from beside_paper import analysis_tables
from plot_analyses import analysis_figures
from records import Records


@pytest.fixture(scope="module")
def content(bundled_engine, tmp_path_factory) -> dict:
    """The file of all parts, with a few settings each."""
    path = tmp_path_factory.mktemp("analysis") / "analysis.json"
    with pytest.MonkeyPatch.context() as patch:
        small = {"READ": 8, "REPEATS": 2, "SIZES": (64, 1024), "CHUNKS": (32,), "PERIODS": (1, 4)}
        for name, value in small.items():
            patch.setattr(analyse, name, value)
        records = Records(path, analyse.model_setting(bundled_engine) | {"data": "builtin"})
        study = analyse.Study(bundled_engine, records, analyse.Texts(bundled_engine, None), ["128", "512"], 1, 16)
        with torch.inference_mode():
            for part in analyse.PARTS.values():
                part(study)
    return json.loads(path.read_text())


def records_of(content: dict, part: str) -> list[dict]:
    return [record for record in content["records"] if record["part"] == part]


def test_watched_loop_writes_what_the_engine_writes(bundled_engine):
    prompt = bundled_engine.encode("The council met on the first day of May and decided to")
    expected = bundled_engine.generate(prompt, 40)
    with torch.inference_mode():
        steps = list(analyse.watch(bundled_engine, prompt, 39))
    tokens = [int(step.tree.tokens[0]) for step in steps[:1]]
    for step in steps:
        tokens += step.logits.argmax(-1)[step.path].tolist()
    assert tokens[:40] == expected.token_ids
    assert [len(step.path) - 1 for step in steps][: len(expected.rounds) - 1] == [
        one.accepted for one in expected.rounds[:-1]
    ]
    assert steps[0].positions is not None and steps[1].positions is None


def test_draft_caches_that_hold_everything_agree_and_the_target_agrees_with_itself(content):
    for record in records_of(content, "divergence"):
        assert record["full"]["kl"] == pytest.approx(record["cmr"]["kl"], abs=1e-3) and record["cmr"]["kl"] > 0.01
        assert record["target_retrieval"]["kl"] == pytest.approx(0, abs=1e-4)
        assert record["target_retrieval"]["same_argmax"] == 1


def test_every_output_token_has_its_entropy_and_is_a_draft_or_the_targets_own(content):
    found = records_of(content, "entropy")
    assert {record["method"] for record in found} == {"standard", "fa_hta_streaming", "specextend"}
    for record in found:
        assert len(record["entropy"]) == len(record["accepted"]) >= 16 and min(record["entropy"]) >= 0
        assert record["accepted"][-1] == 0 and set(record["accepted"]) <= {0, 1}


def test_parts_become_tables_and_figures(content):
    (chunks,) = records_of(content, "chunks")
    assert chunks["chosen"][0] == list(range(16)) and len(chunks["chosen"]) == len(chunks["round"])
    assert len(records_of(content, "sweep")) == 5 and len(records_of(content, "refresh")) == 2
    for record in records_of(content, "equation1"):
        assert record["predicted"] > 0 and record["measured"] > 0 and record["tokens_per_round"] >= 1
    tables = analysis_tables(content)
    assert sum(table.startswith("| ") for table in tables) == 7
    drawn = dict(analysis_figures(content))
    assert set(drawn) == {"divergence", "entropy", "chunks", "sweep", "equation1"}
    for figure in drawn.values():
        plt.close(figure)

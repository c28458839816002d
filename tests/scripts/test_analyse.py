"""The analyses (scripts.analysis.analyse): what they say of rounds adds up, and every part has its table and figure."""

from __future__ import annotations

import json
import sys

import matplotlib.pyplot as plt
import pytest
import torch

from scripts.analysis import analyse
from scripts.analysis.rounds import (
    Watcher,
    chosen_chunks,
    mean_depth,
    middle_tree,
    predicted_speedup,
    token_entropies,
)
from scripts.report.analysis_plots import analysis_figures
from scripts.report.paper import analysis_tables
from specextend.cli import flags
from specextend.trees.tree import DraftTree


def seen(watcher: Watcher, sizes: list[int], logits: torch.Tensor, paths: list[list[int]]) -> None:
    """Chains of `sizes` nodes as an engine tells of them; every buffer is used again, as captured rounds do."""
    for size, path in zip(sizes, paths, strict=True):
        tree = DraftTree.chain(torch.arange(size))
        watcher.drafted(tree)
        watcher.verified(tree, logits[:size])
        watcher.accepted(torch.tensor(path))
        tree.tokens.zero_()
    logits.zero_()


def test_a_watcher_keeps_what_a_round_showed_after_its_buffers_are_used_again():
    watcher, positions = Watcher(), torch.tensor([0, 1, 8, 9, 10])
    watcher.refreshed(0, positions, 40)
    seen(watcher, [3, 5, 2], torch.eye(5, 7) * 50, [[0, 1, 2], [0, 1], [0]])
    positions.zero_()
    assert [len(one.tree) for one in watcher.rounds] == [3, 5, 2]
    assert watcher.rounds[1].tree.tokens.tolist() == [0, 1, 2, 3, 4]
    assert watcher.rounds[0].logits.argmax(-1).tolist() == [0, 1, 2]
    assert watcher.rounds[1].refresh is None
    assert chosen_chunks(watcher.rounds, 4) == {"chunk_size": 4, "round": [0], "context": [40], "chosen": [[0, 2]]}
    assert len(middle_tree(watcher.rounds)) == 3 and mean_depth(watcher.rounds) == pytest.approx((2 + 4 + 1) / 3)


def test_every_output_token_has_its_entropy_and_is_a_draft_or_the_targets_own():
    watcher, logits = Watcher(), torch.zeros(3, 8)
    logits[1, 2] = 100.0  # the target is sure of one token and knows nothing of the others
    seen(watcher, [3, 1], logits, [[0, 1], [0]])
    found = token_entropies(watcher.rounds)
    assert found["accepted"] == [1, 0, 0]
    assert found["entropy"] == pytest.approx([2.0794, 0.0, 2.0794], abs=1e-3)


def test_equation_1_predicts_no_gain_where_a_round_costs_what_its_tokens_cost():
    assert predicted_speedup(3.0, 2, draft_ms=5.0, verify_ms=20.0, target_ms=10.0) == pytest.approx(1.0)
    assert predicted_speedup(6.0, 0, draft_ms=5.0, verify_ms=10.0, target_ms=10.0) == pytest.approx(6.0)


def test_distributions_that_agree_have_no_divergence():
    target = torch.randn(4, 9)
    found = analyse.compare(dict.fromkeys(analyse.CACHES, target) | {"streaming": -target})
    assert found["cmr"] == pytest.approx({"kl": 0, "overlap": 1, "same_argmax": 1}, abs=1e-5)
    assert found["streaming"]["kl"] > 0.1 and found["streaming"]["overlap"] < 0.9


@pytest.mark.parametrize(
    "arguments, message",
    [("-n 0", "0 is not a whole number"), ("-max x", "x is not a whole"), ("--lengths 32K", "holds 16384 positions")],
)
def test_mistakes_are_one_line_and_nothing_is_measured(arguments, message, monkeypatch, capsys, tmp_path):
    file = tmp_path / "analysis.json"
    monkeypatch.setattr(sys, "argv", ["analyse", "--output_file", str(file), *arguments.split()])
    with pytest.raises(SystemExit) as exit_:
        flags.run(analyse.main)
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and message in error and error.count("\n") == 1 and not file.exists()


@pytest.fixture(scope="module")
def content(bundled_engine, tmp_path_factory) -> dict:
    """The file of all parts, with a few settings each."""
    pytest.importorskip("specextend.decoding.observer")
    path = tmp_path_factory.mktemp("analysis") / "analysis.json"
    with pytest.MonkeyPatch.context() as patch:
        small = {"READ": 8, "SIZES": (64, 1024), "CHUNKS": (32,), "PERIODS": (1, 4)}
        for name, value in small.items():
            patch.setattr(analyse, name, value)
        store = analyse.Store(path, analyse.model_setting(bundled_engine) | {"data": "builtin"})
        study = analyse.Study(bundled_engine, store, analyse.Texts(bundled_engine, None), ["128", "512"], 1, 16)
        with torch.inference_mode():
            for part in analyse.PARTS.values():
                part(study)
    return json.loads(path.read_text())


def test_parts_become_tables_and_figures(content):
    def of(part: str) -> list[dict]:
        return [record for record in content["records"] if record["part"] == part]

    for record in of("divergence"):  # a short context is whole in every cache
        assert record["full"]["kl"] == pytest.approx(record["cmr"]["kl"], abs=1e-3) and record["cmr"]["kl"] > 0.01
        assert record["target_retrieval"]["kl"] == pytest.approx(0, abs=1e-4)
    for record in of("entropy"):
        assert len(record["entropy"]) == len(record["accepted"]) >= 15 and record["accepted"][-1] == 0
    (chunks,) = of("chunks")
    assert chunks["chosen"][0] == list(range(16)) and len(chunks["chosen"]) == len(chunks["round"])
    assert len(of("sweep")) == 5 and len(of("refresh")) == 2
    for record in of("equation1"):
        assert record["predicted"] > 0 and record["measured"] > 0 and record["tokens_per_round"] >= 1
    assert sum(table.startswith("| ") for table in analysis_tables(content)) == 7
    drawn = dict(analysis_figures(content))
    assert set(drawn) == {"divergence", "entropy", "chunks", "sweep", "equation1"}
    for figure in drawn.values():
        plt.close(figure)

"""scripts.analysis.race: the README's race is recorded, and drawn from the record alone."""

from __future__ import annotations

import json
import sys

import pytest

from scripts.analysis import race as record_race
from scripts.report.race_svg import race_svg
from specextend.cli import flags as cli
from specextend.race.record import Race


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """run(*flags): (status, stdout, stderr), files going to `tmp_path`."""

    def call(*flags: str):
        files = ["--output_file", str(tmp_path / "race.json"), "--figure", str(tmp_path / "race.svg")]
        monkeypatch.setattr(sys, "argv", ["race.py", *files, *flags])
        status = 0
        try:
            cli.run(record_race.main)
        except SystemExit as exit_:
            status = exit_.code
        return status, *capsys.readouterr()

    return call


def test_median_race_is_kept_and_drawn(run, tmp_path):
    status, out, _ = run("--input_len", "200", "-max", "6", "-r", "3")
    content = json.loads((tmp_path / "race.json").read_text())
    race = Race.from_dict(content["race"])
    total = [sum(times) for times in content["races_total_s"]]
    assert status == 0 and len(total) == 3
    assert sum(lane.total_s for lane in race.lanes) == pytest.approx(sorted(total)[1], abs=1e-3)
    assert (race.prompt_tokens, race.differs_at, race.model) == (200, None, "bundled")
    assert (tmp_path / "race.svg").read_text() == race_svg(race, content["environment"])
    assert json.loads(out)["differs_at"] is None
    drawn = (tmp_path / "race.svg").read_text()
    (tmp_path / "race.svg").unlink()
    assert run("--draw_only")[0] == 0 and (tmp_path / "race.svg").read_text() == drawn


@pytest.mark.parametrize("flags, message", [("--draw_only", "does not exist"), ("-r 0", "0 is not a whole number")])
def test_mistake_gives_one_line_and_status_2(flags, message, run):
    status, _, error = run(*flags.split())
    assert status == 2 and message in error and error.count("\n") == 1

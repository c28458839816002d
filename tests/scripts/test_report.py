"""Tables and figures out of journals: what is compared with what, and what damaged files do."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
from made_records import record, timing, write_journal, write_results

from scripts.report import plots, tables
from scripts.report.records import figures_of, leads, read_records, shared
from specextend.errors import InputError
from specextend.evaluation.records import SampleRecord, Worker


@pytest.fixture
def run(monkeypatch, capsys):
    """run(module, *flags): what its `main` prints on stdout and on stderr."""

    def call(module, *arguments: str | Path) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["x", *map(str, arguments)])
        with plt.rc_context():
            module.main()
        return capsys.readouterr()

    return call


@pytest.fixture
def results(tmp_path) -> Path:
    folder = tmp_path / "results"
    for data in ("govreport", "pg19"):
        for temperature in (0.0, 0.8):
            for method, gain in (("standard", 2.0), ("specextend", 3.0)):
                path = folder / "cpu" / f"{data}_t{temperature:g}_{method}.jsonl"
                write_results(path, method, gain, data=data, temperature=temperature)
    (folder / "schema.json").write_text("{}")
    return folder


@pytest.fixture
def unequal(tmp_path) -> Path:
    """Standard has answered prompts 0 and 1, SpecExtend 0 to 2, the window 1 and 2; prompt 2 is the easy one."""

    def measured(sample: int, accepted: int, decode_s: float) -> SampleRecord:
        times = {"method": timing(257, 1.0, decode_s), "autoregressive": timing(257, 1.0, 8.0)}
        changes = {"prompt_tokens": 16000 + 100 * sample, "accepted": [accepted] * 10, **times}
        return record("16K", sample, **changes)

    folder = tmp_path / "cpu" / "cpu_tree"
    write_journal(folder / "standard.jsonl", "standard", [measured(0, 1, 16.0), measured(1, 2, 8.0)])
    ours = [measured(0, 3, 4.0), measured(1, 4, 4.0), measured(2, 9, 0.5)]
    write_journal(folder / "specextend.jsonl", "specextend", ours)
    write_journal(folder / "window.jsonl", "fa_hta_streaming", [measured(1, 2, 2.0), measured(2, 9, 1.0)])
    return tmp_path


def pages_of(results: Path) -> str:
    """The pages of the folders, one after the other."""
    return "".join(path.read_text() for path in sorted((results / "tables").glob("*.md")))


def cells_of(report: str, begin: str) -> list[list[str]]:
    lines = [line for line in report.splitlines() if line.startswith(begin)]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def test_standard_and_specextend_stand_side_by_side(results, tmp_path, run):
    write_results(results / "cpu" / "stream.jsonl", "flash-hta-streaming", 2.5, lengths=("1K",))
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- results:begin -->\nstale text\n<!-- results:end -->\nafter\n")
    out, _ = run(tables, "--results", results, "--readme", readme)
    assert len(json.loads(out)["files"]) == 9
    report = pages_of(results)
    assert re.findall(r"^### .*", report, re.M) == [
        f"### {data}, temperature {temperature}" for data in ("govreport", "pg19") for temperature in ("0", "0.8")
    ]
    rows = cells_of(report, "| 16K | 8,000 |")
    # accepted 2, 3, ratio 1.5; AR decodes 3 * 256 tokens in 27 s
    assert len(rows) == 4 and rows[0][:5] == ["16K", "8,000", "2.00", "3.00", "1.50"] and rows[0][7] == "28.4"
    assert rows[0][10:13] == ["2.00", "3.00", "1.50"] and rows[0][-2:] == ["3/3", "3/3"]
    assert re.search(r"^\| flash-hta-streaming \|[ |]*2\.50 \|", report, re.M)
    assert "| 16K | 1.59 → 3.07 | 2.00 → 3.00 |" in report  # the paper's
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("<!-- results:end -->\nafter\n") and "stale" not in text
    assert re.search(r"^\| govreport, 16K \| 2\.00 → 3\.00 \| 2\.00 → 3\.00 \|$", text, re.M)
    run(tables, "--results", results, "--readme", readme)
    assert readme.read_text() == text


def test_speeds_of_different_worker_counts_are_never_together(tmp_path, run):
    write_results(tmp_path / "standard.jsonl", "standard", 2.0)
    write_results(tmp_path / "specextend.jsonl", "specextend", 3.0, workers=(2,))
    write_results(tmp_path / "mixed.jsonl", "triforce", 4.0, workers=(2, 1))
    run(tables, "--results", tmp_path)
    one, mixed, two = (part.splitlines() for part in pages_of(tmp_path).split("\n## ")[1:])
    assert "workers" not in one[0] and ", 2 workers per host; " in two[0]
    assert ", 1 or 2 workers per host (speeds do not compare); tree" in mixed[0]
    (cells,) = cells_of("\n".join(one), "| 16K | 8,000")
    assert "2.00" in cells and "3.00" not in cells
    assert any("4.00" in line for line in mixed) and not any(re.search(r"\d\.\d\d \(", line) for line in mixed)


def test_gaps_are_left_for_what_was_not_measured_and_lengths_are_in_order(tmp_path, run):
    write_results(tmp_path / "a.jsonl", "specextend", 3.0, lengths=("16K", "512", "4K"))
    write_results(tmp_path / "b.jsonl", "standard", 2.0, lengths=("512",))
    run(tables, "--results", tmp_path)
    report = pages_of(tmp_path)
    assert "nan" not in report and "(, )" not in report
    assert [row[0] for row in cells_of(report, "| ") if row[-1] == "3/3"] == ["512", "4K", "16K"]
    assert cells_of(report, "| 16K")[0][2:5] == ["", "3.00", ""]


def test_the_file_is_named_where_two_share_a_method(tmp_path, run):
    write_results(tmp_path / "a.jsonl", "specextend", 3.0)
    write_results(tmp_path / "b.jsonl", "specextend", 2.0)
    run(tables, "--results", tmp_path)
    assert "specextend (b.jsonl)" in pages_of(tmp_path)


def test_a_damaged_file_is_named_in_one_line_and_left_out(results, run):
    path = results / "cpu" / "pg19_t0_standard.jsonl"
    whole = path.read_text().splitlines(keepends=True)
    for damage in ("{", "[1]\n", "".join(whole[:2]) + '{"bucket": 3}\n', whole[0] + whole[1].replace("1.0", '"x"')):
        path.write_text(damage if damage != "{" else "{\n")
        _, error = run(tables, "--results", results)
        assert error.count("\n") == 1 and str(path) in error and "damaged" in error, damage
    assert "| 3.00 |" in pages_of(results)
    path.write_text("".join(whole) + whole[-1][:50])  # cut off by a kill: the rest counts
    for name in ("needle.json", "bench.json", "summary.json", "analysis.json"):
        (results / "cpu" / name).write_text('{"records": [{"part": "entropy"}], "steps": [{}]}')
    assert run(tables, "--results", results)[1].count("\n") == 3  # the summary is none of its files
    assert run(plots, "--results", results)[1].count("\n") == 2
    with pytest.raises(InputError, match="no records of eval_classic.py"):
        run(tables, "--results", results / "nowhere")


def test_a_readme_without_markers_is_left_alone_and_nothing_written(results, tmp_path, run):
    readme = tmp_path / "README.md"
    readme.write_text("no markers")
    with pytest.raises(InputError, match="results:begin"):
        run(tables, "--results", results, "--readme", readme)
    assert readme.read_text() == "no markers" and not (results / "REPORT.md").exists()


def test_tables_compare_the_prompts_that_both_files_hold(unequal, tmp_path, run):
    readme = tmp_path / "README.md"
    readme.write_text("<!-- results:begin -->\n<!-- results:end -->\n")
    run(tables, "--results", unequal, "--readme", readme)
    report = pages_of(unequal)
    (cells,) = cells_of(report, "| 16K | 16,050 |")
    # prompts 0 and 1: accepted 1.5 and 3.5; 512 tokens in 24 s and 8 s where AR takes 16 s
    assert cells[2:5] == ["1.50", "3.50", "2.33"] and cells[7:13] == ["32.0", "21.3", "64.0", "0.67", "2.00", "3.00"]
    assert cells[-2:] == ["2/2", "2/2"]
    assert "| 16K | 1.59 → 3.07 | 1.50 → 3.50 | 1.38 → 2.82 | 0.69 → 1.80 |" in report
    assert "| specextend | 5.33 |" in report  # alone, over all that it has answered
    # on prompts 1 and 2 the window takes 3 s, SpecExtend 4.5 s; on prompts 0 and 1 standard takes thrice SpecExtend's
    assert "at 16K: fa_hta_streaming, fa_hta_streaming." in report
    text = readme.read_text()
    assert "| govreport, 16K | 1.50 → 3.50 |" in text and "| govreport, 16K | 0.67 → 2.00 |" in text
    assert "2 prompts per length" in text


def test_plots_compare_the_prompts_that_both_files_hold(unequal, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "draw_accepted", lambda _, rows: drawn.append(rows.set_index("method")))
    records = read_records(unequal)
    plots.panels(records[records["method"].isin(plots.PAIR)], plots.draw_accepted, title="", label="")
    assert drawn[0]["avg_accept_length"].to_dict() == {"standard": 1.5, "specextend": 3.5}
    assert drawn[0]["spread.avg_accept_length.p90"]["specextend"] == pytest.approx(3.9)


def test_prompts_that_differ_are_not_shared(tmp_path):
    write_journal(tmp_path / "a.jsonl", "standard", [record(), record(sample=1)])
    write_journal(tmp_path / "b.jsonl", "specextend", [record(), record(sample=1, prompt_sha256="another")])
    assert figures_of(shared(read_records(tmp_path)))["samples"].tolist() == [1, 1]
    write_journal(tmp_path / "c" / "a.jsonl", "standard", [record()])
    write_journal(tmp_path / "c" / "b.jsonl", "specextend", [record(prompt_sha256="another")])
    records = read_records(tmp_path / "c")
    assert shared(records).empty and figures_of(shared(records)).empty and leads(records).empty


def test_speeds_of_unlike_workers_are_in_no_lead(tmp_path):
    for name in ("standard", "specextend"):
        alike = [record(sample=n, worker=Worker(0, "host", 1, n + 1, "cpu")) for n in range(2)]
        write_journal(tmp_path / f"{name}.jsonl", name, alike)
    found = leads(read_records(tmp_path)).loc[("specextend", "standard", "1K")]
    assert found["avg_accept_length"] == 1 and found["speedup"] != found["speedup"]


def test_plots_are_drawn_for_every_setting_and_do_not_change_with_the_date(tmp_path, run):
    write_results(tmp_path / "standard.jsonl", "standard", 2.0, lengths=("512",))
    write_results(tmp_path / "specextend.jsonl", "specextend", 3.0)
    written = [Path(path) for path in json.loads(run(plots, "--results", tmp_path)[0])["written"]]
    assert sorted(path.suffix for path in written) == [".png"] * 3 + [".svg"] * 3  # stages, too
    assert all(path.parent == tmp_path / "figures" and path.stat().st_size > 5000 for path in written)
    run(tables, "--results", tmp_path, "--html")
    page = (tmp_path / "REPORT.html").read_text()
    assert page.count("<img") == 3 and ">2.00</td>" in page and "<h1>Results</h1>" in page and "| " not in page
    before = {path: path.read_bytes() for path in written}
    run(plots, "--results", tmp_path)
    assert {path: path.read_bytes() for path in written} == before

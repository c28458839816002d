"""Pages and figures of arms beside each other, from journals made by hand."""

import json

import matplotlib.pyplot as plt
import pytest
from made_records import answer, panel, panel_manifest, record, write_journal, write_panels

from scripts.report import evidence
from scripts.report.evidence_plots import by_length, evidence_figures
from scripts.report.records import read_records
from scripts.report.style import BLUE, ORANGE, styles_of
from specextend.errors import ConfigError, InputError
from specextend.evaluation.panel_figures import figures_of

ARMS = ("standard", "specextend", "specextend:tree=price", "autoregressive_hf")


def panels(loops: bool = False) -> list:
    return [
        panel(
            {
                "standard": answer(9, 2.0 + 0.1 * sample, (1, 1)),
                "specextend": answer(9, 1.0, (3, 3), loops=loops and not sample),
                "specextend:tree=price": answer(9, 0.8, (2, 2), price=30.0, plain_share=0.25),
                "autoregressive_hf": answer(9, 8.0, (0, 0)),
            },
            data=data, bucket=bucket, sample=sample, temperature=temperature,
            gpu={"sm_mhz": 1980.0, "memory_mhz": 2619.0, "power_w": 400.0} if not sample else None,
        )
        for data in ("govreport", "pg19")
        for bucket in ("4K", "512", "16K")
        for sample in range(3)
        for temperature in (0.0, 0.7)
    ]  # fmt: skip


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """run(*words): the script's last line."""

    def call(*words) -> dict:
        monkeypatch.setattr("sys.argv", ["evidence", *map(str, words)])
        monkeypatch.chdir(tmp_path)
        evidence.main()
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return call


def table_below(page: str, title: str) -> list[list[str]]:
    """The first table behind `title`, its rows as cells."""
    block = page.split(f"{title}:\n\n", 1)[1].split("\n\n", 1)[0]
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in block.splitlines()]


def test_a_page_has_lengths_in_order_arms_as_columns_and_no_empty_cell(run, tmp_path):
    write_panels(tmp_path / "h100.jsonl", panels())
    assert run("h100.jsonl", "--output", "tables/page.md") == {"written": ["tables/page.md"]}
    page = (tmp_path / "tables" / "page.md").read_text()
    head, _, *rows = table_below(page, "Decoding speed-up")
    assert head == ["length", "prompts", *(f"`{arm}`" for arm in ARMS)]
    assert [row[:2] for row in rows] == [["512", "6"], ["4K", "6"], ["16K", "6"]]
    assert rows[0][3] == "4.00 [4.00, 4.00]" and rows[0][5] == "0.50 [0.50, 0.50]"
    head, _, *rows = table_below(page, "Accepted draft tokens per round (of all rounds together)")
    assert head[2:] == [f"`{arm}`" for arm in ARMS[:3]] and rows[0][3] == "3.00 [3.00, 3.00] (3.00)"
    head, _, *rows = table_below(page, "Decoding rate over that of `standard`, mean of the prompts' own ratios")
    assert rows[2][2] == "2.10 [2.03, 2.17]"
    head, _, *rows = table_below(page, "Share of rounds without speculation")
    assert (head[2:], rows[0][2:]) == ([f"`{ARMS[2]}`"], ["25%"])
    _, _, *rows = table_below(page, "By data set: decoding speed-up; accepted")
    assert [row[0] for row in rows][:3] == ["512 govreport", "512 pg19", "4K govreport"]
    assert "GPU clocks 1980 to 1980 MHz, memory 2619 MHz" in page and "Fewer than 20 prompts: 512, 4K, 16K." in page
    assert page.index("## Temperature 0.7") < page.index("## Temperature 0\n")
    assert "| |" not in page and "nan" not in page.lower() and "loops" not in page


def test_a_page_shows_what_is_left_without_looping_answers(run, tmp_path):
    write_panels(tmp_path / "a.jsonl", panels(loops=True))
    run("a.jsonl", "--output", "a.md")
    page = (tmp_path / "a.md").read_text()
    assert table_below(page, "Answers that loop; distinct 4-grams")[2][3] == "33%; 1.00"
    rows = table_below(page, "Without prompts on which an answer loops: decoding speed-up; accepted")
    assert rows[2][:2] == ["512", "4"]


def test_a_page_says_how_close_the_choice_was_where_answers_part(run, tmp_path):
    parted = [
        panel({"specextend": answer(first_difference=4 if sample else None, gap=sample / 128 or None)}, sample=sample)
        for sample in range(3)
    ]
    write_panels(tmp_path / "a.jsonl", parted)
    run("a.jsonl", "--output", "a.md")
    page = (tmp_path / "a.md").read_text()
    assert "2.00; 1 of 3" in page and "scores the two tokens 0.0156 apart at most" in page


def test_check_tells_a_page_that_is_out_of_date(run, tmp_path, capsys):
    write_panels(tmp_path / "runs" / "a.jsonl", panels())
    write_journal(tmp_path / "runs" / "b.jsonl", "standard", [record()])  # of one method: not its business
    for state, status, stale in (("missing", 1, 1), ("written", 0, 0), ("changed", 1, 1)):
        if state == "written":
            assert run("runs") == {"written": ["results/tables/a.md"]}
        if state == "changed":
            page = tmp_path / "results/tables/a.md"
            page.write_text(page.read_text().replace("4.00", "4.01", 1))
        with pytest.raises(SystemExit) as ended:
            run("runs", "--check")
        assert ended.value.code == status and len(json.loads(capsys.readouterr().out)["stale"]) == stale


def test_journals_of_one_name_have_pages_of_their_own(run, tmp_path):
    for place in ("cpu/arms", "gpu/arms", "gpu/b"):
        write_panels(tmp_path / f"{place}.jsonl", panels()[:2])
    assert run("cpu", "gpu", "--output", "pages") == {
        "written": ["pages/cpu_arms.md", "pages/gpu_arms.md", "pages/b.md"]
    }


def test_what_cannot_be_read_is_a_named_error(run, tmp_path):
    write_panels(tmp_path / "a.jsonl", panels()[:1])
    write_panels(tmp_path / "b.jsonl", panels()[:1])
    write_journal(tmp_path / "c.jsonl", "standard", [record()])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"--output page\.md is one page for 2 journals; name a folder"):
        run("a.jsonl", "b.jsonl", "--output", "page.md")
    with pytest.raises(InputError, match="there is no journal of several arms under empty"):
        run("empty")
    with pytest.raises(InputError, match="nowhere does not exist"):
        run("nowhere")
    with pytest.raises(InputError, match="is no journal of several arms"):
        run("c.jsonl")


def test_the_report_of_single_methods_leaves_panels_to_their_pages(tmp_path):
    write_panels(tmp_path / "a.jsonl", panels())
    write_journal(tmp_path / "c.jsonl", "standard", [record()])
    assert set(read_records(tmp_path)["file"]) == {"c.jsonl"}


def test_figures_show_both_measures_with_intervals_and_a_line_per_arm(run, tmp_path):
    write_panels(tmp_path / "a.jsonl", panels())
    assert len(run("a.jsonl", "--figures", "figures")["written"]) == 1 + 2 * 2
    assert (tmp_path / "figures" / "arms_t0.7_a.png").stat().st_size > 10_000
    for name, figure in evidence_figures(panel_manifest(*ARMS), panels()):
        accepted, speedup = figure.axes
        assert name in ("arms_t0.7", "arms_t0")
        assert (len(accepted.containers), len(speedup.containers)) == (3, 4)  # autoregressive decoding drafts nothing
        assert [label.get_text() for label in speedup.get_xticklabels()] == ["512", "4K", "16K"]
        assert figure.get_size_inches()[0] <= 9
        plt.close(figure)


def test_an_arm_of_one_prompt_is_drawn_without_an_interval():
    rows = figures_of([panel({"specextend": answer()})])
    figure = by_length(rows, {"specextend": "specextend"}, "title")
    assert len(figure.axes[0].containers) == 1
    plt.close(figure)


def test_a_method_has_one_colour_and_its_variants_hollow_marks():
    styles = styles_of({arm: arm.partition(":")[0] for arm in (*ARMS, "specextend:top_k=8")})
    assert styles["standard"]["color"] == ORANGE
    ours = [styles[arm] for arm in styles if arm.startswith("specextend")]
    assert {style["color"] for style in ours} == {BLUE} and len({style["marker"] for style in ours}) == 3
    assert ["markerfacecolor" in style for style in ours] == [False, True, True]
    assert styles["specextend:top_k=8"]["label"] == "SpecExtend (top_k=8)"

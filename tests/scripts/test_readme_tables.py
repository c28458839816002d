"""The tables of the README and of the report, computed again from the records, by own sums."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path

import pytest

from scripts.report import arms as known
from scripts.report import story

ROOT = Path(__file__).parents[2]
BENCH = json.loads((ROOT / "results" / "h200" / "bench.json").read_text())


def tables(text: str) -> list[list[dict[str, str]]]:
    """The tables of a page: a row as a dictionary by heading."""
    found = []
    for block in re.findall(r"(?:^\|.*\|\n)+", text, re.M):
        header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines())
        found.append([dict(zip(header, row, strict=True)) for row in rows])
    return found


README = (ROOT / "README.md").read_text()
REPORT = (ROOT / "results" / "REPORT.md").read_text()
GPU = (ROOT / "results" / "tables" / "gpu.md").read_text()
STEPS = tables(GPU.split("Milliseconds of the steps")[1])[0]
PARTS = ("_standard_t0.7", "_t0", "_t0_1K_4K")
CLASSIC = [f"h200/classic/classic_{lengths}.jsonl" for lengths in ("1K_4K", "2K_8K", "16K")]
CPU = [f"cpu/policy/policy{lengths}.jsonl" for lengths in ("", "_8K", "_16K")]
JOURNALS = {
    "A published model with an EAGLE-3 head": [f"h200/smollm2/smollm2_eagle3{part}.jsonl" for part in PARTS],
    "The bundled pair at the size of Vicuna-7B and 68M": CLASSIC,
    "Long answers, with an EAGLE-3 head": ["h200/aime/aime24_eagle3.jsonl"],
    "The published model on two CPU cores": ["cpu/smollm2/smollm2_cpu.jsonl", "cpu/smollm2/smollm2_cpu_4K.jsonl"],
    "The bundled pair on two CPU cores": CPU,
}  # fmt: skip


def read(journal: str) -> list[dict]:
    panels = [json.loads(line) for line in (ROOT / "results" / journal).read_text().splitlines()[1:]]
    for panel in panels:
        panel["arms"] = {
            "standard:tree=paper" if name == "standard" else name: one for name, one in panel["arms"].items()
        }
    return panels


def figures(panels: list[dict], arm: str) -> tuple[str, str]:
    """Speed-up over AR and accepted drafts per round, means of the prompts' own."""
    speeds, accepted = [], []
    for panel in panels:
        own, alone = panel["arms"][arm], panel["autoregressive"]["timing"]
        rates = [(one["new_tokens"] - 1) / one["decode_s"] for one in (own["timing"], alone)]
        speeds.append(rates[0] / rates[1])
        accepted.append(sum(own["accepted"]) / len(own["accepted"]))
    return f"{sum(speeds) / len(speeds):.2f}", f"{sum(accepted) / len(accepted):.2f}"


NAMES = known.ARMS


def check(table: list[dict[str, str]], panels: list[dict]) -> int:
    """Compare every cell of a table with the panels of one temperature; how many there are."""
    compared = 0
    for row in table:
        at = [panel for panel in panels if panel["bucket"] == row["length"]]
        assert int(row["prompts"]) == len(at)
        alone = [panel["autoregressive"]["timing"] for panel in at]
        assert int(row["AR"]) == round(sum(t["new_tokens"] - 1 for t in alone) / sum(t["decode_s"] for t in alone))
        for arm, name in NAMES.items():
            if row.get(name, "–") == "–":
                assert not any(arm in panel["arms"] for panel in at)
                continue
            speed, accepted = figures(at, arm)
            mean, low, high = re.match(r"([\d.]+) \[([\d.]+), ([\d.]+)\]", row[name]).groups()
            assert mean == speed and float(low) <= float(mean) <= float(high)
            assert ";" not in row[name] or row[name].endswith(f"; {accepted}")
            compared += 1
    return compared


@pytest.mark.parametrize("title", JOURNALS)
def test_the_reports_tables_are_means_of_the_prompts_in_the_records(title):
    panels = [panel for journal in JOURNALS[title] for panel in read(journal)]
    section = REPORT.split(f"## {title}\n")[1].split("\n## ")[0]
    temperatures = [float(found) for found in re.findall(r"^Temperature ([\d.]+)", section, re.M)]
    told = next(chapter for chapter in story.CHAPTERS if chapter.title == title).temperatures
    measured = {panel["temperature"] for panel in panels}
    assert sorted(temperatures) == sorted(measured if told is None else told)
    for temperature, table in zip(temperatures, tables(section), strict=False):
        cells = [cell for row in table for name, cell in row.items() if name in NAMES.values() and cell != "–"]
        assert check(table, [panel for panel in panels if panel["temperature"] == temperature]) == len(cells) > 0


def test_the_readmes_tables_are_those_of_the_records():
    shown = README.split("<!-- results:begin -->")[1].split("<!-- results:end -->")[0]
    titles = re.findall(r"^(.*), temperature ([\d.]+): ", shown, re.M)
    found = tables(shown)
    assert len(titles) == len(found) == 2
    for (title, temperature), table in zip(titles, found, strict=True):
        panels = [panel for journal in JOURNALS[title] for panel in read(journal)]
        assert check(table, [panel for panel in panels if panel["temperature"] == float(temperature)]) >= 16
    vllm = json.loads((ROOT / "results/h200/vllm.json").read_text())["rows"]
    for row in found[1]:
        tokens = 1000 * int(row["length"].removesuffix("K"))
        at = [one for one in vllm if (one["method"], one["tokens"]) == ("vllm_ar", tokens)]
        seconds = sum(statistics.median(one["all_tokens_s"]) - statistics.median(one["one_token_s"]) for one in at)
        assert int(row["AR, vLLM"]) == round(sum(one["decoded"] for one in at) / seconds)


def test_what_the_readme_says_of_priced_trees_on_a_gpu_is_in_the_records():
    said = " ".join(README.split())
    low, high = re.search(r"\(([\d.]+) to ([\d.]+) of it, \[table\]", said).groups()
    (greedy,) = re.findall(r"they decode the second pair at ([\d.]+), ([\d.]+) and ([\d.]+) times AR", said)
    panels = [one for name in CLASSIC for one in read(name)]
    fixed = [arm for arm in panels[0]["arms"] if arm.startswith("specextend") and "price" not in arm]
    ratios = []
    for length, temperature in {(one["bucket"], one["temperature"]) for one in panels}:
        at = [one for one in panels if (one["bucket"], one["temperature"]) == (length, temperature)]
        for rates in (mean_rate, total_rate):
            ratios.append(rates(at, "specextend:tree=price") / max(rates(at, arm) for arm in fixed))
    assert f"decode at {low} to {high} of the best" in " ".join((ROOT / "docs" / "policy.md").read_text().split())
    assert len(fixed) == 3 and (low, high) == (f"{min(ratios):.2f}", f"{max(ratios):.2f}")
    for length, found in zip(("1K", "4K", "16K"), greedy, strict=True):
        at = [one for one in panels if (one["bucket"], one["temperature"]) == (length, 0)]
        assert found == f"{mean_rate(at, 'specextend:tree=price'):.1f}"


def test_what_the_readme_says_of_standard_at_16k_is_in_the_records():
    (said,) = re.findall(
        r"decodes 16K at ([\d.]+) \(0.8\) and ([\d.]+) \(0\) times standard's speed", " ".join(README.split())
    )
    for temperature, found in zip((0.8, 0), said, strict=True):
        ratios = [
            one["arms"][known.PAPERS]["timing"]["decode_tokens_per_s"]
            / one["arms"][known.STANDARD]["timing"]["decode_tokens_per_s"]
            for one in read("h200/classic/classic_16K.jsonl")
            if one["temperature"] == temperature
        ]
        assert len(ratios) >= 20 and found == f"{sum(ratios) / len(ratios):.1f}"


def mean_rate(panels: list[dict], arm: str) -> float:
    """Decoding over AR, mean of the prompts' own."""
    pairs = [(one["arms"][arm]["timing"], one["autoregressive"]["timing"]) for one in panels]
    return sum(own["decode_tokens_per_s"] / alone["decode_tokens_per_s"] for own, alone in pairs) / len(pairs)


def total_rate(panels: list[dict], arm: str) -> float:
    """Decoding over AR, all tokens over all seconds."""
    rates = []
    for timings in (
        [one["arms"][arm]["timing"] for one in panels],
        [one["autoregressive"]["timing"] for one in panels],
    ):
        rates.append(sum(one["new_tokens"] - 1 for one in timings) / sum(one["decode_s"] for one in timings))
    return rates[0] / rates[1]


def test_acceptance_by_output_token_is_a_sum_over_rounds():
    said = REPORT.split("Accepted by output token, up to 1,000, 4,000 and 8,000: ")[1].split(".\n")[0]
    panels = read("h200/aime/aime24_eagle3.jsonl")
    found = []
    for arm, name in NAMES.items():
        means = []
        for low, high in ((0, 1000), (1000, 4000), (4000, 8000)):
            kept = rounds = 0
            for panel in panels:
                at = 0
                for count in panel["arms"].get(arm, {"accepted": []})["accepted"]:
                    if low <= at < high:
                        kept, rounds = kept + count, rounds + 1
                    at += count + 1
            means.append(f"{kept / rounds:.2f}" if rounds else "")
        if all(means):
            found.append(f"{name} {', '.join(means)}")
    assert said == "; ".join(found) and len(found) == 3


def section(title: str) -> str:
    return REPORT.split(f"## {title}\n")[1].split("\n## ")[0]


@pytest.mark.parametrize(
    ("title", "journals", "lengths"),
    [
        (
            "A published model with an EAGLE-3 head", ["h200/smollm2/smollm2_eagle3_standard.jsonl"],
            ["2K", "4K", "8K"],
        ),
        ("The bundled pair at the size of Vicuna-7B and 68M", CLASSIC, ["1K", "2K", "4K", "8K", "16K"]),
        (
            "The bundled target with its EAGLE-1 head at that size",
            [f"h200/eagle1/eagle1_{lengths}.jsonl" for lengths in ("1K_4K", "2K_8K", "16K")],
            ["1K", "2K", "4K", "8K", "16K"],
        ),
    ],
)  # fmt: skip
def test_what_stands_beside_tables_2_and_5_is_a_mean_of_ratios_over_shared_prompts(title, journals, lengths):
    table = tables(section(title))[-1]
    panels = [panel for journal in journals for panel in read(journal)]
    assert [row["length"] for row in table] == lengths
    for row in table:
        at = [
            one for one in panels if (one["data"], one["bucket"], one["temperature"]) == ("govreport", row["length"], 0)
        ]
        assert int(row["prompts"]) == len(at) >= 3
        accepted = []
        for arm in (known.STANDARD, known.PAPERS):
            rounds = [kept for panel in at for kept in panel["arms"][arm]["accepted"]]
            accepted.append(sum(rounds) / len(rounds))
        assert row["accepted: ours"] == " → ".join(f"{one:.2f}" for one in accepted)
        for column, arm, speed in (
            ("ours", known.PAPERS, "tokens_per_s"),
            ("ours, decoding", known.PAPERS, "decode_tokens_per_s"),
            ("ours, priced trees, decoding", known.PRICED, "decode_tokens_per_s"),
        ):
            ratios = [
                panel["arms"][arm]["timing"][speed] / panel["arms"][known.STANDARD]["timing"][speed]
                for panel in at
                if arm in panel["arms"]
            ]
            assert row[column].split()[0] == (f"{sum(ratios) / len(ratios):.2f}" if ratios else "–")


def test_what_was_measured_again_is_compared_prompt_by_prompt():
    folder = "h200/smollm2/smollm2_eagle3"
    published = "A published model with an EAGLE-3 head"
    for title, first, second, arm in (
        (published, [f"{folder}_t0.jsonl", f"{folder}_t0_1K_4K.jsonl"], [f"{folder}_standard.jsonl"], known.PAPERS),
        (published, [f"{folder}.jsonl"], [f"{folder}_standard_t0.7.jsonl"], known.PRICED),
        (
            "The bundled pair on two CPU cores",
            ["cpu/policy/policy_before.jsonl", "cpu/policy/policy_8K_16K.jsonl"],
            CPU,
            known.PRICED,
        ),
    ):
        before = {(one["prompt_sha256"], one["temperature"]): one for name in first for one in read(name)}
        changes = []
        for panel in (one for name in second for one in read(name)):
            old = before.get((panel["prompt_sha256"], panel["temperature"]))
            if old:
                speeds = [
                    one["arms"][arm]["timing"]["decode_tokens_per_s"]
                    / one["autoregressive"]["timing"]["decode_tokens_per_s"]
                    for one in (old, panel)
                ]
                changes.append(abs(speeds[1] / speeds[0] - 1))
        median = f"{statistics.median(changes):.1%}"
        if arm == known.PAPERS:
            said = f"differs by {median} from what stands above (median of the {len(changes)} answers"
        else:
            said = f"of the {len(changes)} answers that both have, the speed-up differs by {median} (median)"
        assert said in section(title) and len(changes) >= 65


TABLE_3_4_8 = "Each part alone, other methods, the working cache"


def end_to_end(*journals: str) -> dict[tuple[str, str], dict[str, float]]:
    """By length and prompt, of GovReport at temperature 0: speed over AR by arm."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    for journal in journals:
        for panel in read(journal):
            if (panel["data"], panel["temperature"]) == ("govreport", 0):
                alone = panel["autoregressive"]["timing"]["tokens_per_s"]
                of = found.setdefault((panel["bucket"], panel["prompt_sha256"]), {"": 1.0})
                of |= {arm: one["timing"]["tokens_per_s"] / alone for arm, one in panel["arms"].items()}
    return found


@pytest.mark.parametrize(
    ("place", "journal", "arms", "over", "fewest"),
    [
        (
            0, "ablation", [f"{name}:tree=paper" for name in ("fa", "hta", "streaming", "cmr", "specextend")],
            known.STANDARD, 4,
        ),
        (
            1, "rivals", ["", "triforce", "magicdec", known.STANDARD, known.PAPERS], "autoregressive_hf", 3,
        ),
    ],
)  # fmt: skip
def test_what_stands_beside_tables_3_and_4_is_a_mean_of_the_prompts_ratios(place, journal, arms, over, fewest):
    table = tables(section(TABLE_3_4_8))[place]
    speeds = end_to_end(f"h200/classic/{journal}.jsonl", *CLASSIC)
    asked = {(one["bucket"], one["prompt_sha256"]) for one in read(f"h200/classic/{journal}.jsonl")}
    assert len(table) == len(arms)
    for row, arm in zip(table, arms, strict=True):
        lengths = [name for name in row if name.endswith("K")]
        assert sorted(lengths) == sorted({length for length, _ in asked})
        for length in lengths:
            ratios = [found[arm] / found[over] for key, found in speeds.items() if key in asked and key[0] == length]
            assert len(ratios) >= fewest
            assert row[length].split("; ")[1].split()[0] == f"{sum(ratios) / len(ratios):.2f}"


def test_what_stands_beside_table_6_is_in_the_records():
    (table,) = tables(section("Inputs of 32K and 128K tokens"))
    panels = read("h200/long/long_32K.jsonl") + read("h200/long/long_128K.jsonl")
    arms = {"full cache": known.FULL, "SpecExtend": known.PAPERS, "priced trees": known.PRICED}
    assert len(table) == 3
    for row in table:
        length, temperature = row["length, temperature"].split(", ")
        at = [one for one in panels if (one["bucket"], one["temperature"]) == (length, float(temperature))]
        assert int(row["prompts"]) == len(at)
        rates = {}
        for name, arm in arms.items():
            assert row[f"decoding over AR: {name}"].split()[0] == figures(at, arm)[0]
            rounds = [kept for one in at for kept in one["arms"][arm]["accepted"]]
            rates[name] = f"{sum(rounds) / len(rounds):.2f}"
        shown = row["accepted: full cache → SpecExtend, priced trees"]
        assert shown == f"{rates['full cache']} → {rates['SpecExtend']}, {rates['priced trees']}"


def test_what_stands_beside_table_8_is_a_ratio_of_totals():
    table = tables(section(TABLE_3_4_8))[2]
    panels = read("h200/classic/sweep.jsonl")
    settings = {
        "tokens of the working cache": (lambda value: f"top_k={value // 32}", 1024),
        "tokens of a chunk": (lambda value: f"chunk_size={value},top_k={1024 // value}", 32),
        "rounds between refreshes": (lambda value: f"every_n_steps={value}", 4),
    }
    assert len(table) == 3
    for row in table:
        setting, default = settings[row["parameter"]]
        columns = [row[name].split(", ") for name in ("values", "ours: tokens/s", "ours: accepted")]
        assert len(columns[0]) >= 7
        for value, speed, accepted in zip(*columns, strict=True):
            at = "top_k=32" if int(value) == default else setting(int(value))
            answers = [panel["arms"][f"specextend:tree=paper,{at}"] for panel in panels]
            timings = [one["timing"] for one in answers]
            rate = sum(one["new_tokens"] - 1 for one in timings) / sum(one["decode_s"] for one in timings)
            rounds = [kept for one in answers for kept in one["accepted"]]
            assert (speed, accepted) == (f"{rate:.0f}", f"{sum(rounds) / len(rounds):.2f}")


def test_what_is_hard_is_a_mean_of_the_prompts_ratios():
    page = (ROOT / "results" / "tables" / "policy_h200.md").read_text()
    (table,) = tables(page.split("What is hard for priced trees")[1])
    assert len(table) == 4
    for row in table:
        what, length = row.pop("temperature 0.8").rsplit(", ", 1)
        panels = read(f"h200/classic/{'random_draft' if what == 'random draft' else 'short_answers'}.jsonl")
        assert {panel["temperature"] for panel in panels} == {0.8}
        assert check([row | {"length": length}], panels) == (3 if what == "random draft" else 2)


def test_quotations_are_sums_over_rounds():
    (table,) = tables(REPORT.split("## Where retrieval wins")[1].split("\n## ")[0])
    assert len(table) == 4
    for row in table:
        head, length = re.fullmatch(r"(\w+), (\w+)", row["head, length"]).groups()
        records = json.loads((ROOT / f"results/h200/smollm2/quotations_{head}_{length}.json").read_text())["records"]

        def rate(cache: str, records=records) -> str:
            rounds = [count for one in records if one["cache"] == cache for count in one["forced"]]
            return f"{sum(rounds) / len(rounds):.2f}"

        assert row["full"] == rate("full") and row["prompt lookup"] == rate("lookup")
        for size in (8, 32):
            assert row[f"window → CMR, {size} chunks"].startswith(f"{rate(f'window {size}')} → {rate(f'CMR {size}')} (")


def test_steps_on_the_gpu_are_those_recorded():
    shown = [one for one in BENCH["stages"] if one["tokens"] in (1000, 16000)]
    for row, measured in zip(STEPS, shown, strict=True):
        assert row["prompt tokens"] == str(measured["tokens"])
        assert row["verify"] == f"{measured['verify_ms']:.2f}" and row["whole round"] == f"{measured['round_ms']:.2f}"


def speedups(arm: str) -> dict[tuple[str, str], float]:
    """Decoding over AR, mean of the prompts' own ratios, by temperature and length."""
    found: dict[tuple[str, str], list[float]] = {}
    for row in (one for name in CPU for one in read(name)):
        if arm not in row["arms"]:
            continue
        own, alone = row["arms"][arm]["timing"], row["autoregressive"]["timing"]
        ratio = own["decode_tokens_per_s"] / alone["decode_tokens_per_s"]
        found.setdefault((f"{row['temperature']:g}", row["bucket"]), []).append(ratio)
    assert all(len(ratios) == (5 if length == "16K" else 16) for (_, length), ratios in found.items())
    return {cell: sum(ratios) / len(ratios) for cell, ratios in found.items()}


PRICED = speedups("specextend:tree=price")
TUNED = speedups("specextend:nodes=12,max_depth=8,threshold=0.35,min_probability=0.06")


def test_speeds_of_priced_trees_are_means_of_the_prompts_ratios():
    (table,) = [one for one in tables((ROOT / "docs" / "policy.md").read_text()) if "512" in one[0]]
    for row in table:
        temperature, tree = re.fullmatch(r"temperature ([\d.]+), (priced|12 nodes)", [*row.values()][0]).groups()
        of = PRICED if tree == "priced" else TUNED
        cells = {name: value for name, value in row.items() if name in ("512", "1K", "4K", "8K", "16K")}
        assert len(cells) == 5
        for length, cell in cells.items():
            assert cell == (f"{of[temperature, length]:.2f}" if (temperature, length) in of else "–")


def test_priced_trees_beside_fixed_ones_are_means_of_the_prompts_ratios():
    table, _ = tables((ROOT / "results" / "tables" / "policy_h200.md").read_text())
    arms = {
        "priced": "specextend:tree=price", "the paper's": "specextend:tree=paper",
        "stop at 0.15": "specextend:nodes=50,max_depth=10,threshold=0.15",
        "12 levels, stop at 0.05": "specextend:nodes=50,max_depth=12,threshold=0.05",
    }  # fmt: skip
    panels = [one for name in ["h200/classic/classic_512.jsonl", *CLASSIC] for one in read(name)]
    for row in table:
        at = [one for one in panels if one["bucket"] == row["length"]]
        for temperature in ("0.8", "0"):
            there = [one for one in at if one["temperature"] == float(temperature)]
            for name, arm in arms.items():
                assert row[f"{temperature}: {name}"] == figures(there, arm)[0]
        twice = [one for one in at if sum((one["data"], one["sample"]) == (o["data"], o["sample"]) for o in at) == 2]
        rates = {
            name: sum(one["arms"][arm]["timing"]["new_tokens"] for one in twice)
            / sum(one["arms"][arm]["timing"]["decode_s"] for one in twice)
            for name, arm in arms.items()
        }
        priced = rates.pop("priced")
        assert row["alternating: priced over the best"] == f"{priced / max(rates.values()):.2f}"
    assert [row["length"] for row in table] == ["512", "1K", "2K", "4K", "8K", "16K"]


def test_what_the_readme_says_below_its_first_command_is_in_the_record():
    said = r"decodes ([\d.]+) to ([\d.]+) times as fast as autoregressively at temperature 0, and ([\d.]+) to ([\d.]+)"
    figures = re.search(said, " ".join((ROOT / "README.md").read_text().split())).groups()
    for (low, high), temperature in zip((figures[:2], figures[2:]), ("0", "0.8"), strict=True):
        cells = [value for (at, _), value in PRICED.items() if at == temperature]
        assert (low, high) == (f"{min(cells):.1f}", f"{max(cells):.1f}")

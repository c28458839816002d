"""Records, journal and aggregation, and the tables and figures that scripts derive from them."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from specextend.decoding.output import Generation, Round
from specextend.errors import ConfigError, InputError
from specextend.evaluation.aggregate import aggregate
from specextend.evaluation.environment import ROOT, environment
from specextend.evaluation.journal import Journal, write_json
from specextend.evaluation.records import (
    SampleRecord,
    Stretch,
    Timing,
    Worker,
    first_difference,
    hash_tokens,
    stretches_of,
)

SCHEMA = json.loads((ROOT / "results" / "schema.json").read_text())
FILE_SCHEMA = Draft202012Validator(SCHEMA)
LINE_SCHEMA = Draft202012Validator({"$ref": "#/$defs/journal_line", "$defs": SCHEMA["$defs"]})
SCRIPTS = ROOT / "scripts"


def timing(new_tokens: int, ttft_s: float, decode_s: float) -> Timing:
    return Timing(
        new_tokens=new_tokens,
        finish_reason="length",
        prefill_s={"target": ttft_s},
        stages_s={"verify": decode_s},
        ttft_s=ttft_s,
        decode_s=decode_s,
        total_s=ttft_s + decode_s,
        tokens_per_s=new_tokens / (ttft_s + decode_s),
        decode_tokens_per_s=(new_tokens - 1) / decode_s if decode_s else 0.0,
        peak_bytes=None,
        sha256=hash_tokens(range(new_tokens)),
    )


def record(bucket: str = "1K", sample: int = 0, run: int = 0, **changes) -> SampleRecord:
    fields = {
        "seed": 1000 * sample + run,
        "source": f"govreport_{bucket}.jsonl:{sample + 1}",
        "prompt_sha256": hash_tokens([sample]),
        "prompt_tokens": 1000,
        "cut": False,
        "accepted": [3, 1],
        "drafted": [50, 50],
        "first_difference": None,
        "method": timing(7, 1.0, 1.0),
        "autoregressive": timing(7, 1.0, 3.0),
        "commit": {"id": "abc", "dirty": False},
    }
    return SampleRecord(bucket=bucket, sample=sample, run=run, **{**fields, **changes})


def manifest(method: str = "specextend", *, data: str = "govreport", temperature: float = 0.0, nodes: int = 50) -> dict:
    setting = {
        "data": data,
        "model": "bundled",
        "target": "specextend/models/bundled/target",
        "draft": "specextend/models/bundled/draft",
        "dtype": "float32",
        "device": "cpu",
        "method": method,
        "config": {"tree": {"nodes": nodes, "max_depth": 10, "threshold": 0.7}, "retrieval": {"top_k": 32}},
        "sampling": {"temperature": temperature, "top_p": 1.0, "top_k": 0, "seed": 0},
        "seeds": "seed + 1000 * sample + run",
        "max_gen_len": 256,
        "warm_up": {"generations": "one of each", "prompt_tokens": 1024, "new_tokens": 8},
        "order": "alternating",
    }
    return {"setting": setting, "environment": environment()}


# --- environment, records -------------------------------------------------------------------------------------------


def test_environment_is_complete_and_names_no_host():
    found = environment()
    assert found["hardware"]["cpu"] and found["hardware"]["cores"] >= 1 and found["threads"] >= 1
    hostname = subprocess.run(["uname", "-n"], capture_output=True, text=True, check=True).stdout.strip()
    assert hostname not in json.dumps(found)


def test_first_difference_finds_the_index_where_sequences_part():
    assert first_difference([1, 2, 3], [1, 2, 3]) is None
    assert first_difference([1, 2, 3], [1, 5, 3]) == 1
    assert first_difference([1, 2], [1, 2, 3]) == 2
    assert first_difference([], []) is None


def test_timing_sums_stages_over_rounds():
    rounds = [Round([1, 2], 50, 1, {"draft": 0.5, "verify": 0.25}), Round([3], 50, 0, {"draft": 0.5, "retrieve": 1.0})]
    generation = Generation(9, [0, 1, 2, 3], "text", "eos", rounds, {"target": 2.0, "draft": 1.0})
    found = Timing.of(generation)
    assert found.stages_s == {"draft": 1.0, "verify": 0.25, "retrieve": 1.0}
    assert (found.ttft_s, found.decode_s, found.total_s) == (3.0, 2.25, 5.25)
    assert found.sha256 == hash_tokens([0, 1, 2, 3]) != hash_tokens([0, 1, 2, 4])


def test_rounds_are_summed_by_their_position_in_the_output():
    long = [Round([0] * 500, 50, 499, {"verify": 1.0}) for _ in range(5)]  # begin at 1, 501, 1001, 1501, 2001
    generation = Generation(9, [0] * 2501, "", "length", long, {})
    assert stretches_of(generation) == [Stretch(3, 1497, 1500, 3.0), Stretch(2, 998, 1000, 2.0)]
    leap = [Round([0] * 3000, 1, 1, {}), Round([0], 1, 0, {})]
    assert stretches_of(Generation(9, [0] * 3002, "", "length", leap, {})) == [
        Stretch(1, 1, 3000, 0.0), Stretch(), Stretch(1, 0, 1, 0.0)
    ]  # fmt: skip


def test_figures_by_output_position_are_ratios_of_totals():
    fast = replace(timing(2000, 1.0, 3.0), by_output=[Stretch(10, 30, 40, 2.0), Stretch(5, 5, 10, 1.0)])
    short = replace(timing(900, 1.0, 2.0), by_output=[Stretch(10, 10, 20, 2.0)])
    slow = replace(timing(2000, 1.0, 9.0), by_output=[Stretch(50, 0, 50, 10.0), Stretch(20, 0, 20, 10.0)])
    records = [record(method=fast, autoregressive=slow), record(sample=1, method=short, autoregressive=slow)]
    figures = aggregate(records)["1K"]["by_output_position"]
    assert list(figures) == ["0-1K", "1K-2K"] and figures["1K-2K"]["runs"] == 1
    assert figures["0-1K"]["avg_accept_length"] == 2 and figures["0-1K"]["tokens_per_round"] == 3
    assert figures["0-1K"]["decode_tokens_per_sec"] == 15 and figures["0-1K"]["speedup_decode"] == 3
    assert figures["1K-2K"]["autoregressive_decode_tokens_per_sec"] == 2


def test_share_of_right_answers_counts_those_who_were_asked():
    records = [record(sample=i, answered_right=right) for i, right in enumerate((True, False, False, None))]
    assert aggregate(records)["1K"]["answered_right"] == pytest.approx(1 / 3)
    assert aggregate([record()])["1K"]["answered_right"] is None


def test_record_survives_json_and_fits_the_schema():
    for one in (record(), record(first_difference=4)):
        entry = json.loads(json.dumps(one.to_json()))
        LINE_SCHEMA.validate(entry)
        assert entry["equal_to_autoregressive"] == (one.first_difference is None)
        assert SampleRecord.from_json(entry) == one


# --- journal --------------------------------------------------------------------------------------------------------


def test_journal_begins_with_the_manifest_and_every_line_fits_the_schema(tmp_path):
    journal = Journal(tmp_path / "new" / "a.jsonl", manifest())
    assert not journal.path.exists()  # nothing measured, nothing written
    journal.append(record())
    journal.append(record(run=1))
    lines = [json.loads(line) for line in journal.path.read_text().splitlines()]
    assert [sorted(line) for line in lines[:1]] == [["environment", "setting"]] and len(lines) == 3
    for line in lines:
        LINE_SCHEMA.validate(line)


@pytest.mark.parametrize("kept_bytes", [1, 40, -1])
def test_journal_drops_the_torn_last_line_and_goes_on(tmp_path, kept_bytes):
    path = tmp_path / "a.jsonl"
    journal = Journal(path, manifest())
    journal.append(record(sample=0))
    whole = path.read_bytes()
    journal.append(record(sample=1))
    torn = path.read_bytes()[len(whole) :][:kept_bytes]
    path.write_bytes(whole + torn)

    resumed = Journal(path, manifest())
    assert resumed.records == [record(sample=0)]
    assert resumed.find(("1K", 1, 0)) is None
    resumed.append(record(sample=1))
    assert Journal(path, manifest()).records == [record(sample=0), record(sample=1)]


def test_journal_torn_in_its_manifest_starts_over(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(json.dumps(manifest()).encode()[:50])
    journal = Journal(path, manifest())
    journal.append(record())
    assert Journal(path, manifest()).records == [record()]


def test_journal_of_another_setting_is_refused_naming_the_field(tmp_path):
    path = tmp_path / "a.jsonl"
    Journal(path, manifest(nodes=50)).append(record())
    with pytest.raises(ConfigError, match=r"setting\.config\.tree\.nodes was 50, now 16.*--fresh.*--output_file"):
        Journal(path, manifest(nodes=16))


def test_journal_accepts_another_commit_and_date(tmp_path):
    path = tmp_path / "a.jsonl"
    Journal(path, manifest()).append(record())
    later = manifest()
    later["environment"] |= {"commit": {"id": "other", "dirty": True}, "date": "2099-01-01"}
    assert len(Journal(path, later).records) == 1


def test_journal_leaves_foreign_files_alone(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a prompt"}\n{"text": "no newline"}')
    with pytest.raises(InputError, match="does not begin with a manifest"):
        Journal(path, manifest())
    assert path.read_text().endswith('no newline"}')


def test_journal_names_a_damaged_line(tmp_path):
    path = tmp_path / "a.jsonl"
    Journal(path, manifest()).append(record())
    path.write_text(path.read_text() + '{"bucket": "1K"}\n')
    with pytest.raises(InputError, match=r"a\.jsonl:3 is damaged"):
        Journal(path, manifest())


def test_journal_refuses_repeated_records(tmp_path):
    path = tmp_path / "a.jsonl"
    Journal(path, manifest()).append(record())
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines, lines[1]]) + "\n")
    with pytest.raises(InputError, match=r"a\.jsonl:3 repeats a record \(1K sample 1 run 1\)"):
        Journal(path, manifest())


# --- aggregation ----------------------------------------------------------------------------------------------------


def test_aggregate_matches_figures_computed_by_hand():
    records = [
        # accepted [3, 1]: mean 2; 6 tokens in 1 s of decoding, 7 in 2 s in all; AR 6 in 3 s, 7 in 4 s
        record(sample=0),
        # accepted [0]: 2 tokens in 2 s of decoding, 3 in 4 s in all; AR 2 in 2 s, 3 in 5 s
        record(
            sample=1,
            prompt_tokens=3000,
            cut=True,
            accepted=[0],
            first_difference=2,
            method=timing(3, 2.0, 2.0),
            autoregressive=timing(3, 3.0, 2.0),
        ),
    ]
    found = aggregate(records)["1K"]
    assert found["avg_accept_length"] == pytest.approx((3 + 1 + 0) / 3)
    assert found["tokens_per_round"] == pytest.approx((6 + 2) / 3)
    assert found["avg_tokens_per_sec"] == pytest.approx(10 / 6)
    assert found["decode_tokens_per_sec"] == pytest.approx(8 / 3)
    assert found["ttft_s"] == pytest.approx(1.5)
    assert found["speedup"] == pytest.approx((10 / 6) / (10 / 9))
    assert found["speedup_decode"] == pytest.approx((8 / 3) / (8 / 5))
    assert found["speedup_mean_of_ratios"] == pytest.approx((4 / 2 + 5 / 4) / 2)
    assert found["autoregressive"] == {
        "tokens_per_sec": pytest.approx(10 / 9),
        "decode_tokens_per_sec": pytest.approx(8 / 5),
        "ttft_s": pytest.approx(2.0),
        "total_generated_tokens": 10,
    }
    assert found["prompt_tokens"] == {"mean": 2000, "min": 1000, "max": 3000}
    assert (found["runs"], found["samples"], found["total_generated_tokens"]) == (2, 2, 10)
    assert (found["cut"], found["equal_to_autoregressive"]) == (1, 1)
    # speed-ups of the samples 3 and 1; std sqrt(2), percentiles by linear interpolation
    assert found["spread"]["speedup_decode"] == {
        "std": pytest.approx(2**0.5),
        "p10": pytest.approx(1.2),
        "p90": pytest.approx(2.8),
    }
    assert found["spread"]["avg_accept_length"]["p90"] == pytest.approx(1.8)


def test_aggregate_pools_the_runs_of_a_sample_before_the_spread():
    fast, slow = timing(7, 1.0, 1.0), timing(7, 1.0, 5.0)
    found = aggregate([record(run=0, method=fast), record(run=1, method=slow, first_difference=3)])["1K"]
    assert (found["runs"], found["samples"], found["equal_to_autoregressive"]) == (2, 1, 0)
    pooled = pytest.approx((6 + 6) / (1 + 5))
    assert found["spread"]["decode_tokens_per_sec"] == {"std": None, "p10": pooled, "p90": pooled}


def test_aggregate_orders_lengths_by_size():
    found = aggregate([record("16K"), record("512"), record("all"), record("2K")])
    assert list(found) == ["512", "2K", "16K", "all"]


def test_aggregate_of_single_token_outputs_has_no_decoding_speed():
    one_token = timing(1, 1.0, 0.0)
    found = aggregate([record(accepted=[], drafted=[], method=one_token, autoregressive=one_token)])
    assert found["1K"]["speedup_decode"] is None and found["1K"]["avg_accept_length"] is None
    assert found["1K"]["speedup"] == 1.0
    FILE_SCHEMA.validate(json.loads(json.dumps(found)) | {"manifest": {**manifest(), "commits": [None]}})


# --- tables and figures ---------------------------------------------------------------------------------------------


def write_results(
    path: Path, method: str, gain: float, *, lengths=("512", "1K", "16K"), workers: tuple[int, ...] = (1,), **setting
) -> None:
    """A per-length file whose method accepts `gain` drafts in every round and decodes `gain` times as fast as AR.

    `workers`: how many there were on the host, in turns of samples.
    """
    records = [
        record(
            length,
            sample,
            prompt_tokens=500 * 4**index,
            accepted=[round(gain)] * 10,
            method=timing(257, 1.0, (8 + sample) / gain),
            autoregressive=timing(257, 1.0, 8.0 + sample),
            worker=Worker(sample, "host", workers[sample % len(workers)], 1, "cpu"),
        )
        for index, length in enumerate(lengths)
        for sample in range(3)
    ]
    whole = manifest(method, **setting)
    write_json(path, aggregate(records) | {"manifest": {**whole, "commits": [None]}})
    FILE_SCHEMA.validate(json.loads(path.read_text()))


@pytest.fixture
def results(tmp_path) -> Path:
    folder = tmp_path / "results"
    for data in ("govreport", "pg19"):
        for temperature in (0.0, 0.8):
            name = f"cpu/{data}_t{temperature:g}"
            write_results(folder / f"{name}_standard.json", "standard", 2.0, data=data, temperature=temperature)
            write_results(folder / f"{name}_specextend.json", "specextend", 3.0, data=data, temperature=temperature)
    (folder / "schema.json").write_text("{}")
    return folder


def write_journal(path: Path, method: str, records: list[SampleRecord]) -> None:
    """A journal and the per-length file that `evaluate` writes of it."""
    journal = Journal(path.with_suffix(".jsonl"), manifest(method))
    for one in records:
        journal.append(one)
    write_json(path, aggregate(records) | {"manifest": {**manifest(method), "commits": [None]}})


@pytest.fixture
def unequal(tmp_path) -> Path:
    """Standard has answered prompts 0 and 1, SpecExtend 0 to 2, the window 1 and 2; prompt 2 is the easy one."""

    def measured(sample: int, accepted: int, decode_s: float) -> SampleRecord:
        times = {"method": timing(257, 1.0, decode_s), "autoregressive": timing(257, 1.0, 8.0)}
        changes = {"prompt_tokens": 16000 + 100 * sample, "accepted": [accepted] * 10, **times}
        return record("16K", sample, **changes)

    folder = tmp_path / "cpu" / "cpu_tree"
    window = [measured(1, 2, 2.0), measured(2, 9, 1.0)]
    write_journal(folder / "standard.json", "standard", [measured(0, 1, 16.0), measured(1, 2, 8.0)])
    write_journal(
        folder / "specextend.json", "specextend", [measured(0, 3, 4.0), measured(1, 4, 4.0), measured(2, 9, 0.5)]
    )
    write_journal(folder / "window.json", "fa_hta_streaming", window)
    return tmp_path


def run_script(name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPTS / name, *map(str, arguments)], capture_output=True, text=True)


def test_tables_put_standard_and_specextend_side_by_side(results, tmp_path):
    write_results(results / "cpu" / "stream.json", "flash-hta-streaming", 2.5, lengths=("1K",))
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- results:begin -->\nstale text\n<!-- results:end -->\nafter\n")

    done = run_script("make_tables.py", "--results", results, "--readme", readme)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout.splitlines()[-1])["files"]) == 9

    report = (results / "REPORT.md").read_text()
    assert re.findall(r"^### .*", report, re.M) == [
        f"### {data}, temperature {temperature}" for data in ("govreport", "pg19") for temperature in ("0", "0.8")
    ]
    lines = [line for line in report.splitlines() if line.startswith("| 16K | 8,000 |")]
    assert len(lines) == 4
    cells = [cell.strip() for cell in lines[0].split("|")[1:-1]]
    # accepted 2, 3, ratio 1.5; AR decodes 3 * 256 tokens in 27 s
    assert cells[:5] == ["16K", "8,000", "2.00", "3.00", "1.50"] and cells[7] == "28.4"
    assert cells[10:13] == ["2.00", "3.00", "1.50"] and cells[-2:] == ["3/3", "3/3"]
    assert re.search(r"^\| flash-hta-streaming \|[ |]*2\.50 \|", report, re.M)
    assert "| 16K | 1.59 → 3.07 | 2.00 → 3.00 |" in report

    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("<!-- results:end -->\nafter\n") and "stale" not in text
    assert re.search(r"^\| govreport, 16K \| 2\.00 → 3\.00 \| 2\.00 → 3\.00 \|$", text, re.M)
    run_script("make_tables.py", "--results", results, "--readme", readme)
    assert readme.read_text() == text


def test_tables_never_put_speeds_of_different_worker_counts_together(tmp_path):
    write_results(tmp_path / "standard.json", "standard", 2.0)
    write_results(tmp_path / "specextend.json", "specextend", 3.0, workers=(2,))
    write_results(tmp_path / "mixed.json", "triforce", 4.0, workers=(2, 1))
    for script in ("make_tables.py", "plot_results.py"):
        done = run_script(script, "--results", tmp_path)
        assert done.returncode == 0, done.stderr
    report = (tmp_path / "REPORT.md").read_text()
    one, mixed, two = (section.splitlines() for section in report.split("\n## ")[1:])
    assert "workers" not in one[0] and "; tree" in one[0]
    assert ", 1 or 2 workers per host (speeds do not compare); tree" in mixed[0] and ", 2 workers per host; " in two[0]
    (line,) = (line for line in one if line.startswith("| 16K | 8,000"))
    assert "| 2.00 |" in line and "3.00" not in line
    assert "| TriForce |" in "\n".join(mixed).replace("triforce", "TriForce")
    assert any("4.00" in line for line in mixed) and not any(re.search(r"\d\.\d\d \(", line) for line in mixed)


def test_figures_that_a_clock_had_no_part_in_outlive_a_mixture_of_workers():
    def measured(workers: int, threads: int) -> SampleRecord:
        return record(sample=threads, run=workers, worker=Worker(0, "host", workers, threads, "cpu"))

    for other in (measured(2, 1), measured(1, 2)):
        found = aggregate([measured(1, 1), other])["1K"]
        FILE_SCHEMA.validate(json.loads(json.dumps({"1K": found})) | {"manifest": {**manifest(), "commits": [None]}})
        assert found["avg_accept_length"] == 2 and found["spread"]["avg_accept_length"]["p90"] == 2
        assert found["speedup"] is found["ttft_s"] is found["autoregressive"]["tokens_per_sec"] is None
        assert found["spread"]["speedup_decode"]["p10"] is None and set(found["stages_s"].values()) == {None}
    alike = aggregate([measured(2, 1), record(sample=5, worker=Worker(1, "other", 2, 1, "cpu"))])["1K"]
    assert alike["speedup"] and alike["workers_on_host"] == [2]
    # records from before workers had names compare with each other alone
    assert aggregate([record(), record(sample=1)])["1K"]["speedup"]
    assert aggregate([record(), measured(1, 1)])["1K"]["speedup"] is None


def test_tables_leave_gaps_for_what_was_not_measured(tmp_path):
    write_results(tmp_path / "a.json", "specextend", 3.0)
    write_results(tmp_path / "b.json", "standard", 2.0, lengths=("512",))
    done = run_script("make_tables.py", "--results", tmp_path)
    assert done.returncode == 0, done.stderr
    report = (tmp_path / "REPORT.md").read_text()
    assert "| 16K | 8,000 |  | 3.00 |  |" in report and "nan" not in report


def test_tables_name_the_file_where_two_share_a_method(tmp_path):
    write_results(tmp_path / "a.json", "specextend", 3.0)
    write_results(tmp_path / "b.json", "specextend", 2.0)
    assert run_script("make_tables.py", "--results", tmp_path).returncode == 0
    assert "specextend (b.json)" in (tmp_path / "REPORT.md").read_text()


def test_goals_are_listed_whether_met_or_not(tmp_path):
    folder = tmp_path / "cpu" / "paper_tree_greedy"
    for method, accepted in (("standard", 2.0), ("specextend", 3.0), ("fa_hta_streaming", 2.5)):
        write_results(folder / f"govreport_{method}.json", method, accepted)
    memory = {"prompt_tokens": 16000, "peak_over_count": 1.3}
    (tmp_path / "cpu" / "prefill_memory.json").write_text(json.dumps(memory))
    done = run_script("check_goals.py", "--results", tmp_path)
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "GOALS.md").read_text().splitlines()
    ratio = "| accepted, SpecExtend over standard | govreport, temperature 0, paper's tree,"
    assert f"{ratio} 512 | at least 1.00 | 1.50 | yes |" in lines
    assert f"{ratio} 16K | at least 1.90 | 1.50 | **no** |" in lines
    where = "cpu/paper_tree_greedy, govreport, temperature 0, 16K"
    assert f"| accepted, SpecExtend over a StreamingLLM cache | {where} | at least 1.00 | 1.50 | yes |" in lines
    best = f"{where} (fa_hta_streaming)"
    assert f"| decode speed, SpecExtend over the best other | {best} | at least 1.00 | 1.20 | yes |" in lines
    assert any("peak memory" in line and "at most 1.20 | 1.30 | **no**" in line for line in lines)
    counts = json.loads(done.stdout)
    assert counts["goals"] == sum("| at " in line for line in lines) and counts["met"] < counts["goals"]
    assert run_script("check_goals.py", "--results", tmp_path / "nowhere").returncode != 0


def test_tables_compare_the_prompts_that_both_files_hold(unequal, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("<!-- results:begin -->\n<!-- results:end -->\n")
    assert run_script("make_tables.py", "--results", unequal, "--readme", readme).returncode == 0
    report = (unequal / "REPORT.md").read_text()
    (line,) = (line for line in report.splitlines() if line.startswith("| 16K | 16,050 |"))
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
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


def test_goals_compare_the_prompts_that_both_files_hold(unequal):
    assert run_script("check_goals.py", "--results", unequal).returncode == 0
    goals = (unequal / "GOALS.md").read_text()
    where = "govreport, temperature 0, CPU tree, 16K"
    assert f"| decode speed, SpecExtend over standard | {where} | at least 1.00 | 3.00 |" in goals
    assert f"| decode speed, SpecExtend over AR | {where} | at least 2.00 | 2.00 |" in goals
    where = "cpu/cpu_tree, govreport, temperature 0, 16K"
    # prompts 1 and 2: accepted 6.5 and 5.5, decoded in 4.5 s and 3 s
    assert f"| accepted, SpecExtend over a StreamingLLM cache | {where} | at least 1.00 | 1.18 |" in goals
    assert f"| decode speed, SpecExtend over the best other | {where} (fa_hta_streaming) |" in goals
    assert "| at least 1.00 | 0.67 | **no** |" in goals


def test_plots_compare_the_prompts_that_both_files_hold(unequal, monkeypatch):
    plot = pytest.importorskip("plot_results")
    drawn = []
    monkeypatch.setattr(plot, "draw_accepted", lambda _, rows: drawn.append(rows.set_index("method")))
    rows = plot.read_results(unequal)
    rows = rows[rows["method"].isin(plot.STYLES)]
    plot.panels(rows, plot.draw_accepted, title="", label="")
    assert drawn[0]["avg_accept_length"].to_dict() == {"standard": 1.5, "specextend": 3.5}
    assert drawn[0]["spread.avg_accept_length.p90"]["specextend"] == pytest.approx(3.9)


def test_files_without_a_journal_are_compared_where_their_counts_agree(unequal):
    from make_tables import read_results
    from shared import lead, on_shared

    rows = read_results(unequal).assign(journal=None)
    assert on_shared(rows, ("standard", "specextend")).empty
    assert len(on_shared(rows.assign(**{"prompt_tokens.mean": 16000.0}), ("standard", "fa_hta_streaming"))) == 2
    assert lead(rows, "specextend", "nowhere", "speedup").empty


def test_prompts_that_differ_are_not_shared(tmp_path):
    from make_tables import read_results
    from shared import on_shared

    write_journal(tmp_path / "a.json", "standard", [record(), record(sample=1)])
    write_journal(tmp_path / "b.json", "specextend", [record(), record(sample=1, prompt_sha256="another")])
    assert on_shared(read_results(tmp_path))["samples"].tolist() == [1, 1]
    write_journal(tmp_path / "c" / "a.json", "standard", [record()])
    write_journal(tmp_path / "c" / "b.json", "specextend", [record(prompt_sha256="another")])
    assert on_shared(read_results(tmp_path / "c")).empty


@pytest.mark.parametrize("journal", sorted((ROOT / "results" / "cpu").rglob("*.jsonl")), ids=lambda path: path.stem)
def test_figures_of_shared_records_are_those_of_an_evaluation(journal):
    from shared import figures_of

    lines = [json.loads(line) for line in journal.read_text().splitlines()[1:]]
    for bucket, found in aggregate(map(SampleRecord.from_json, lines)).items():
        whole = dict(_leaves(found))
        mine = figures_of([line for line in lines if line["bucket"] == bucket])
        assert mine == pytest.approx({name: whole[name] for name in mine})


def test_speeds_of_unlike_workers_are_in_no_figure_of_shared_records():
    from shared import figures_of

    records = [record(sample=n, worker=Worker(0, "host", n + 1, 1, "cpu")).to_json() for n in range(2)]
    assert figures_of(records)["avg_accept_length"] == 2 and "speedup" not in figures_of(records)
    assert "speedup" in figures_of(records[:1])


def _leaves(value, name=""):
    if not isinstance(value, dict):
        yield name, value
        return
    for key, inner in value.items():
        yield from _leaves(inner, f"{name}.{key}" if name else key)


def test_tables_say_what_is_missing(results, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("no markers")
    for arguments, message in (
        (["--results", tmp_path / "nowhere"], "no per-length files"),
        (["--results", results, "--readme", readme], "results:begin"),
    ):
        done = run_script("make_tables.py", *arguments)
        assert done.returncode != 0 and message in done.stderr and "Traceback" not in done.stderr
    assert readme.read_text() == "no markers"


def test_plots_are_drawn_for_every_setting_and_do_not_change_with_the_date(tmp_path):
    results = tmp_path / "results"
    write_results(results / "standard.json", "standard", 2.0, lengths=("512",))
    write_results(results / "specextend.json", "specextend", 3.0)
    first = run_script("plot_results.py", "--results", results)
    assert first.returncode == 0, first.stderr
    written = [Path(path) for path in json.loads(first.stdout.splitlines()[-1])["written"]]
    assert sorted(path.suffix for path in written) == [".png"] * 3 + [".svg"] * 3  # stages, too
    assert all(path.parent == results / "figures" and path.stat().st_size > 5000 for path in written)
    assert run_script("make_tables.py", "--results", results, "--html").returncode == 0
    page = (results / "REPORT.html").read_text()
    assert page.count("<img") == 3 and "<td>2.00</td>" in page and "<h1>Results</h1>" in page and "| " not in page
    before = {path: path.read_bytes() for path in written}
    assert run_script("plot_results.py", "--results", results).returncode == 0
    assert {path: path.read_bytes() for path in written} == before


def test_json_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "new" / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}

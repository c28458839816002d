"""Records, journal and aggregation."""

import json
import subprocess
from dataclasses import replace

import pytest
from jsonschema import Draft202012Validator
from made_records import manifest, record, timing

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
    # records from before there were workers are of one process alone: they compare with another such, not with two
    old = record(sample=6, worker=None)
    assert (
        aggregate([old, measured(1, 1)])["1K"]["speedup"] and aggregate([old, measured(2, 1)])["1K"]["speedup"] is None
    )


def test_json_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "new" / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}

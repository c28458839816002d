"""The sweep of `specextend.evaluation.run`, on an engine whose generations are scripted."""

import io
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from jsonschema import Draft202012Validator
from rich.console import Console

import eval_classic
from specextend.cli import commands
from specextend.config import SamplingConfig, SpecExtendConfig, TreeConfig
from specextend.decoding.output import Generation, Round
from specextend.errors import CapacityError, ConfigError, InputError, WorkerError
from specextend.evaluation.environment import ROOT
from specextend.evaluation.plan import WARM_UP_NEW_TOKENS, Plan, default_output, read_buckets, setting_of
from specextend.evaluation.records import SampleRecord
from specextend.evaluation.run import evaluate
from specextend.evaluation.workers import TRIES, Failure, LocalWorker, warm

WEIGHTS = torch.nn.Linear(2, 2)
SCHEMA = json.loads((ROOT / "results" / "schema.json").read_text())


@dataclass
class Call:
    kind: str
    prompt_tokens: int
    new_tokens: int
    seed: int


@dataclass
class ScriptedEngine:
    """Two drafts accepted per round and half the baseline's time; a word is a token.

    Args:
        before_call: sees each call ahead of its generation, to fail or to interrupt.
        wrong_seeds: seeds whose outputs differ from the baseline's in token 1.
    """

    config: SpecExtendConfig = field(default_factory=SpecExtendConfig.specextend)
    limit: int = 2000
    before_call: Callable[[Call], None] = lambda call: None
    wrong_seeds: tuple[int, ...] = ()
    calls: list[Call] = field(default_factory=list)
    models: SimpleNamespace = field(
        default_factory=lambda: SimpleNamespace(
            name="bundled",
            target_id=str(ROOT / "specextend/models/bundled/target"),
            draft_id="/home/someone/drafts/tiny",
            dtype=torch.float32,
            device=torch.device("cpu"),
            ranks=1,
            target=WEIGHTS,
            draft=None,
        )
    )

    def encode(self, text: str) -> torch.Tensor:
        return torch.arange(len(text.split()))

    def max_prompt_tokens(self, max_new_tokens: int) -> int:
        return self.limit - max_new_tokens

    def generate(self, prompt: torch.Tensor, max_new_tokens: int, *, sampling: SamplingConfig) -> Generation:
        token_ids = self._begin("method", prompt, max_new_tokens, sampling)
        if sampling.seed in self.wrong_seeds:
            token_ids[1] += 1
        groups = [token_ids[start : start + 3] for start in range(1, max_new_tokens, 3)]
        rounds = [Round(group, 50, 2, {"draft": 0.5, "verify": 0.5}) for group in groups]
        return Generation(len(prompt), token_ids, "", "length", rounds, {"target": 1.0, "draft": 1.0})

    def autoregressive(self, prompt: torch.Tensor, max_new_tokens: int, *, sampling: SamplingConfig) -> Generation:
        token_ids = self._begin("autoregressive", prompt, max_new_tokens, sampling)
        rounds = [Round([token], 0, 0, {"verify": 1.0}) for token in token_ids[1:]]
        return Generation(len(prompt), token_ids, "", "length", rounds, {"target": 1.0})

    def _begin(self, kind: str, prompt: torch.Tensor, max_new_tokens: int, sampling: SamplingConfig) -> list[int]:
        call = Call(kind, len(prompt), max_new_tokens, sampling.seed)
        self.before_call(call)
        self.calls.append(call)
        return list(range(max_new_tokens))

    def measured(self) -> list[Call]:
        return [call for call in self.calls if call.new_tokens > WARM_UP_NEW_TOKENS]


@pytest.fixture
def data_dir(tmp_path) -> Path:
    """Three prompts of 100 and of 1,500 words."""
    folder = tmp_path / "toy"
    folder.mkdir()
    for label, words in (("1K", 1500), ("128", 100)):
        lines = [json.dumps({"text": " ".join([f"word{sample}"] * words)}) for sample in range(3)]
        (folder / f"toy_{label}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def plan_of(data_dir: Path, samples: int = 3, runs: int = 1, lengths: Sequence[str] = (), **settings) -> Plan:
    buckets = read_buckets(data_dir, samples, lengths)
    return Plan("toy", buckets, runs_per_sample=runs, max_new_tokens=25, **settings)


def by(engine: ScriptedEngine) -> LocalWorker:
    return LocalWorker(lambda method: engine)


def quiet() -> Console:
    return Console(file=io.StringIO(), width=120)


def records_of(output: Path) -> list[SampleRecord]:
    lines = output.with_suffix(".jsonl").read_text().splitlines()[1:]
    return [SampleRecord.from_json(json.loads(line)) for line in lines]


def stop_before(call_number: int, error: type[BaseException]) -> Callable[[Call], None]:
    """Raises `error` instead of the `call_number`-th measured generation."""
    seen = []

    def before_call(call: Call) -> None:
        seen.extend([call] if call.new_tokens > WARM_UP_NEW_TOKENS else [])
        if len(seen) == call_number:
            raise error

    return before_call


def test_evaluate_writes_valid_figures_per_length(data_dir, tmp_path):
    output = tmp_path / "out" / "toy.json"
    summary = evaluate(by(ScriptedEngine()), plan_of(data_dir, runs=2), output, console=quiet())

    report = json.loads(output.read_text())
    Draft202012Validator(SCHEMA).validate(report)
    line_schema = Draft202012Validator({"$ref": "#/$defs/journal_line", "$defs": SCHEMA["$defs"]})
    for line in output.with_suffix(".jsonl").read_text().splitlines():
        line_schema.validate(json.loads(line))

    assert list(report) == ["128", "1K", "manifest"]
    figures = report["1K"]
    # 24 tokens after the first in 8 rounds of 1 s; the baseline takes 24 s; prefills 2 s and 1 s
    assert figures["avg_accept_length"] == 2 and figures["tokens_per_round"] == 3
    assert figures["speedup_decode"] == pytest.approx(3) and figures["speedup"] == pytest.approx(25 / 10)
    assert (figures["runs"], figures["samples"], figures["equal_to_autoregressive"]) == (6, 3, 3)
    assert figures["prompt_tokens"] == {"mean": 1500, "min": 1500, "max": 1500}
    assert summary["output"] == str(output) and summary["lengths"]["1K"]["speedup_decode"] == pytest.approx(3)


def test_one_run_costs_one_generation_of_each_kind_and_a_short_warm_up_per_length(data_dir, tmp_path):
    engine = ScriptedEngine()
    evaluate(by(engine), plan_of(data_dir), tmp_path / "toy.json", console=quiet())
    assert sorted(call.kind for call in engine.measured()) == ["autoregressive"] * 6 + ["method"] * 6
    warm_ups = [(call.kind, call.prompt_tokens) for call in engine.calls if call not in engine.measured()]
    assert warm_ups == [(kind, prompt_tokens) for prompt_tokens in (100, 1500) for kind in ("autoregressive", "method")]
    kinds = [call.kind for call in engine.measured()][:4]
    assert kinds == ["autoregressive", "method", "method", "autoregressive"]  # they take turns


def test_runs_of_a_sample_differ_in_their_seed_which_method_and_baseline_share(data_dir, tmp_path):
    engine = ScriptedEngine()
    sampling = SamplingConfig(temperature=0.8, seed=7)
    evaluate(by(engine), plan_of(data_dir, 2, 2, ["128"], sampling=sampling), tmp_path / "toy.json", console=quiet())
    for kind in ("method", "autoregressive"):
        assert [call.seed for call in engine.measured() if call.kind == kind] == [7, 8, 1007, 1008]
    assert [record.seed for record in records_of(tmp_path / "toy.json")] == [7, 8, 1007, 1008]


def test_outputs_that_differ_are_counted_and_located(data_dir, tmp_path):
    output = tmp_path / "toy.json"
    evaluate(by(ScriptedEngine(wrong_seeds=(1001,))), plan_of(data_dir, 3, 2, ["128"]), output, console=quiet())
    figures = json.loads(output.read_text())["128"]
    assert (figures["equal_to_autoregressive"], figures["samples"]) == (2, 3)
    assert [record.first_difference for record in records_of(output)] == [None, None, None, 1, None, None]


def test_prompts_too_long_for_the_models_are_cut_and_marked(data_dir, tmp_path):
    output = tmp_path / "toy.json"
    engine = ScriptedEngine(limit=500)
    evaluate(by(engine), plan_of(data_dir, 1), output, console=quiet())
    assert [(record.bucket, record.cut, record.prompt_tokens) for record in records_of(output)] == [
        ("128", False, 100),
        ("1K", True, 475),
    ]
    report = json.loads(output.read_text())
    assert (report["128"]["cut"], report["1K"]["cut"]) == (0, 1)
    assert max(call.prompt_tokens for call in engine.calls) == 475


def test_an_interrupted_evaluation_resumes_where_it_stopped(data_dir, tmp_path):
    output = tmp_path / "toy.json"
    # Dies inside the fifth sample, and its last line is torn.
    with pytest.raises(MemoryError):
        evaluate(
            by(ScriptedEngine(before_call=stop_before(9, MemoryError))), plan_of(data_dir), output, console=quiet()
        )
    assert len(records_of(output)) == 4
    journal = output.with_suffix(".jsonl")
    journal.write_bytes(journal.read_bytes()[:-20])

    engine = ScriptedEngine()
    evaluate(by(engine), plan_of(data_dir), output, console=quiet())
    assert [record.key for record in records_of(output)] == [
        (bucket, sample, 0) for bucket in ("128", "1K") for sample in range(3)
    ]
    assert len(engine.measured()) == 2 * 3  # the torn one and the two missing
    again = ScriptedEngine()
    evaluate(by(again), plan_of(data_dir), output, console=quiet())
    assert again.calls == [] and json.loads(output.read_text())["1K"]["samples"] == 3


def test_ctrl_c_keeps_the_records_writes_the_figures_and_exits_130(data_dir, tmp_path, capsys):
    output = tmp_path / "toy.json"
    engine = ScriptedEngine(before_call=stop_before(4, KeyboardInterrupt))
    with pytest.raises(SystemExit) as stopped:
        evaluate(by(engine), plan_of(data_dir), output, console=quiet())
    assert stopped.value.code == 130
    assert len(records_of(output)) == 1 and json.loads(output.read_text())["128"]["runs"] == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "1 records kept" in message and "resumes" in message


def test_ctrl_c_before_the_first_record_leaves_nothing(data_dir, tmp_path):
    engine = ScriptedEngine(before_call=stop_before(1, KeyboardInterrupt))
    with pytest.raises(SystemExit):
        evaluate(by(engine), plan_of(data_dir), tmp_path / "out" / "toy.json", console=quiet())
    assert not (tmp_path / "out").exists()


def test_another_setting_is_refused_until_fresh(data_dir, tmp_path):
    output = tmp_path / "toy.json"
    evaluate(by(ScriptedEngine()), plan_of(data_dir, 1), output, console=quiet())
    small = ScriptedEngine(SpecExtendConfig.specextend(tree=TreeConfig(nodes=8)))
    with pytest.raises(ConfigError, match=r"setting\.config\.tree\.nodes was 50, now 8"):
        evaluate(by(small), plan_of(data_dir, 1), output, console=quiet())
    evaluate(by(small), plan_of(data_dir, 1), output, fresh=True, console=quiet())
    report = json.loads(output.read_text())
    assert report["manifest"]["setting"]["config"]["tree"]["nodes"] == 8 and report["1K"]["runs"] == 1


def test_fresh_keeps_the_old_results_until_the_first_new_record_and_then_moves_them_aside(data_dir, tmp_path):
    output = tmp_path / "toy.json"
    evaluate(by(ScriptedEngine()), plan_of(data_dir, 1), output, console=quiet())
    old = {path.name: path.read_bytes() for path in tmp_path.glob("toy.*")}
    assert set(old) == {"toy.json", "toy.jsonl"}

    with pytest.raises(CapacityError):  # a request that cannot be met
        evaluate(by(ScriptedEngine(limit=20)), plan_of(data_dir, 1), output, fresh=True, console=quiet())
    with pytest.raises(SystemExit):  # ended before anything was measured
        stopped = ScriptedEngine(before_call=stop_before(1, KeyboardInterrupt))
        evaluate(by(stopped), plan_of(data_dir, 1), output, fresh=True, console=quiet())
    assert {path.name: path.read_bytes() for path in tmp_path.glob("toy.*")} == old

    for suffix in (".bak", ".bak2"):
        evaluate(by(ScriptedEngine()), plan_of(data_dir, 2), output, fresh=True, console=quiet())
        assert (tmp_path / f"toy.json{suffix}").is_file() and (tmp_path / f"toy.jsonl{suffix}").is_file()
    assert {name: (tmp_path / f"{name}.bak").read_bytes() for name in old} == old
    assert len(records_of(output)) == 4


def test_a_second_evaluation_of_one_output_ends_at_once_and_the_first_stays_whole(data_dir, tmp_path):
    output = tmp_path / "toy.json"
    refused = []

    def second(call: Call) -> None:
        if call.kind == "method" and not refused:
            refused.append(None)
            with pytest.raises(ConfigError, match="is being written by another evaluation"):
                evaluate(by(ScriptedEngine()), plan_of(data_dir), output, console=quiet())

    evaluate(by(ScriptedEngine(before_call=second)), plan_of(data_dir), output, console=quiet())
    assert refused and len(records_of(output)) == 6
    assert sorted(path.name for path in tmp_path.glob("toy.*")) == ["toy.json", "toy.jsonl"]


def test_an_answer_longer_than_the_model_is_refused_before_anything_runs(data_dir, tmp_path):
    engine = ScriptedEngine(limit=25)
    with pytest.raises(CapacityError, match="max_gen_len is 25, but the model holds 25 positions"):
        evaluate(by(engine), plan_of(data_dir), tmp_path / "toy.json", console=quiet())
    assert not engine.calls


def test_seeds_stay_in_their_range_whatever_seed_is_asked_for(data_dir):
    plan = plan_of(data_dir, 2, 2, ["128"], sampling=SamplingConfig(seed=2**63 - 1))
    assert [task.seed for task in plan.tasks()] == [2**63 - 1, 0, 999, 1000]


def test_what_was_captured_meanwhile_is_measured_again_on_a_gpu(monkeypatch):
    def generate() -> SimpleNamespace:
        seconds.append(seconds[-1] - 1)
        return SimpleNamespace(capture_s=float(max(0, seconds[-1])))

    for gpu, first, calls in ((True, 2, 2), (True, 1, 1), (True, 9, TRIES), (False, 2, 1)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        seconds = [first]
        warm(generate)
        assert len(seconds) - 1 == calls


def test_a_journal_tells_apart_weights_and_backends(data_dir, tmp_path):
    output = tmp_path / "toy.json"
    evaluate(by(ScriptedEngine()), plan_of(data_dir, 1), output, console=quiet())
    other = ScriptedEngine()
    other.models.target = torch.nn.Linear(2, 2)
    with pytest.raises(ConfigError, match=r"setting\.weights\.target was"):
        evaluate(by(other), plan_of(data_dir, 1), output, console=quiet())
    captured = ScriptedEngine()
    captured.backend = "graphs"
    with pytest.raises(ConfigError, match=r"setting\.backend was 'eager', now 'graphs'"):
        evaluate(by(captured), plan_of(data_dir, 1), output, console=quiet())


def test_changed_prompts_are_refused(data_dir, tmp_path):
    output = tmp_path / "toy.json"
    evaluate(by(ScriptedEngine()), plan_of(data_dir, 2), output, console=quiet())
    path = data_dir / "toy_128.jsonl"
    path.write_text(path.read_text().replace("word1", "other"))
    with pytest.raises(ConfigError, match="128 sample 2 run 1 with another text"):
        evaluate(by(ScriptedEngine()), plan_of(data_dir, 2), output, console=quiet())


def test_a_larger_evaluation_keeps_the_records_of_a_smaller_one(data_dir, tmp_path):
    output = tmp_path / "toy.json"
    evaluate(by(ScriptedEngine()), plan_of(data_dir, 1, lengths=["1K"]), output, console=quiet())
    engine = ScriptedEngine()
    evaluate(by(engine), plan_of(data_dir, 3), output, console=quiet())
    assert len(engine.measured()) == 2 * 5
    assert list(json.loads(output.read_text())) == ["128", "1K", "manifest"]


def test_bad_requests_are_named_errors(data_dir, tmp_path):
    with pytest.raises(InputError, match="no length 3K; it has 128, 1K"):
        read_buckets(data_dir, 1, ["3K"])
    with pytest.raises(ConfigError, match="samples_per_length is 0"):
        read_buckets(data_dir, 0)
    with pytest.raises(ConfigError, match="runs_per_sample is 0"):
        plan_of(data_dir, runs=0)
    with pytest.raises(ConfigError, match=r"must end in \.json"):
        evaluate(by(ScriptedEngine()), plan_of(data_dir), tmp_path / "toy.jsonl", console=quiet())


def test_setting_names_no_local_path_and_the_default_output_names_the_setting(data_dir):
    setting = setting_of(ScriptedEngine(), plan_of(data_dir))
    assert (setting["target"], setting["draft"]) == ("bundled/target", "tiny")
    assert default_output(setting) == Path("results/toy_bundled_tiny_specextend.json")
    sampled = setting_of(
        ScriptedEngine(SpecExtendConfig.standard()), plan_of(data_dir, sampling=SamplingConfig(temperature=0.8))
    )
    assert default_output(sampled) == Path("results/toy_bundled_tiny_standard_t0.8.json")


def test_output_without_a_terminal_is_plain_lines_and_a_table(data_dir, tmp_path):
    console = quiet()
    evaluate(by(ScriptedEngine()), plan_of(data_dir, 2), tmp_path / "toy.json", console=console)
    text = console.file.getvalue()
    assert "\x1b" not in text and "\r" not in text
    assert "128 sample 1/2 run 1/1: 2.5 tok/s (AR 1.0), 0:00:0" in text
    (row,) = (line for line in text.splitlines() if "1,500" in line)
    assert row.replace("│", " ").split() == ["1K", "1,500", "2.00", "3.00", "1.0", "2.5", "2.50", "3.00", "2/2"]


def test_progress_on_a_terminal_ends_in_the_table(data_dir, tmp_path):
    console = Console(file=io.StringIO(), width=120, force_terminal=True)
    evaluate(by(ScriptedEngine()), plan_of(data_dir, 2), tmp_path / "toy.json", console=console)
    text = console.file.getvalue()
    assert "measuring" in text and "speedup decode" in text


def test_eval_classic_prints_the_summary_as_json_on_its_last_line(data_dir, tmp_path, monkeypatch, capsys):
    engine = ScriptedEngine()
    monkeypatch.setattr(commands, "load_models", lambda *_, **__: engine.models)
    monkeypatch.setattr(commands, "uniform_engine", lambda *_, **__: engine)
    monkeypatch.setattr(commands.flags, "config_from", lambda args, models, *_: engine.config)
    output = tmp_path / "toy.json"
    flags = ["--data_dir", data_dir, "-n", 2, "-r", 1, "--max_gen_len", 25, "--output_file", output, "--lengths", "1K"]
    monkeypatch.setattr("sys.argv", ["eval_classic.py", *map(str, flags)])
    eval_classic.main()
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["output"] == str(output) and list(summary["lengths"]) == ["1K"]


@pytest.fixture
def eval_on_toys(data_dir, tmp_path, monkeypatch):
    """eval_on_toys(*flags): runs eval_classic.py with a scripted engine; the output file."""

    def call(*flags: str) -> Path:
        output = tmp_path / "toy.json"
        words = f"-n 3 -r 1 -max 25 --lengths 128 --data_dir {data_dir} --output_file {output}".split()
        monkeypatch.setattr("sys.argv", ["eval_classic.py", *words, *flags])
        eval_classic.main()
        return output

    return call


class OneGivenUp(LocalWorker):
    """Gives up sample 1, and has no further trouble."""

    def measure(self, plan, tasks, watch):
        for task, record in super().measure(plan, tasks, watch):
            yield task, Failure("it is cursed") if task.key[1] == 1 else record


def test_samples_that_were_given_up_are_named_at_the_end_and_the_rest_is_written(eval_on_toys, monkeypatch, tmp_path):
    worker = OneGivenUp(lambda method: ScriptedEngine())
    monkeypatch.setattr(commands, "_workers", lambda *_: nullcontext(worker))
    with pytest.raises(WorkerError, match=r"^1 samples could not.*standard, 128 sample 2 run 1 \(it is cursed\)\. The"):
        eval_on_toys()
    assert [record.sample for record in records_of(tmp_path / "toy.json")] == [0, 2]
    assert json.loads((tmp_path / "toy.json").read_text())["128"]["samples"] == 2


def test_ray_is_neither_imported_nor_missed_unless_it_is_asked_for(eval_on_toys, monkeypatch):
    program = "import sys, eval_classic, eval_eagle; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0
    monkeypatch.setattr(commands.importlib.util, "find_spec", lambda name: None)
    for flags in (["--ray"], ["--ray_address", "auto"]):
        with pytest.raises(ConfigError, match="not installed; run: pip install ray psutil$"):
            eval_on_toys(*flags)
    with pytest.raises(ConfigError, match="--max_workers is of no use without --ray"):
        eval_on_toys("--max_workers", "2")

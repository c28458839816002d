"""Evaluations of several arms: who is measured when, the journal, and a run on the bundled pair."""

import io
import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from jsonschema import Draft202012Validator
from made_records import answer, panel
from rich.console import Console

import eval_classic
from specextend.cli import commands, engines
from specextend.config import SamplingConfig, SpecExtendConfig
from specextend.decoding.output import Generation, Round
from specextend.errors import ConfigError, InputError
from specextend.evaluation.environment import ROOT
from specextend.evaluation.panel import Panel, PanelPlan, order_of
from specextend.evaluation.panel_run import evaluate_panels
from specextend.evaluation.plan import WARM_UP_NEW_TOKENS, read_buckets

ARMS = ("standard", "specextend", "specextend:top_k=8")
WEIGHTS = torch.nn.Linear(2, 2)


@dataclass
class Calls:
    """What all engines of a run were asked for; `before` sees each name ahead of its generation."""

    before: Callable[[str], None] = lambda name: None
    made: list[tuple[str, int, int, SamplingConfig]] = field(default_factory=list)

    def measured(self) -> list[tuple[str, int, int, SamplingConfig]]:
        return [call for call in self.made if call[2] > WARM_UP_NEW_TOKENS]


@dataclass
class ScriptedEngine:
    """Two drafts accepted per round; a word is a token."""

    name: str
    calls: Calls
    gain: float = 2.0
    config: SpecExtendConfig = field(default_factory=SpecExtendConfig.specextend)
    limit: int = 5000
    models = SimpleNamespace(
        name="bundled", target_id="bundled", draft_id="tiny", dtype=torch.float32, device=torch.device("cpu"), ranks=1,
        target=WEIGHTS, draft=None,
    )  # fmt: skip

    def encode(self, text: str) -> torch.Tensor:
        return torch.arange(len(text.split()))

    def max_prompt_tokens(self, max_new_tokens: int) -> int:
        return self.limit - max_new_tokens

    def generate(self, ids, max_new_tokens: int, *, sampling: SamplingConfig) -> Generation:
        return self._done(self.name, ids, max_new_tokens, sampling, 1 / self.gain)

    def autoregressive(self, ids, max_new_tokens: int, *, sampling: SamplingConfig) -> Generation:
        return self._done("AR", ids, max_new_tokens, sampling, 1.0)

    def _done(self, name: str, ids, max_new_tokens: int, sampling: SamplingConfig, seconds: float) -> Generation:
        self.calls.before(name)
        self.calls.made.append((name, len(ids), max_new_tokens, sampling))
        tokens = list(range(max_new_tokens))
        rounds = [Round([token], 50, 2, {"verify": seconds}) for token in tokens[1:]]
        return Generation(len(ids), tokens, "", "length", rounds, {"target": 1.0})


@pytest.fixture
def data_dirs(tmp_path) -> list[Path]:
    """Two data sets of three prompts, the second without the longer length."""
    folders = []
    for name, lengths in (("one", {"128": 100, "256": 200}), ("two", {"128": 80})):
        folder = tmp_path / name
        folder.mkdir()
        for label, words in lengths.items():
            lines = [json.dumps({"text": " ".join([f"{name}{sample}"] * words)}) for sample in range(3)]
            (folder / f"{name}_{label}.jsonl").write_text("\n".join(lines) + "\n")
        folders.append(folder)
    return folders


def plan_of(folders: list[Path], samples: int = 3, temperatures=(0.7, 0.0), **settings) -> PanelPlan:
    data = {folder.name: read_buckets(folder, samples) for folder in folders}
    return PanelPlan(data, temperatures, max_new_tokens=20, **settings)


def engines_of(calls: Calls) -> dict[str, ScriptedEngine]:
    return {name: ScriptedEngine(name, calls, gain) for name, gain in zip(ARMS, (1.5, 2.0, 3.0), strict=True)}


def evaluate(plan: PanelPlan, output: Path, calls: Calls | None = None, **options) -> dict:
    console = Console(file=io.StringIO(), width=160)
    return evaluate_panels(engines_of(calls or Calls()), plan, output, console=console, **options)


def panels_of(output: Path) -> list[Panel]:
    lines = output.with_suffix(".jsonl").read_text().splitlines()[1:]
    return [Panel.from_json(json.loads(line)) for line in lines]


# --- the plan -------------------------------------------------------------------------------------------------------


def test_a_plan_takes_one_prompt_of_every_cell_before_the_next_the_longest_first(data_dirs):
    keys = [task.key for task in plan_of(data_dirs).tasks()]
    first = [("one", "256", 0.7), ("one", "256", 0.0), ("one", "128", 0.7), ("one", "128", 0.0), ("two", "128", 0.7)]
    assert [key[:3] for key in keys[:6]] == [*first, ("two", "128", 0.0)]
    assert [key.sample for key in keys] == [sample for sample in range(3) for _ in range(6)]
    for stopped in range(len(keys)):
        counts = Counter(key[:3] for key in keys[: stopped + 1])
        assert max(counts.values()) - (min(counts.values()) if len(counts) == 6 else 0) <= 1


def test_the_order_of_the_arms_is_turned_round_from_prompt_to_prompt_and_within_a_cell(data_dirs):
    tasks = list(plan_of(data_dirs).tasks())
    assert order_of(ARMS, 0) == ["AR", *ARMS] and order_of(ARMS, 1) == [*ARMS[::-1], "AR"]
    for before, after in pairwise(tasks):
        if before.key.sample == after.key.sample:
            assert (before.turn + after.turn) % 2
    for cell in {task.key[:3] for task in tasks}:
        assert [task.turn % 2 for task in tasks if task.key[:3] == cell] in ([0, 1, 0], [1, 0, 1])


def test_seeds_are_those_of_a_prompt_whatever_its_data_set_and_temperature(data_dirs):
    tasks = plan_of(data_dirs, sampling=SamplingConfig(seed=7), runs_per_sample=2).tasks()
    assert {(task.key.sample, task.key.run, task.seed) for task in tasks} == {
        (sample, run, 7 + 1000 * sample + run) for sample in range(3) for run in range(2)
    }


def test_temperatures_are_checked(data_dirs):
    with pytest.raises(ConfigError, match="temperature 0.7 is there twice"):
        plan_of(data_dirs, temperatures=(0.7, 0.7))
    with pytest.raises(ConfigError, match="temperature is -1"):
        plan_of(data_dirs, temperatures=(-1.0,))


# --- a run ----------------------------------------------------------------------------------------------------------


def test_every_arm_and_one_baseline_answer_every_prompt_and_warm_ups_are_dropped(data_dirs, tmp_path):
    calls, output = Calls(), tmp_path / "out" / "a.json"
    summary = evaluate(plan_of(data_dirs), output, calls)
    assert summary["panels"] == 18 and summary["left"] == 0 and summary["arms"] == list(ARMS)
    assert Counter(name for name, *_ in calls.measured()) == dict.fromkeys(("AR", *ARMS), 18)
    warm_ups = [call[:2] for call in calls.made if call not in calls.measured()]
    assert warm_ups == [(name, words) for words in (200, 100) for name in ("AR", *ARMS)]
    schema = json.loads((ROOT / "results" / "schema.json").read_text())
    line_schema = Draft202012Validator({"$ref": "#/$defs/panel_line", "$defs": schema["$defs"]})
    for line in output.with_suffix(".jsonl").read_text().splitlines():
        line_schema.validate(json.loads(line))
    found = panels_of(output)
    names = [name for name, *_ in calls.measured()]
    assert [name for one in found for name in one.order] == names
    assert found[0].order == ["AR", *ARMS] and found[1].order == [*ARMS[::-1], "AR"]
    for one in found:
        assert list(one.arms) == list(ARMS) and one.autoregressive.accepted == []
        assert one.arms["standard"].equal_to_autoregressive and one.arms["standard"].accepted == [2] * 19
    assert {sampling.temperature for *_, sampling in calls.measured()} == {0.7, 0.0}


def test_the_file_of_figures_holds_those_of_every_cell(data_dirs, tmp_path):
    output = tmp_path / "a.json"
    evaluate(plan_of(data_dirs), output)
    report = json.loads(output.read_text())
    assert list(report["manifest"]["setting"]["arms"]) == list(ARMS)
    rows = {(row["temperature"], row["length"], row["data"], row["arm"]): row for row in report["figures"]}
    assert len(rows) == 2 * (3 + 2) * len(ARMS)
    assert rows[0.7, "128", "all", "specextend"]["prompts"] == 6
    assert rows[0.0, "256", "one", "specextend:top_k=8"]["speedup_decode"]["mean"] == pytest.approx(3)


def test_a_panel_that_was_begun_is_measured_anew_as_a_whole(data_dirs, tmp_path):
    output, plan, seen = tmp_path / "a.json", plan_of(data_dirs), []

    def stop(name: str) -> None:
        seen.append(name)
        if len(seen) == 4 + 4 + 4 + 3:  # warm-up and two panels, and the third but for its last arm
            raise MemoryError

    with pytest.raises(MemoryError):
        evaluate(plan, output, Calls(stop))
    assert len(panels_of(output)) == 2
    path = output.with_suffix(".jsonl")
    path.write_bytes(path.read_bytes()[:-9])  # and torn by a kill
    calls = Calls()
    assert evaluate(plan, output, calls)["panels"] == 18
    assert Counter(name for name, *_ in calls.measured()) == dict.fromkeys(("AR", *ARMS), 17)
    assert [one.key for one in panels_of(output)] == [task.key for task in plan.tasks()]
    again = Calls()
    evaluate(plan, output, again)
    assert not again.made


def test_a_run_out_of_seconds_stops_behind_a_prompt_and_the_next_goes_on(data_dirs, tmp_path, monkeypatch):
    output, plan = tmp_path / "a.json", plan_of(data_dirs)
    console, clock = Console(file=io.StringIO(), width=160), iter(range(10**6))
    monkeypatch.setattr("specextend.evaluation.panel_run.time", SimpleNamespace(monotonic=lambda: next(clock)))
    summary = evaluate_panels(engines_of(Calls()), plan, output, until=5, console=console)
    assert (summary["panels"], summary["left"]) == (5, 13) and len(panels_of(output)) == 5
    assert "stopped, since its seconds are over: 13 panels are left, 5 are in" in console.file.getvalue()
    assert evaluate(plan, output, until=time.monotonic() + 1e6)["left"] == 0


def test_ctrl_c_keeps_the_panels_and_writes_their_figures(data_dirs, tmp_path, capsys):
    output, seen = tmp_path / "a.json", []

    def stop(name: str) -> None:
        seen.append(name)
        if len(seen) == 4 + 4 + 2:
            raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stopped:
        evaluate(plan_of(data_dirs), output, Calls(stop))
    assert stopped.value.code == 130 and len(panels_of(output)) == 1
    assert len(json.loads(output.read_text())["figures"]) == len(ARMS)
    assert "1 panels kept" in capsys.readouterr().err


def test_a_run_can_be_extended_but_not_by_other_arms_or_prompts(data_dirs, tmp_path):
    output = tmp_path / "a.json"
    evaluate(plan_of(data_dirs[:1], 1, (0.0,)), output)
    calls = Calls()
    evaluate(plan_of(data_dirs, 2), output, calls)
    assert len(panels_of(output)) == 12 and len(calls.measured()) == 10 * 4
    fewer = dict(list(engines_of(Calls()).items())[:2])
    with pytest.raises(ConfigError, match="arms.specextend:top_k=8.method was 'specextend', now None"):
        evaluate_panels(fewer, plan_of(data_dirs), output, console=Console(file=io.StringIO()))
    path = data_dirs[0] / "one_128.jsonl"
    path.write_text(path.read_text().replace("one1", "other"))
    with pytest.raises(ConfigError, match="one 128 temperature 0.7 sample 2 run 1 with another text"):
        evaluate(plan_of(data_dirs), output)


def test_a_panel_survives_its_journal_and_gives_the_record_of_each_arm():
    one = panel({"specextend": answer(price=30.0, plain_share=0.25, loops=True)}, gpu={"sm_mhz": 1980.0})
    assert Panel.from_json(json.loads(json.dumps(one.to_json()))) == one
    record = one.record_of("specextend")
    assert record.autoregressive is one.autoregressive.timing and record.key == ("1K", 0, 0)


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def eval_classic_on(data_dirs, tmp_path, monkeypatch, capsys):
    """eval_classic_on(*words): runs the script on both data sets; its last line."""

    def call(*words: str) -> dict:
        given = ["--data_dir", *map(str, data_dirs), "-n", "1", "-r", "1", "-max", "12", "--output_file"]
        monkeypatch.setattr("sys.argv", ["eval_classic.py", *given, str(tmp_path / "a.json"), *words])
        eval_classic.main()
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return call


def test_eval_classic_measures_arms_of_the_bundled_pair(eval_classic_on, tmp_path, capsys):
    summary = eval_classic_on("--arms", "standard", "specextend:top_k=4,nodes=6", "-l", "128", "-t", "0.7")
    assert summary["panels"] == 2 and summary["arms"] == ["standard", "specextend:top_k=4,nodes=6"]
    found = panels_of(tmp_path / "a.json")
    assert [(one.data, one.bucket, one.temperature) for one in found] == [("one", "128", 0.7), ("two", "128", 0.7)]
    assert all(arm.equal_to_autoregressive for one in found for arm in one.arms.values())
    setting = json.loads((tmp_path / "a.jsonl").read_text().splitlines()[0])["setting"]
    config = setting["arms"]["specextend:top_k=4,nodes=6"]["config"]
    assert (config["retrieval"]["top_k"], config["tree"]["nodes"]) == (4, 6)


@pytest.mark.parametrize(
    "words, message",
    [
        ("--arms standard --method standard", "--arms takes the place of --method; give one"),
        ("--arms standard --use_specextend", "--arms takes the place of --use_specextend"),
        ("--arms standard --ray", "--arms and --ray cannot be combined"),
        ("--arms standard --tensor_parallel", "--arms and --tensor_parallel cannot be combined"),
        ("--arms standard --seconds 0", "--seconds is 0; give a number above 0"),
        ("--arms standard standard", "arm standard is there twice"),
        ("--arms standard:depth=3", "setting 'depth' is unknown"),
        ("--arms standard -t 0 -1", "temperature is -1.0"),
        ("--arms standard -l 2K", "has no length 2K"),
        ("--method standard", "--data_dir takes several folders with --arms alone"),
        ("--arms standard -n 0", "samples_per_length is 0"),
    ],
)
def test_mistakes_are_found_before_the_models_are_loaded(words, message, eval_classic_on, monkeypatch):
    monkeypatch.setattr(commands, "load_pair", lambda args: pytest.fail("loaded"))
    with pytest.raises((ConfigError, InputError)) as error:
        eval_classic_on(*words.split())
    assert message in str(error.value) and "\n" not in str(error.value)


def test_several_temperatures_and_seconds_are_for_arms(eval_classic_on, data_dirs):
    one = ("--data_dir", str(data_dirs[0]))
    with pytest.raises(ConfigError, match="--temperature takes several values with --arms alone"):
        eval_classic_on(*one, "-t", "0", "1")
    with pytest.raises(ConfigError, match="--seconds is of no use without --arms"):
        eval_classic_on(*one, "--seconds", "5")


def test_an_arm_that_cannot_be_captured_runs_eager_beside_the_others_and_is_named(monkeypatch, capsys):
    class Engine:
        why_eager = "it is not captured"

        def __init__(self, models, config, *, eager: bool, prefix_reuse: bool):
            self.config, self.eager, self.models = config, eager, models
            assert not prefix_reuse
            self.backend = "graphs" if config.hybrid_tree_attention and not eager else "eager"

        def with_config(self, config):
            return Engine(self.models, config, eager=self.eager, prefix_reuse=False)

    monkeypatch.setattr(engines, "SpecExtend", Engine)
    models = SimpleNamespace(device=torch.device("cuda"))
    configs = {"specextend": SpecExtendConfig.specextend(), "standard": SpecExtendConfig.standard()}
    made = engines.arm_engines(models, configs, eager=False)
    assert {name: engine.backend for name, engine in made.items()} == {"specextend": "graphs", "standard": "eager"}
    assert capsys.readouterr().err == "standard runs eager (it is not captured); --eager runs all arms so\n"
    assert {one.backend for one in engines.arm_engines(models, configs, eager=True).values()} == {"eager"}

"""Evaluation on Ray: a real cluster on this machine, workers that are killed, samples that kill, Ctrl-C."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from jsonschema import Draft202012Validator
from rich.console import Console

from specextend.config import SamplingConfig, SpecExtendConfig
from specextend.data.prompts import Prompt
from specextend.engine import SpecExtend
from specextend.errors import ConfigError, WorkerError
from specextend.evaluation.environment import ROOT
from specextend.evaluation.plan import Plan
from specextend.evaluation.records import SampleRecord
from specextend.evaluation.run import evaluate
from specextend.evaluation.workers import LocalWorker
from specextend.models.loading import load_models

ray = pytest.importorskip("ray")

from scripts.bench import ray as bench_ray  # noqa: E402
from specextend.evaluation.ray_workers import RayWorkers, seats_of  # noqa: E402

pytestmark = [
    pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two workers need two cores"),
    pytest.mark.xdist_group("ray"),  # one test's cluster must not come and go beside another's
]
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the workers do not know the tests
LINE_SCHEMA = {"$ref": "#/$defs/journal_line"} | {
    "$defs": json.loads((ROOT / "results" / "schema.json").read_text())["$defs"]
}


class Engines:
    """The bundled pair; some prompts do to the process that generates what their first word says."""

    def __init__(self):
        models = load_models("bundled", dtype="float32", device="cpu")

        class Engine(SpecExtend):
            def encode(self, text):
                self.text = text
                return super().encode(text)

            def generate(self, *args, **options):
                word, folder, *_ = self.text.split()
                tried = len(list(Path(folder).glob(f"{word}*")))
                if word in ("dies-once", "poison"):
                    (Path(folder) / f"{word}{tried}").touch()
                if word == "dies-once" and not tried or word == "poison" and tried:
                    os.kill(os.getpid(), signal.SIGKILL)
                if word == "poison":
                    raise ValueError("there is something\nwrong with this prompt")
                return super().generate(*args, **options)

        self._engine = Engine(models, SpecExtendConfig.specextend())  # rounds that do not depend on clocks

    def __call__(self, method):
        return self._engine


@pytest.fixture(scope="session")
def crew():
    """Two workers with a core each, for one test after the other."""
    with RayWorkers(Engines, device="cpu", cpus_per_worker=1, max_workers=2) as workers:
        workers.wait()
        yield workers


def plan_of(*words: str, folder: object = "none", temperature: float = 0.0) -> Plan:
    """A prompt per word, half of them of each length; `folder` is where prompts may leave notes."""
    prompts = [Prompt(f"{word} {folder} " + "one two three " * 20, f"toy:{index}") for index, word in enumerate(words)]
    half = -(-len(prompts) // 2)
    buckets = {"1K": prompts[:half], "2K": prompts[half:]}
    return Plan("toy", buckets, runs_per_sample=1, max_new_tokens=24, sampling=SamplingConfig(temperature))


def run(workers, plan: Plan, output: Path) -> tuple[dict, dict[tuple, SampleRecord], str]:
    """Summary, records by key, and what was printed; no record may be there twice, or not fit the schema."""
    console = Console(file=io.StringIO(), width=200)
    summary = evaluate(workers, plan, output, console=console)
    return summary, records_of(output), console.file.getvalue()


def records_of(output: Path) -> dict[tuple, SampleRecord]:
    lines = [json.loads(line) for line in output.with_suffix(".jsonl").read_text().splitlines()]
    for line in lines:
        Draft202012Validator(LINE_SCHEMA).validate(line)
    records = [SampleRecord.from_json(line) for line in lines[1:]]
    assert max(Counter(record.key for record in records).values()) == 1
    return {record.key: record for record in records}


def keys_of(plan: Plan) -> set[tuple]:
    return {task.key for task in plan.tasks()}


def pids_of(crew: RayWorkers) -> list[int]:
    return ray.get([member.actor.__ray_call__.remote(lambda self: os.getpid()) for member in crew._ready])


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_acceptance_and_tokens_are_those_of_a_single_process(crew, tmp_path, temperature):
    plan = plan_of("red", "green", "blue", "white", temperature=temperature)
    _, spread, _ = run(crew, plan, tmp_path / "ray.json")
    _, alone, _ = run(LocalWorker(Engines()), plan, tmp_path / "local.json")
    assert set(spread) == set(alone) == keys_of(plan)
    for key, record in spread.items():
        for name in ("accepted", "drafted", "seed", "prompt_tokens", "prompt_sha256", "first_difference"):
            assert getattr(record, name) == getattr(alone[key], name)
        assert record.method.sha256 == alone[key].method.sha256
        assert record.autoregressive.sha256 == alone[key].autoregressive.sha256
    assert len({record.method.sha256 for record in spread.values()}) > 1  # or equality would say nothing


def test_every_worker_has_a_core_of_its_own_and_records_say_so(crew, tmp_path):
    _, records, _ = run(crew, plan_of(*"abcdef"), tmp_path / "a.json")
    workers = [record.worker for record in records.values()]
    assert len({worker.id for worker in workers}) == 2
    assert {(worker.workers_on_host, worker.threads) for worker in workers} == {(2, 1)}
    assert all(worker.host and worker.processor for worker in workers)
    affinities = [frozenset(os.sched_getaffinity(pid)) for pid in pids_of(crew)]
    assert [len(cores) for cores in affinities] == [1, 1] and len(set(affinities)) == 2
    for pid, cores in zip(pids_of(crew), affinities, strict=True):
        assert {frozenset(os.sched_getaffinity(int(task))) for task in os.listdir(f"/proc/{pid}/task")} == {cores}


def test_a_worker_killed_from_outside_is_replaced_and_every_sample_measured_once(crew, tmp_path):
    plan, victims = plan_of(*"abcdefgh"), pids_of(crew)
    measure, killed = crew.measure, []

    class Killed:
        limit, manifest = crew.limit, staticmethod(crew.manifest)

        @staticmethod
        def measure(*args):
            for outcome in measure(*args):
                if not killed:
                    killed.append(victims[0])
                    os.kill(victims[0], signal.SIGKILL)
                yield outcome

    summary, records, said = run(Killed(), plan, tmp_path / "a.json")
    assert set(records) == keys_of(plan) and "failed" not in summary
    assert "the worker died" in said and "it goes to another" in said
    crew.wait()
    assert len(crew) == 2 and killed[0] not in pids_of(crew)
    os.kill(pids_of(crew)[0], signal.SIGKILL)  # one that has nothing to do
    assert crew.manifest(plan)["setting"]["model"] == "bundled" and len(crew) == 2


def test_a_sample_that_kills_its_worker_once_is_measured_elsewhere(crew, tmp_path):
    plan = plan_of("a", "dies-once", "c", "d", folder=tmp_path)
    summary, records, _ = run(crew, plan, tmp_path / "a.json")
    assert len(list(tmp_path.glob("dies-once*"))) >= 2  # warming up counts
    assert set(records) == keys_of(plan) and "failed" not in summary


def test_a_poisoned_sample_is_named_and_the_rest_goes_on(crew, tmp_path):
    plan = plan_of("a", "poison", "c", "d", "e", "f", folder=tmp_path)
    summary, records, said = run(crew, plan, tmp_path / "a.json")
    assert keys_of(plan) - set(records) == {("1K", 1, 0)}
    (named,) = summary["failed"]
    assert named.startswith("1K sample 2 run 1 (3 attempts, at last: the worker died")
    assert "(ValueError: there is something wrong with this prompt); it goes to another" in said
    assert said.count("it goes to another") == 2 and said.count("given up") == 1
    figures = json.loads((tmp_path / "a.json").read_text())
    assert (figures["1K"]["samples"], figures["2K"]["samples"]) == (2, 3)


def test_ctrl_c_ends_the_cluster_and_a_run_without_ray_goes_on(crew, tmp_path):
    output, data = tmp_path / "out.json", tmp_path / "toy"
    data.mkdir()
    lines = [json.dumps({"text": f"word{index} " * 40}) for index in range(4)]
    (data / "toy_512.jsonl").write_text("\n".join(lines) + "\n")
    flags = f"eval_classic.py --data_dir {data} --use_specextend -n 4 -r 1 -max 80 --device cpu --output_file {output}"
    command = [sys.executable, *flags.split()]
    raylets = raylets_running()
    process = subprocess.Popen(
        [*command, "--ray", "--max_workers", "2"], cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # maybe ignored
    )  # fmt: skip
    wait_until(lambda: output.with_suffix(".jsonl").exists() or process.poll() is not None)
    assert raylets_running() != raylets
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, error = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130 and "the same command resumes" in error and "Traceback" not in error
    wait_until(lambda: raylets_running() == raylets)  # a daemon told to end may take a while on a busy machine
    assert raylets_running() == raylets
    before = records_of(output)
    assert 0 < len(before) < 4

    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    after = records_of(output)
    assert len(after) == 4 and {key: after[key] for key in before} == before
    figures = json.loads(output.read_text())["512"]
    assert figures["workers_on_host"] == [1, 2] and figures["speedup"] is None and figures["avg_accept_length"] >= 0


PATIENCE_S = 300  # of a test whose event does not come


def wait_until(happened: Callable[[], bool]) -> None:
    """Wait for an event, however slow the machine is."""
    deadline = time.monotonic() + PATIENCE_S
    while not happened() and time.monotonic() < deadline:
        time.sleep(0.05)


def raylets_running() -> set[int]:
    """Process ids of Ray's daemons on this machine; one that has ended may stay listed until its parent asks."""
    processes = psutil.process_iter(["name", "status"])
    return {one.pid for one in processes if one.info["name"] == "raylet" and one.info["status"] != psutil.STATUS_ZOMBIE}


# ---- without a cluster


def node(name: str, cpus: int, gpus: int = 0, alive: bool = True) -> dict:
    return {"NodeID": name, "Alive": alive, "Resources": {"CPU": float(cpus)} | ({"GPU": float(gpus)} if gpus else {})}


def seats(*nodes: dict, use_gpus: bool = True, cpus: int | None = None, at_most: int | None = None) -> list[tuple]:
    found = seats_of(nodes, use_gpus=use_gpus, cpus_per_worker=cpus, max_workers=at_most)
    return [(seat.node, seat.index, seat.neighbours, seat.cpus, seat.gpus) for seat in found]


def test_there_is_a_seat_per_gpu_with_its_share_of_the_cores():
    assert seats(node("a", 16, 2)) == [("a", 0, 2, 8, 1), ("a", 1, 2, 8, 1)]
    assert seats(node("a", 16, 2), cpus=3) == [("a", 0, 2, 3, 1), ("a", 1, 2, 3, 1)]
    assert seats(node("a", 4, 1), use_gpus=False, cpus=2) == [("a", 0, 2, 2, 0), ("a", 1, 2, 2, 0)]


def test_seats_are_spread_over_hosts_and_count_their_neighbours():
    assert seats(node("b", 5), node("a", 4), node("c", 9, alive=False), cpus=2, at_most=3) == [
        ("a", 0, 2, 2, 0), ("b", 0, 1, 2, 0), ("a", 1, 2, 2, 0),
    ]  # fmt: skip
    assert seats(node("a", 1), cpus=2) == []


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"cpus_per_worker": 0}, "cpus_per_worker is 0"),
        ({"max_workers": 0}, "max_workers is 0"),
        ({"device": "cuda:1"}, "device is 'cuda:1' with Ray"),
    ],
)
def test_flags_that_make_no_sense_are_refused_before_anything_starts(flags, message):
    with pytest.raises(ConfigError, match=message):
        RayWorkers(Engines, **flags)


def test_mistakes_that_workers_find_are_those_of_the_caller_wherever_it_stands(tmp_path):
    script = tmp_path / "script.py"  # one cluster per process
    script.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from specextend.cli.entry import run\nfrom specextend.errors import ModelError\n"
        "from specextend.evaluation.ray_workers import RayWorkers\n"
        "def make(): raise ModelError('model nowhere is unknown')\n"
        "def main():\n"
        "    with RayWorkers(make, device='cpu', max_workers=1) as workers: workers.wait()\n"
        "run(main)\n"
    )
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "ModelError: model nowhere is unknown\n")


def test_a_cluster_that_is_not_there_is_one_line():
    with pytest.raises(WorkerError, match=r"no Ray cluster answers at '127\.0\.0\.1:1'.*ray start --head"):
        RayWorkers(Engines, address="127.0.0.1:1")


def test_the_benchmark_measures_throughput_by_number_of_workers(tmp_path, monkeypatch, capsys):
    class Crew(LocalWorker):
        """One process that takes itself for as many workers as are asked for."""

        def __init__(self, make, max_workers, **_):
            super().__init__(make())
            self._count = max_workers

        def __len__(self):
            return self._count

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def wait(self):
            pass

    monkeypatch.setattr(bench_ray, "RayWorkers", Crew)
    monkeypatch.setattr(bench_ray, "timed_pass", halved_by_workers(bench_ray.timed_pass))
    output = tmp_path / "ray.json"
    flags = f"bench_ray.py --device cpu --samples 4 --length 60 --new_tokens 4 --passes 2 --output {output}"
    monkeypatch.setattr(sys, "argv", flags.split())
    bench_ray.main()
    record = json.loads(output.read_text())
    one, two = record["workers"]["1"], record["workers"]["2"]
    assert (one["samples_per_hour"], two["samples_per_hour"]) == (3600 * 4 / 8, 3600 * 4 / 5)
    assert record["efficiency"] == {"1": 1.0, "2": 8 / 10} and one["samples_by_worker"] == [8]
    assert one["prompt_tokens"] > 20 and record["setting"]["max_gen_len"] == 4 and "environment" in record
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["output"] == str(output)


def halved_by_workers(timed_pass):
    """Seconds that one worker takes 8 of and two take 5 of, whatever the clock says."""

    def measure(workers, plan, tasks):
        _, records = timed_pass(workers, plan, tasks)
        return {1: 8.0, 2: 5.0}[len(workers)], records

    return measure

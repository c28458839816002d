"""Evaluation throughput by number of Ray workers, in samples per hour: results/cpu/ray.json, or where --output says.

    python -m scripts.bench.ray                                                     # CPU, a core per worker
    python -m scripts.bench.ray --shape vicuna_7b --output results/h200x2/ray.json  # a GPU per worker

A sample is one generation by SpecExtend and one autoregressively, as the eval scripts take them. The models are loaded
and every worker is warm before the clock starts; the same samples are measured by each number of workers, several
times, and the median pass counts. With --shape the bundled pair is widened to the cost of large weights, on a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from functools import partial
from pathlib import Path

from scripts.bench.widened import widened
from specextend import SpecExtend
from specextend.cli import flags
from specextend.data.builtin import builtin_text
from specextend.data.prompts import Prompt
from specextend.evaluation.journal import write_json
from specextend.evaluation.plan import Plan, Task
from specextend.evaluation.ray_workers import RayWorkers
from specextend.evaluation.records import SampleRecord
from specextend.evaluation.workers import Unwatched
from specextend.models.loading import load_models

CHARACTERS_PER_TOKEN = 3.5  # of the built-in text, about


def main() -> None:
    args = parse_args()
    record = {
        "command": ["scripts.bench.ray", *sys.argv[1:]], "load_before": os.getloadavg()[0], "passes": args.passes,
        "workers": {},
    }  # fmt: skip
    for count in args.workers:
        record["workers"][count] = throughput(args, count, record)
        record["efficiency"] = efficiency(record["workers"])
        write_json(args.output, record)
        print(f"{count} workers: {record['workers'][count]['samples_per_hour']:.0f} samples per hour", flush=True)
    print(json.dumps({"output": str(args.output), "efficiency": record["efficiency"]}))


def parse_args() -> argparse.Namespace:
    parser = flags.parser(__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="numbers of workers to compare")
    parser.add_argument("--cpus_per_worker", type=int, default=None, help="1 on a CPU, a GPU's share beside it")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--shape", choices=("vicuna_7b",), help="widen the bundled pair to this shape, float16, a GPU")
    parser.add_argument("--samples", type=int, default=8, help="a multiple of every number of workers")
    parser.add_argument("--length", type=int, default=4000, help="prompt tokens, about")
    parser.add_argument("--new_tokens", type=int, default=128)
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("results/cpu/ray.json"))
    return parser.parse_args()


def throughput(args: argparse.Namespace, count: int, record: dict) -> dict:
    """Figures of `count` workers; the first to come says in `record` what is measured where."""
    plan = plan_of(args)
    began = time.monotonic()
    with RayWorkers(
        partial(Engines, args.shape, args.device), device=args.device, cpus_per_worker=args.cpus_per_worker,
        max_workers=count,
    ) as workers:  # fmt: skip
        workers.wait()
        if len(workers) < count:
            sys.exit(f"there is room for {len(workers)} workers here, not {count}")
        ready_s = time.monotonic() - began
        record |= workers.manifest(plan)
        tasks = list(plan.tasks())
        timed_pass(workers, plan, tasks[:count])
        passes = [timed_pass(workers, plan, tasks) for _ in range(args.passes)]
    seconds, records = zip(*passes, strict=True)
    measured = [one for of_pass in records for one in of_pass]
    return {
        "samples_per_hour": 3600 * len(tasks) / statistics.median(seconds),
        "pass_s": seconds,
        "start_and_load_s": ready_s,
        "samples_by_worker": [sum(one.worker.id == worker for one in measured) for worker in range(count)],
        "prompt_tokens": statistics.fmean(one.prompt_tokens for one in measured),
        "decode_tokens_per_s": statistics.median(one.method.decode_tokens_per_s for one in measured),
        "autoregressive_decode_tokens_per_s": statistics.median(
            one.autoregressive.decode_tokens_per_s for one in measured
        ),
        "threads_per_worker": measured[0].worker.threads,
        "processor": measured[0].worker.processor,
    }


def timed_pass(workers: RayWorkers, plan: Plan, tasks: list[Task]) -> tuple[float, list[SampleRecord]]:
    """Wall seconds to measure all of `tasks`, and their records."""
    began = time.monotonic()
    outcomes = [outcome for _, outcome in workers.measure(plan, tasks, Notes())]
    seconds = time.monotonic() - began
    lost = [outcome.reason for outcome in outcomes if not isinstance(outcome, SampleRecord)]
    if lost:
        sys.exit(f"samples were lost: {'; '.join(lost)}")
    return seconds, outcomes


def efficiency(workers: dict[int, dict]) -> dict[int, float]:
    """Throughput per worker over that of the smallest number measured."""
    least = min(workers)
    base = workers[least]["samples_per_hour"] / least
    return {count: figures["samples_per_hour"] / count / base for count, figures in workers.items()}


def plan_of(args: argparse.Namespace) -> Plan:
    """`samples` stretches of the built-in text, evenly spread over it."""
    text, size = builtin_text(), int(args.length * CHARACTERS_PER_TOKEN)
    text *= -(-2 * size // len(text))
    starts = [index * (len(text) - size) // args.samples for index in range(args.samples)]
    prompts = [Prompt(text[start : start + size], f"built-in text:{start}") for start in starts]
    return Plan("built-in", {"all": prompts}, runs_per_sample=1, max_new_tokens=args.new_tokens)


class Engines:
    """The bundled pair under SpecExtend, as it is or widened to the cost of `shape`; loaded in the worker."""

    def __init__(self, shape: str | None, device: str):
        models = load_models("bundled", device=device, dtype="float32")
        self._engine = SpecExtend(models if shape is None else widened(models, shape), prefix_reuse=False)

    def __call__(self, method: str | None) -> SpecExtend:
        return self._engine


class Notes(Unwatched):
    """Says what goes wrong."""

    def note(self, line: str) -> None:
        print(line, flush=True)


if __name__ == "__main__":
    flags.run(main)

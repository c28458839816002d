"""What the server costs beside the library, and whether it holds its memory under a thousand requests.

    python -m scripts.bench.server              # results/cpu/server_overhead.json
    python -m scripts.bench.server --soak 1000  # results/cpu/server_soak.json

Overhead: the same greedy requests to a server process and to the library in this one, in turns; the difference of the
two wall times per generated token, the client's own work included. Soak: four clients send short and longer prompts,
streamed or not, greedy and sampled; some hang up, some send nonsense. Every whole answer is compared with the
library's; the server's resident memory is read after every 50 requests and a line fitted through it.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import torch

from scripts.bench.timing import in_turns
from specextend import SamplingConfig, SpecExtend
from specextend.cli import flags
from specextend.data.builtin import builtin_text
from specextend.evaluation.environment import ROOT, environment
from specextend.evaluation.journal import write_json

CHARACTERS = (200, 2000, 8000)  # of the prompts whose overhead is measured
NEW_TOKENS = 128
REPEATS = 9
CLIENTS, EVERY = 4, 50
SETTLED = 200  # requests after which the line is fitted: caches and the allocator's pools have grown by then
SOAK_TOKENS = 16


def main() -> None:
    parser = flags.parser(__doc__.splitlines()[0])
    parser.add_argument("--soak", type=int, metavar="REQUESTS", help="soak test instead of the overhead")
    parser.add_argument("--threads", type=int, help="of PyTorch on both sides; else its default")
    parser.add_argument("--output", type=Path, help="else under results/cpu/")
    args = parser.parse_args()
    if args.soak is not None and args.soak < EVERY:
        parser.error(f"--soak is {args.soak}; ask for at least {EVERY} requests")
    name = "server_overhead" if args.soak is None else "server_soak"
    output = args.output or ROOT / f"results/cpu/{name}.json"
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    engine = SpecExtend.from_pretrained("bundled", device="cpu", prefix_reuse=False)
    with serving(torch.get_num_threads()) as server:
        record = overhead(engine, server) if args.soak is None else soak(engine, server, args.soak)
    write_json(output, record | {"environment": environment()})
    shown = {key: record[key] for key in record if key not in ("setting", "resident_bytes")}
    print(json.dumps({"output": str(output)} | shown))


@dataclass(frozen=True)
class Served:
    """A server process and a client for it."""

    process: subprocess.Popen
    client: httpx.Client

    def resident_bytes(self) -> int:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return 1024 * int(re.search(r"^VmRSS:\s+(\d+) kB", status, re.MULTILINE)[1])

    def complete(self, body: dict) -> str:
        """The text of an answer, streamed where the request asks for it."""
        if not body.get("stream"):
            answer = self.client.post("/v1/completions", json=body)
            answer.raise_for_status()
            return answer.json()["choices"][0]["text"]
        return "".join(self.pieces(body))

    def pieces(self, body: dict) -> Iterator[str]:
        with self.client.stream("POST", "/v1/completions", json=body) as answer:
            answer.raise_for_status()
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    yield json.loads(line[6:])["choices"][0]["text"]


@contextmanager
def serving(threads: int) -> Iterator[Served]:
    command = [sys.executable, "-m", "specextend.serve", "--model_name", "bundled", "--device", "cpu", "--port", "0"]
    environ = os.environ | {"OMP_NUM_THREADS": str(threads)}
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environ)
    try:
        address = process.stdout.readline().split()[-1].removesuffix("/v1")
        with httpx.Client(base_url=address, timeout=120) as client:
            yield Served(process, client)
    finally:
        process.terminate()
        process.wait(60)


# --- overhead -----------------------------------------------------------------------------------------------------


def overhead(engine: SpecExtend, server: Served) -> dict:
    """Milliseconds per token that the server adds, by length of prompt, streamed and whole."""
    text = builtin_text()
    figures = {}
    for characters in CHARACTERS:
        body = {"model": "bundled", "prompt": text[:characters], "max_tokens": NEW_TOKENS, "temperature": 0}
        runs = {
            "library": lambda body=body: engine.generate(body["prompt"], NEW_TOKENS).text,
            "whole": lambda body=body: server.complete(body),
            "streamed": lambda body=body: server.complete(body | {"stream": True}),
        }
        new_tokens = engine.generate(body["prompt"], NEW_TOKENS).new_tokens
        figures[f"{characters} characters"] = _beside_library(runs, new_tokens)
    return {
        "setting": {
            "model": "bundled", "new_tokens": NEW_TOKENS, "repeats": REPEATS,
            "order": "library, whole and streamed take turns, each first in a third of the repeats",
        },
        "overhead": figures,
    }  # fmt: skip


def _beside_library(runs: dict[str, Callable[[], str]], new_tokens: int) -> dict:
    texts = {run() for run in runs.values()}  # warm-up
    ms = in_turns(runs, REPEATS)
    library = statistics.median(ms["library"])
    figures = {"new_tokens": new_tokens, "same_text": len(texts) == 1, "library_s": library / 1e3}
    for name in ("whole", "streamed"):
        median = statistics.median(ms[name])
        figures[name] = {
            "s": median / 1e3,
            "overhead_ms_per_token": (median - library) / new_tokens,
            # of each pair that ran side by side: what the machine does to both cancels
            "paired_ms_per_token": float(np.median(np.subtract(ms[name], ms["library"]))) / new_tokens,
        }
    return figures


# --- soak ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SoakRequest:
    """One request of the soak: what is sent, how the client behaves, and what must come back."""

    kind: str
    body: dict
    expected: str | None


def soak(engine: SpecExtend, server: Served, requests: int) -> dict:
    """Memory after every 50 of so many requests, and the line through it."""
    planned = _planned(engine, requests)
    resident, outcomes = {0: server.resident_bytes()}, Counter()
    begin = time.perf_counter()
    with ThreadPoolExecutor(CLIENTS) as pool:
        for start in range(0, requests, EVERY):
            batch = planned[start : start + EVERY]
            outcomes.update(pool.map(lambda one: _send(server, one), batch))
            resident[start + len(batch)] = server.resident_bytes()
            print(f"{start + len(batch)} requests, {resident[start + len(batch)] / 2**20:.1f} MiB", file=sys.stderr)
    metrics = server.client.get("/metrics").text
    settled = {done: size for done, size in resident.items() if done >= min(SETTLED, requests // 2)}
    slope, level = np.polyfit(list(settled), list(settled.values()), 1) if len(settled) > 1 else (0.0, 0.0)
    return {
        "setting": {
            "model": "bundled", "requests": requests, "clients": CLIENTS, "new_tokens": SOAK_TOKENS,
            "kinds": dict(Counter(one.kind for one in planned)),
            "fitted": f"from request {min(settled)} on",
        },
        "seconds": time.perf_counter() - begin,
        "outcomes": dict(outcomes),
        "requests_by_status": dict(re.findall(r'^specextend_requests_total{status="(\d+)"} ([\d.]+)', metrics, re.M)),
        "resident_bytes": resident,
        "slope_bytes_per_request": float(slope),
        "fitted_start_bytes": float(level + slope * min(settled)),
        "largest_over_smallest_settled": max(settled.values()) / min(settled.values()),
    }  # fmt: skip


def _planned(engine: SpecExtend, requests: int) -> list[SoakRequest]:
    """The requests, in an order that is the same every time; 16 different ones that are to be answered."""
    text, rng = builtin_text(), random.Random(0)
    known = []
    for index in range(16):
        length = 2000 if index % 8 == 0 else 60 + 40 * index
        prompt, temperature = text[500 * index : 500 * index + length], 0.8 * (index % 2)
        expected = engine.generate(prompt, SOAK_TOKENS, sampling=SamplingConfig(temperature, seed=index)).text
        body = {"model": "bundled", "prompt": prompt, "max_tokens": SOAK_TOKENS}
        known.append((body | {"temperature": temperature, "seed": index}, expected))
    broken = itertools.cycle(
        [
            {},
            {"model": "bundled", "prompt": 3},
            {"model": "none", "prompt": "x"},
            {"model": "bundled", "prompt": "x" * 300_000},
        ]
    )
    planned = []
    for _ in range(requests):
        body, expected = rng.choice(known)
        kind = rng.choices(("whole", "streamed", "hangs up", "malformed"), (50, 30, 10, 10))[0]
        if kind == "malformed":
            planned.append(SoakRequest(kind, next(broken), None))
        elif kind == "hangs up":
            planned.append(SoakRequest(kind, body | {"max_tokens": 2000, "stream": True}, None))
        else:
            planned.append(SoakRequest(kind, body | {"stream": kind == "streamed"}, expected))
    return planned


def _send(server: Served, one: SoakRequest) -> str:
    """What became of a request, in a word."""
    if one.kind == "malformed":
        status = server.client.post("/v1/completions", json=one.body).status_code
        return "refused" if status in (400, 404) else f"malformed answered with {status}"
    if one.kind == "hangs up":
        next(server.pieces(one.body))  # and the connection closes
        return "hung up"
    return "right answer" if server.complete(one.body) == one.expected else "WRONG ANSWER"


if __name__ == "__main__":
    flags.run(main)

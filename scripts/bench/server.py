"""What the server costs beside the library, and whether it holds its memory under a thousand requests.

    python -m scripts.bench.server              # results/cpu/server_overhead.json
    python -m scripts.bench.server --soak 1000  # results/cpu/server_soak.json

Overhead: the same greedy requests to a server process and to the library in this one, in turns; the difference of the
two wall times per generated token, the client's own work included. Soak: 32 clients hold conversations about eight
documents, which fork: questions about a document, and different second questions after the same first answer; streamed
or not, greedy and sampled. Some hang up, before or while they are answered, some send nonsense. Every whole answer is
compared with that of an engine which has read nothing before; the server's resident memory is read after every 50
requests and a line fitted through it.
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
CLIENTS, EVERY = 32, 50
SETTLED = 200  # requests after which the line is fitted: caches and the allocator's pools have grown by then
DOCUMENTS, CHARACTERS_OF_ONE = 8, (1800, 2800)
FIRST = ("What is this about?", "What is said of names?")
SECOND = ("And what follows from it?", "Give an example.")
SOAK_TOKENS = (8, 12, 16)
QUIET = 0.5  # load average of a machine on which nothing else runs


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
    load = os.getloadavg()[0]
    with serving(torch.get_num_threads()) as server:
        record = overhead(engine, server) if args.soak is None else soak(engine, server, args.soak)
    machine = {"load_average_before": round(load, 2), "shared_with_other_work": load > QUIET}
    write_json(output, record | {"machine": machine, "environment": environment()})
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
            answer = self.client.post(_path(body), json=body)
            answer.raise_for_status()
            return _text(answer.json()["choices"][0])
        return "".join(self.pieces(body))

    def pieces(self, body: dict) -> Iterator[str]:
        with self.client.stream("POST", _path(body), json=body) as answer:
            answer.raise_for_status()
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    yield _text(json.loads(line[6:])["choices"][0])

    def metric(self, name: str) -> dict[str, float]:
        """Labels -> value of a counter."""
        found = re.findall(rf"^specextend_{name}(\S*) (\S+)$", self.client.get("/metrics").text, re.MULTILINE)
        return {labels: float(value) for labels, value in found}


def _path(body: dict) -> str:
    return "/v1/chat/completions" if "messages" in body else "/v1/completions"


def _text(choice: dict) -> str:
    """Of a choice or of a chunk of it."""
    told = choice.get("message") or choice.get("delta") or choice
    return told.get("content") or told.get("text") or ""


@contextmanager
def serving(threads: int) -> Iterator[Served]:
    command = [sys.executable, "-m", "specextend.serve", "--model_name", "bundled", "--device", "cpu", "--port", "0"]
    environ = os.environ | {"OMP_NUM_THREADS": str(threads)}
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environ)
    try:
        address = process.stdout.readline().split()[-1].removesuffix("/v1")
        with httpx.Client(base_url=address, timeout=600) as client:
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
    expected: str | None = None
    patience_s: float = 0.0  # of a client that hangs up before it is answered


def soak(engine: SpecExtend, server: Served, requests: int) -> dict:
    """Memory after every 50 of so many requests, and the line through it."""
    known = _conversations(engine)
    planned = _planned(known, requests)
    resident, outcomes = {0: server.resident_bytes()}, Counter()
    begin = time.perf_counter()
    with ThreadPoolExecutor(CLIENTS) as pool:
        for start in range(0, requests, EVERY):
            batch = planned[start : start + EVERY]
            outcomes.update(pool.map(lambda one: _send(server, one), batch))
            resident[start + len(batch)] = server.resident_bytes()
            print(f"{start + len(batch)} requests, {resident[start + len(batch)] / 2**20:.1f} MiB", file=sys.stderr)
    seconds = time.perf_counter() - begin
    statuses = {labels.split('"')[1]: count for labels, count in server.metric("requests_total").items()}
    prompt, cached = (server.metric(f"{name}_total")[""] for name in ("prompt_tokens", "cached_prompt_tokens"))
    settled = {done: size for done, size in resident.items() if done >= min(SETTLED, requests // 2)}
    slope, level = np.polyfit(list(settled), list(settled.values()), 1) if len(settled) > 1 else (0.0, 0.0)
    return {
        "setting": {
            "model": "bundled", "requests": requests, "clients": CLIENTS, "documents": DOCUMENTS,
            "new_tokens": SOAK_TOKENS, "different_prompts": len(known),
            "prompt_tokens": [min(one.tokens for one in known), max(one.tokens for one in known)],
            "kinds": dict(Counter(one.kind for one in planned)),
            "fitted": f"from request {min(settled)} on",
        },
        "seconds": seconds,
        "outcomes": dict(outcomes),
        "requests_by_status": statuses,
        "prompt_tokens": prompt,
        "cached_share_of_prompt_tokens": cached / prompt,
        "resident_bytes": resident,
        "slope_bytes_per_request": float(slope),
        "fitted_start_bytes": float(level + slope * min(settled)),
        "largest_over_smallest_settled": max(settled.values()) / min(settled.values()),
    }  # fmt: skip


@dataclass(frozen=True)
class Known:
    """A request whose answer is known."""

    body: dict
    expected: str
    tokens: int


def _conversations(engine: SpecExtend) -> list[Known]:
    """What is asked of every document: first questions, and after the answer to one of them different second ones."""
    text, shortest, longest = builtin_text(), *CHARACTERS_OF_ONE
    known = []
    for index in range(DOCUMENTS):
        size = shortest + (longest - shortest) * index // (DOCUMENTS - 1)
        document = {"role": "system", "content": text[6000 * index : 6000 * index + size]}
        new_tokens, temperature = SOAK_TOKENS[index % len(SOAK_TOKENS)], 0.8 * (index % 2)

        def ask(*messages: dict, index=index, new_tokens=new_tokens, temperature=temperature) -> str:
            sampling = SamplingConfig(temperature, seed=index)
            answer = engine.chat(messages, new_tokens, sampling=sampling)
            body = {"model": "bundled", "messages": messages, "max_tokens": new_tokens}
            body |= {"temperature": temperature, "seed": index}
            known.append(Known(body, answer.text, answer.prompt_tokens))
            return answer.text

        for first in FIRST:
            asked = (document, {"role": "user", "content": first})
            answer = {"role": "assistant", "content": ask(*asked)}
        for second in SECOND:
            ask(*asked, answer, {"role": "user", "content": second})
        print(f"{len(known)} answers known", file=sys.stderr)
    return known


def _planned(known: list[Known], requests: int) -> list[SoakRequest]:
    """The requests, in an order that is the same every time."""
    rng = random.Random(0)
    broken = itertools.cycle(
        [
            {},
            {"model": "bundled", "prompt": 3},
            {"model": "none", "prompt": "x"},
            {"model": "bundled", "prompt": "x" * 300_000},
        ]
    )
    kinds = {"whole": 45, "streamed": 30, "hangs up in the answer": 8, "hangs up before it": 10, "malformed": 7}
    planned = []
    for _ in range(requests):
        one = rng.choice(known)
        kind = rng.choices(list(kinds), list(kinds.values()))[0]
        if kind == "malformed":
            planned.append(SoakRequest(kind, next(broken)))
        elif kind == "hangs up in the answer":
            planned.append(SoakRequest(kind, one.body | {"max_tokens": 2000, "stream": True}))
        elif kind == "hangs up before it":
            planned.append(SoakRequest(kind, one.body, patience_s=rng.uniform(0.05, 3)))
        else:
            planned.append(SoakRequest(kind, one.body | {"stream": kind == "streamed"}, one.expected))
    return planned


def _send(server: Served, one: SoakRequest) -> str:
    """What became of a request, in a word."""
    if one.kind == "malformed":
        status = server.client.post("/v1/completions", json=one.body).status_code
        return "refused" if status in (400, 404) else f"malformed answered with {status}"
    if one.kind == "hangs up in the answer":
        pieces = server.pieces(one.body)
        next(piece for piece in pieces if piece)
        pieces.close()  # and the connection closes
        return "hung up"
    if one.kind == "hangs up before it":
        try:
            server.client.post(_path(one.body), json=one.body, timeout=one.patience_s)
        except httpx.TimeoutException:
            return "hung up"
        return "answered before it hung up"
    return "right answer" if server.complete(one.body) == one.expected else "WRONG ANSWER"


if __name__ == "__main__":
    flags.run(main)

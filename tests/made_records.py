"""Records made by hand, and journals of them: what tests of evaluations and of their tables share."""

from __future__ import annotations

from pathlib import Path

from specextend.evaluation.environment import environment
from specextend.evaluation.journal import Journal
from specextend.evaluation.panel import Answer, Panel
from specextend.evaluation.records import SampleRecord, Timing, Worker, hash_tokens


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


def manifest(
    method: str = "specextend", *, data: str = "govreport", temperature: float = 0.0, nodes: int = 50, **changes
) -> dict:
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


def write_journal(path: Path, method: str, records: list[SampleRecord], **setting) -> None:
    journal = Journal(path, manifest(method, **setting))
    for one in records:
        journal.append(one)


def write_results(
    path: Path, method: str, gain: float, *, lengths=("512", "1K", "16K"), workers: tuple[int, ...] = (1,), **setting
) -> None:
    """A journal whose method accepts `gain` drafts in every round and decodes `gain` times as fast as AR.

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
    write_journal(path, method, records, **setting)


def answer(new_tokens: int = 9, decode_s: float = 2.0, accepted: tuple[int, ...] = (3, 1), **changes) -> Answer:
    fields = {"first_difference": None, "loops": False, "distinct_4grams": 1.0}
    drafted = [50] * len(accepted)
    return Answer(timing(new_tokens, 1.0, decode_s), list(accepted), drafted, **{**fields, **changes})


def panel(
    arms: dict[str, Answer], *, data: str = "govreport", bucket: str = "1K", sample: int = 0, ar_s: float = 4.0,
    **changes,
) -> Panel:  # fmt: skip
    """A panel whose baseline decodes nine tokens in `ar_s`."""
    fields = {
        "temperature": 0.0,
        "run": 0,
        "seed": 1000 * sample,
        "source": f"{data}_{bucket}.jsonl:{sample + 1}",
        "prompt_sha256": hash_tokens([sample]),
        "prompt_tokens": 1000,
        "cut": False,
        "order": ["AR", *arms],
        "autoregressive": answer(9, ar_s, ()),
        "commit": {"id": "abc", "dirty": False},
    }
    return Panel(data, bucket, sample=sample, arms=arms, **{**fields, **changes})


def panel_manifest(*arms: str) -> dict:
    setting = manifest()["setting"]
    of_arms = {arm: {"method": arm.partition(":")[0], "backend": "eager", "config": setting["config"]} for arm in arms}
    kept = {name: setting[name] for name in ("model", "target", "draft", "dtype", "device", "max_gen_len")}
    return {"setting": kept | {"backend": "eager", "arms": of_arms}, "environment": environment()}


def write_panels(path: Path, panels: list[Panel]) -> None:
    journal = Journal(path, panel_manifest(*panels[0].arms), read=Panel.from_json)
    for one in panels:
        journal.append(one)

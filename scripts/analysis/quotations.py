"""Where Cross-model Retrieval wins and where a window of its size does as well: answers that refer back.

    python -m scripts.analysis.quotations make -m smollm2 --data_dir data/govreport data/pg19 --out data/quotations
    python -m scripts.analysis.quotations score -m smollm2 --data_dir data/quotations --lengths 4K --chunks 8 32
    python -m scripts.analysis.quotations table results/cpu/quotations.json
    python -m scripts.analysis.quotations table results/*_quotations_*.jsonl --data_dir data/quotations

`make` writes prompts that the evaluations read as well (`passages.py`). `score` counts the drafts accepted per round
under each working cache, twice: with the target's answer forced to be the true one, so that it does refer back, and
with the answer that the target gives, of which it says how much is quoted. `table` reads what `score` wrote, or the
journals of evaluations.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from eagle import entry
from scripts.analysis.passages import TASKS, make_records
from scripts.analysis.store import Store, model_setting, positive, source_name
from scripts.report.quotations import FORCED, FREE, cache_of, frame_of_journals, frame_of_scores, tables
from specextend import SpecExtend
from specextend.cli import flags
from specextend.config import RetrievalConfig, SamplingConfig, SpecExtendConfig, TreeConfig
from specextend.data.cutting import SameDocuments, load_cutter, load_limit
from specextend.data.prepare import DEFAULT_ROOM, check_writable, prompt_documents, write_records
from specextend.data.prompts import Prompt, length_label, parse_length
from specextend.errors import InputError
from specextend.evaluation.plan import read_buckets
from specextend.methods import METHODS
from specextend.models.loading import LoadedModels

GRAM = 4
ALL = 1 << 20  # samples


def main() -> None:
    args = parse_args()
    args.run(args)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = flags.parser(__doc__.splitlines()[0])
    parts = parser.add_subparsers(required=True, dest="part")
    making = parts.add_parser("make", help="write the prompts")
    making.add_argument("--model_name", "-m", default="bundled", help="whose tokenizer and template count")
    making.add_argument("--data_dir", type=Path, nargs="+", required=True, help="folders of prompts; documents of each")
    making.add_argument("--lengths", nargs="+", default=["2K", "4K", "8K"])
    making.add_argument("--samples", "-n", type=positive, default=30, help="prompts per length; 15 hold every case")
    making.add_argument("--skip", type=int, default=0, metavar="N", help="leave out each folder's first N documents")
    making.add_argument("--room", type=int, default=DEFAULT_ROOM, help="new tokens that fit behind the longest prompts")
    making.add_argument("--out", type=Path, default=Path("data/quotations"))
    making.set_defaults(run=make)
    scoring = parts.add_parser("score", help="count accepted drafts, with the answer forced and free")
    entry.add_model_flags(scoring)
    scoring.add_argument("--data_dir", type=Path, default=Path("data/quotations"))
    scoring.add_argument("--lengths", nargs="+", default=[], help="of the prompts (default: all)")
    scoring.add_argument("--samples", "-n", type=positive, default=ALL, help="prompts per length (default: all)")
    scoring.add_argument("--chunks", nargs="+", type=positive, default=[8, 16, 32, 64], help="sizes of working caches")
    scoring.add_argument("--max_gen_len", "-max", type=positive, default=200, help="new tokens of the free answer")
    scoring.add_argument("--temperature", type=float, default=0.0, help="of the free answer")
    scoring.add_argument("--output_file", type=Path, default=Path("results/cpu/quotations.json"))
    scoring.add_argument("--fresh", action="store_true", help="start over instead of resuming")
    scoring.set_defaults(run=score, use_specextend=True)
    showing = parts.add_parser("table", help="print tables by depth, task and cache")
    showing.add_argument("files", type=Path, nargs="+", help="a .json of `score`, or .jsonl journals of evaluations")
    showing.add_argument("--data_dir", type=Path, help="the prompts that the journals measured")
    showing.set_defaults(run=table)
    return parser.parse_args(argv)


def make(args: argparse.Namespace) -> None:
    """Write `<out>/<name>_<length>.jsonl`."""
    if args.skip < 0:
        raise InputError(f"skip is {args.skip}; it is a number of documents, 0 leaves out none", setting="skip")
    lengths = sorted({parse_length(length) for length in args.lengths})
    check_writable(args.out)
    plain = load_cutter(args.model_name)
    cutter = SameDocuments(plain.tokenizer, plain.template, load_limit(args.model_name, args.room))
    sets = []
    for folder in args.data_dir:
        name = folder.resolve().name
        documents = [replace(one, source=f"{name}/{one.source}") for one in prompt_documents(folder)]
        sets.append(documents[args.skip :])
    made = make_records(sets, cutter, lengths, args.samples)
    for length, records in made.items():
        write_records(args.out / f"{args.out.resolve().name}_{length_label(length)}.jsonl", records)
    print(json.dumps({"output": str(args.out), "prompts": {length_label(n): len(made[n]) for n in made}}))


def score(args: argparse.Namespace) -> None:
    """Measure each prompt under each cache; what the file holds already is not measured again."""
    buckets = read_buckets(args.data_dir, args.samples, args.lengths)
    for prompts in buckets.values():
        for prompt in prompts:
            require_reference(prompt)
    models = entry.load_either(args)
    base = SpecExtend(models, METHODS["fa_hta"].config(TreeConfig(), models.preset.retrieval), eager=args.eager)
    setting = model_setting(base) | {
        "data": source_name(args.data_dir), "new_tokens": args.max_gen_len, "temperature": args.temperature,
        "tree": f"{base.config.tree.nodes} nodes, depth {base.config.tree.max_depth}",
    }  # fmt: skip
    store = Store(args.output_file, setting, fresh=args.fresh)
    sampling = SamplingConfig(args.temperature)
    engines = {cache: base.with_config(config) for cache, config in settings(models, args.chunks)}
    for length, prompts in buckets.items():
        for sample, prompt in enumerate(prompts):
            for cache, engine in engines.items():
                key = {"length": length, "sample": sample, "cache": cache}
                store.measure(key, partial(measure, engine, prompt, args.max_gen_len, sampling))
            print(f"{length}, prompt {sample + 1} of {len(prompts)}", file=sys.stderr)
    print(tables(frame_of_scores(store)))
    print(json.dumps({"output": str(args.output_file), "records": len(list(store))}))


def table(args: argparse.Namespace) -> None:
    """Print what was measured."""
    journals = [path for path in args.files if path.suffix == ".jsonl"]
    if journals and (args.data_dir is None or len(journals) < len(args.files)):
        raise InputError("give the journals of one evaluation each with --data_dir, or .json files of `score` alone")
    if journals:
        buckets = read_buckets(args.data_dir, ALL)
        hashes = {
            (bucket, sample): hashlib.sha256(prompt.text.encode()).hexdigest()
            for bucket, prompts in buckets.items()
            for sample, prompt in enumerate(prompts)
        }
        for prompts in buckets.values():
            for prompt in prompts:
                require_reference(prompt)
        print(tables(frame_of_journals(journals, buckets, hashes)))
        return
    for path in args.files:
        try:
            records = json.loads(path.read_text(encoding="utf-8"))["records"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} is no file of `quotations score` ({error})") from error
        print(tables(frame_of_scores(records)))


def require_reference(prompt: Prompt) -> None:
    """InputError for a prompt that is not of `make`."""
    missing = [name for name in ("task", "depth", "answer") if name not in prompt.extra]
    if missing or prompt.extra["task"] not in TASKS:
        raise InputError(f"{prompt.source} has no {', '.join(missing) or 'known task'}; make prompts with `make`")


def settings(models: LoadedModels, chunks: list[int]) -> Iterator[tuple[str, SpecExtendConfig]]:
    """Who drafts, by the name of its cache: nobody's model, the full cache, a window and retrieval of each size."""
    tree = TreeConfig()
    for method, size in [
        ("prompt_lookup", None), ("fa_hta", None),
        *((method, size) for size in chunks for method in ("fa_hta_streaming", "specextend")),
    ]:  # fmt: skip
        retrieval: RetrievalConfig = models.preset.retrieval
        config = METHODS[method].config(tree, replace(retrieval, top_k=size) if size else retrieval)
        plain = {"draft_cache": config.draft_cache, "drafting": config.drafting, "retrieval": {"top_k": size}}
        yield cache_of(plain), config


class Forced(LogitsProcessor):
    """The target answers with given tokens, whatever it would have said.

    Args:
        prompt_tokens: after them the answer begins.
        answer: [m].
    Attributes:
        known: for each token of the answer, whether the target would have said it itself.
    """

    def __init__(self, prompt_tokens: int, answer: Tensor):
        self._first, self._answer = prompt_tokens, answer
        self.known: list[bool] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        token = self._answer[input_ids.shape[1] - self._first]
        self.known.append(bool(scores[0].argmax() == token))
        forced = torch.full_like(scores, float("-inf"))
        forced[:, token] = 0.0
        return forced


def measure(engine: SpecExtend, prompt: Prompt, new_tokens: int, sampling: SamplingConfig) -> dict[str, Any]:
    """Accepted drafts per round with the true answer and with the target's own, and what the target knows of it.

    The round that an answer ends in is left out: it is cut short.
    """
    about = {name: prompt.extra[name] for name in ("task", "depth")}
    about["document"] = prompt.extra.get("document", prompt.source)
    answer = prompt.extra["answer"]
    ids = engine.encode(prompt.text)
    tokens = engine.models.tokenizer(answer, add_special_tokens=False, return_tensors="pt").input_ids[0].to(ids.device)
    forcing = Forced(len(ids), tokens)
    forced = engine.generate(ids, len(tokens), processors=[forcing])
    free = engine.generate(ids, new_tokens, sampling=sampling)
    return about | {
        FORCED: [one.accepted for one in forced.rounds[:-1]],
        FREE: [one.accepted for one in free.rounds[:-1]],
        "known": round(sum(forcing.known) / len(tokens), 4),
        "quoted": share(answer, free.text),
        "copied": share(free.text, f"{prompt.text}\n{answer}"),
        "text": free.text[:400],
    }


def share(text: str, other: str) -> float:
    """Share of the 4-grams of words of a text that stand in another one, 0 where it has none."""
    grams, known = _grams(text), set(_grams(other))
    return round(sum(gram in known for gram in grams) / len(grams), 4) if grams else 0.0


def _grams(text: str) -> list[tuple[str, ...]]:
    words = text.split()
    return [tuple(words[i : i + GRAM]) for i in range(len(words) - GRAM + 1)]


if __name__ == "__main__":
    flags.run(main)

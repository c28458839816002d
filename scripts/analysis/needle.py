"""Needle retrieval (the paper's table 1): does the draft know a fact that stands far back in the input?

    python -m scripts.analysis.needle --data_dir data/govreport

A fact is stated at some depth of a long text and asked for at its end. The draft predicts the answer's tokens, each
given the right ones before it, with all of the context in its cache, with StreamingLLM's sink and window, and with the
chunks that the target's last layer picks (Cross-model Retrieval); beside them the target over chunks of its own cache
(as TriForce drafts) and over all of it. A token that the draft also gets right where the fact is not stated (the rest
of a word, a likely name) says nothing and is left out of the accuracy. Written through to the JSON file: the same
command goes on after a stop.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scripts.analysis.probe import Probe
from scripts.analysis.store import Store, add_study_flags, model_setting, require_positions, source_name
from scripts.report.analyses import needle_shares
from scripts.train.facts import Fact, make_facts
from specextend import SpecExtend
from specextend.cli import flags
from specextend.cli.commands import load_pair
from specextend.config import TreeConfig
from specextend.data.builtin import builtin_text
from specextend.data.prompts import find_buckets, parse_length, read_prompts
from specextend.methods import METHODS

SEED = 20_505_776  # of the facts: none of the training's
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)


def main() -> None:
    args = parse_args()
    models = load_pair(args)
    tree, retrieval = TreeConfig(), models.preset.retrieval
    engine = SpecExtend(models, METHODS["specextend"].config(tree, retrieval), prefix_reuse=False)
    require_positions(engine, args.lengths)
    setting = model_setting(engine) | {"data": source_name(args.data_dir), "facts_seed": SEED}
    probe = Probe(engine)
    records = Store(args.output_file, setting | probe.setting, fresh=args.fresh)
    facts = make_facts(args.samples, models.tokenizer.backend_tokenizer, SEED)
    texts = long_texts(engine, args.data_dir, max(map(parse_length, args.lengths)), args.samples)
    for (sample, text), length, depth in itertools.product(enumerate(texts), args.lengths, DEPTHS):
        key = {"length": length, "depth": depth, "sample": sample}
        needle = plant(facts[sample], text, parse_length(length), depth)
        records.measure(key, partial(measure, probe, needle))
        print(f"{length}, depth {depth:g}, sample {sample + 1} of {args.samples}", file=sys.stderr)
    print(json.dumps({"output": str(args.output_file)} | accuracies(records)))


def parse_args() -> argparse.Namespace:
    parser = flags.parser(__doc__.splitlines()[0])
    add_study_flags(parser, lengths=["2K", "4K", "8K", "16K"], samples=4, output="results/cpu/needle.json")
    return parser.parse_args()


@dataclass(frozen=True)
class Needle:
    """A context [N] that ends with the question, its end without the statement, and the tokens [m] of the answer."""

    context: Tensor
    without: Tensor
    answer: Tensor


def plant(fact: Fact, text: Tensor, length: int, depth: float) -> Needle:
    """`fact` stated at `depth` (0 is the beginning) of `length` tokens of `text`, and asked for at their end."""
    statement, recall = torch.from_numpy(fact.statement), torch.from_numpy(fact.recall)
    question, answer = recall[: fact.answer.start], recall[fact.answer]
    hay = text[: length - len(statement) - len(question) - len(answer)]
    at = round(depth * len(hay))
    return Needle(torch.cat((hay[:at], statement, hay[at:], question)), torch.cat((hay[-512:], question)), answer)


def long_texts(engine: SpecExtend, data_dir: Path | None, length: int, count: int) -> Iterator[Tensor]:
    """`count` texts of `length` tokens at least: prompts, one after the other where one is too short."""
    if data_dir is None:
        pieces = itertools.repeat(engine.encode(builtin_text()))
    else:
        prompts = read_prompts(list(find_buckets(data_dir).values())[-1])
        pieces = (engine.encode(prompt.text) for prompt in itertools.cycle(prompts))
    for index in range(count):
        text = next(pieces).cpu()
        while len(text) < length:
            text = torch.cat((text, next(pieces).cpu()))
        shift = index * length % max(len(text) - length, 1) if data_dir is None else 0
        yield text[shift : shift + length]


def measure(probe: Probe, needle: Needle) -> dict[str, dict[str, list]]:
    """Which answer tokens are right, and their negative log-likelihood in nats, by cache; the root is the question's
    last token."""
    context, without, answer = (part.to(probe.device) for part in (needle.context, needle.without, needle.answer))
    read = torch.cat((context[-1:], answer[:-1]))
    logits = probe.logits(context[:-1], read) | {"not_stated": probe.draft_alone(without[:-1], read)}
    return {cache: _graded(one, answer) for cache, one in logits.items()}


def _graded(logits: Tensor, answer: Tensor) -> dict[str, float]:
    likelihood = logits.float().log_softmax(-1).gather(1, answer[:, None])
    return {
        "right": (logits.argmax(-1) == answer).int().tolist(),
        "nll": [round(-value, 4) for value in likelihood[:, 0].tolist()],
    }


def accuracies(records: Iterable[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Share right of the answer tokens that cannot be guessed without the fact, by cache and length."""
    shares = needle_shares(records, ["length"]).pivot(index="cache", columns="length", values="accuracy")
    return shares.round(3).to_dict(orient="index")


if __name__ == "__main__":
    flags.run(main)

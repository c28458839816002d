"""Why it is fast: the paper's analyses on one pair of models, into results/cpu/analysis.json.

    python -m scripts.analysis.analyse --data_dir data/govreport                 # all parts
    python -m scripts.analysis.analyse --data_dir data/govreport --only sweep    # one of them

- divergence: how far the draft's next-token distribution is from the target's, by position and cache (figure 3).
- entropy: which output tokens were accepted drafts, and how unsure the target was of each (easy and hard tokens).
- chunks: which chunks Cross-model Retrieval chose, refresh after refresh.
- sweep: working cache, chunk size and refresh period (table 8).
- refresh: what a retrieval and a refresh of the draft's cache cost beside the passes of a round (table 7).
- equation1: the speed-up that equation 1 predicts from single passes, beside the measured one.

Latency by stage and the ablation come from the records of the evaluations. The same command goes on after a stop.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scripts.analysis.probe import Probe, drafter_of, target_of
from scripts.analysis.rounds import (
    SeenRound,
    Watcher,
    chosen_chunks,
    mean_depth,
    middle_tree,
    predicted_speedup,
    token_entropies,
)
from scripts.analysis.store import (
    Store,
    add_study_flags,
    model_setting,
    positive,
    require_positions,
    source_name,
)
from scripts.bench.timing import median_ms
from scripts.report.analyses import CACHES
from specextend import SpecExtend
from specextend.cli import flags
from specextend.cli.commands import load_pair
from specextend.config import TreeConfig
from specextend.data.builtin import builtin_text
from specextend.data.prompts import cut_to_fit, find_buckets, parse_length, read_prompts
from specextend.drafting.retrieval import CrossModelRetrieval
from specextend.errors import ConfigError
from specextend.methods import METHODS
from specextend.trees.growth import Growth
from specextend.trees.tree import DraftTree

READ = 64  # tokens of the text that a divergence is averaged over
SIZES = (64, 128, 256, 512, 1024, 2048, 4096)
CHUNKS = (1, 4, 8, 16, 32, 64, 128)
PERIODS = (1, 2, 4, 8, 16, 32)


def main() -> None:
    args = parse_args()
    models = load_pair(args)
    config = METHODS["specextend"].config(TreeConfig(), models.preset.retrieval)
    engine = SpecExtend(models, config, prefix_reuse=False)
    require_positions(engine, args.lengths, max(READ, args.max_gen_len))
    require_positions(engine, args.lengths[-1:], 2 * args.max_gen_len)
    setting = model_setting(engine) | {"data": source_name(args.data_dir)}
    setting |= {"tree": f"{config.tree.nodes} nodes, depth {config.tree.max_depth}", "new_tokens": args.max_gen_len}
    store = Store(args.output_file, setting, fresh=args.fresh)
    study = Study(engine, store, Texts(engine, args.data_dir), args.lengths, args.samples, args.max_gen_len)
    seconds = {}
    for part in args.only or PARTS:
        start = time.perf_counter()
        with torch.inference_mode():
            PARTS[part](study)
        seconds[part] = round(time.perf_counter() - start, 1)
        print(f"{part}: {seconds[part]} s", file=sys.stderr)
    print(json.dumps({"output": str(args.output_file), "records": len(list(store)), "seconds": seconds}))


def parse_args() -> argparse.Namespace:
    parser = flags.parser("The paper's analyses: divergence, easy and hard tokens, chunks, sweeps, latencies, eq. 1.")
    add_study_flags(parser, lengths=["1K", "2K", "4K", "8K"], samples=2, output="results/cpu/analysis.json")
    parser.add_argument("--only", nargs="+", choices=PARTS, help="these parts; all without it")
    parser.add_argument("--max_gen_len", "-max", type=positive, default=128, help="new tokens per generation")
    return parser.parse_args()


class Texts:
    """Prompts [N] of exact lengths: the prompts of a data set, cut; or stretches of the built-in text."""

    def __init__(self, engine: SpecExtend, data_dir: Path | None):
        self._engine = engine
        self._files = find_buckets(data_dir) if data_dir else None
        self._builtin = None if data_dir else engine.encode(builtin_text())

    def prompt(self, length: str, sample: int) -> Tensor:
        """At most the tokens `length` names, ending as the text ends: the instruction stays."""
        tokens = parse_length(length)
        if self._builtin is not None:
            return self._builtin[sample * tokens :][:tokens]
        return cut_to_fit(self._engine.encode(self._of(length, sample)), tokens)

    def running(self, length: str, sample: int) -> Tensor:
        """Exactly so many tokens of running text and `READ` more."""
        tokens = parse_length(length) + READ
        if self._builtin is not None:
            return self._builtin[sample * tokens :][:tokens]
        return self._engine.encode(self._of(list(self._files)[-1], sample))[:tokens]

    def _of(self, length: str, sample: int) -> str:
        if length not in self._files:
            raise ConfigError(f"the data set has no length {length}; it has {', '.join(self._files)}")
        prompts = read_prompts(self._files[length], limit=sample + 1)
        if sample >= len(prompts):
            raise ConfigError(f"the data set has {len(prompts)} prompts of {length}; ask for fewer --samples")
        return prompts[sample].text


@dataclass(frozen=True)
class Study:
    """What every part is given.

    Args:
        engine: SpecExtend with the defaults of the pair.
        lengths: of prompts, shortest first.
    """

    engine: SpecExtend
    store: Store
    texts: Texts
    lengths: list[str]
    samples: int
    new_tokens: int

    def named(self, method: str) -> SpecExtend:
        config = self.engine.config
        return self.engine.with_config(METHODS[method].config(config.tree, config.retrieval))

    def cells(self) -> Iterator[dict[str, Any]]:
        for length in self.lengths:
            yield from ({"length": length, "sample": sample} for sample in range(self.samples))

    def measure_prompts(self, part: str, methods: tuple[str, ...], measure: Callable[..., dict[str, Any]]) -> None:
        """`measure(engine, prompt, new tokens)` of every prompt under every method."""
        for method in methods:
            for key in self.cells():
                measured = partial(measure, self.named(method), self.texts.prompt(**key), self.new_tokens)
                self.store.measure({"part": part, "method": method} | key, measured)


def watched(engine: SpecExtend, prompt: Tensor, new_tokens: int) -> list[SeenRound]:
    watcher = Watcher()
    engine.generate(prompt, new_tokens, observer=watcher)
    return watcher.rounds


def divergence(study: Study) -> None:
    """KL divergence from the target, overlap of the distributions and equal argmax, over `READ` tokens."""
    probe = Probe(study.engine)
    for key in study.cells():
        text = study.texts.running(**key)
        study.store.measure(
            {"part": "divergence"} | key, lambda text=text: compare(probe.logits(text[:-READ], text[-READ:]))
        )


def compare(logits: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """How far each cache's logits [T, V] are from the target's, on average over T."""
    target = logits["target"].float().log_softmax(-1)
    found = {}
    for cache in CACHES[:-1]:
        draft = logits[cache].float().log_softmax(-1)
        found[cache] = {
            "kl": (target.exp() * (target - draft)).sum(-1).mean().item(),
            "overlap": torch.minimum(target.exp(), draft.exp()).sum(-1).mean().item(),
            "same_argmax": (target.argmax(-1) == draft.argmax(-1)).float().mean().item(),
        }
    return found


def entropy(study: Study) -> None:
    methods = ("standard", "fa_hta_streaming", "specextend")
    study.measure_prompts("entropy", methods, lambda *prompt: token_entropies(watched(*prompt)))


def chunks(study: Study) -> None:
    """Chunk indices of each refresh, on the first prompt of the longest length; twice the new tokens."""
    key = {"length": study.lengths[-1], "sample": 0}
    size = study.engine.config.retrieval.chunk_size
    run = partial(watched, study.engine, study.texts.prompt(**key), 2 * study.new_tokens)
    study.store.measure({"part": "chunks"} | key, lambda: chosen_chunks(run(), size))


def sweep(study: Study) -> None:
    """Accepted per round and decoding speed by one parameter of the retrieval, the others at their defaults."""
    default, length = study.engine.config.retrieval, study.lengths[-1]
    whole = default.top_k * default.chunk_size
    settings = [
        *(("working_cache_size", size, {"top_k": max(size // default.chunk_size, 2)}) for size in SIZES),
        *(("chunk_size", size, {"chunk_size": size, "top_k": whole // size}) for size in CHUNKS),
        *(("retrieve_every_n_steps", period, {"every_n_steps": period}) for period in PERIODS),
    ]
    for parameter, value, changes in settings:
        engine = study.engine.with_config(replace(study.engine.config, retrieval=replace(default, **changes)))
        for sample in range(study.samples):
            key = {"part": "sweep", "parameter": parameter, "value": value, "length": length, "sample": sample}
            study.store.measure(key, partial(_swept, engine, study.texts.prompt(length, sample), study.new_tokens))


def _swept(engine: SpecExtend, prompt: Tensor, new_tokens: int) -> dict[str, float]:
    result = engine.generate(prompt, new_tokens)
    return {
        "accepted_per_round": result.accepted_per_round,
        "decode_tokens_per_s": result.decode_tokens_per_s,
        "rounds": len(result.rounds),
    }


def refresh(study: Study) -> None:
    """Milliseconds of a round's passes and of a retrieval, by prompt length."""
    for length in study.lengths:
        passes = partial(_passes_ms, study.engine, study.texts.prompt(length, 0))
        study.store.measure({"part": "refresh", "length": length}, passes)


def _passes_ms(engine: SpecExtend, prompt: Tensor, tree: DraftTree | None = None) -> dict[str, float]:
    """Single eager passes behind `prompt`, of `tree`, or of the one that the draft proposes there."""
    models, device = engine.models, engine.models.device
    target, drafter = target_of(models, engine.config), drafter_of(models, engine.config)
    retriever, slots = CrossModelRetrieval(engine.config.retrieval), 2 * (engine.config.tree.nodes + 1)
    first = target.prefill(prompt, slots)[-1].argmax()
    drafter.prefill(prompt, first, slots)
    positions = retriever.select(target.attention_row, drafter.context)
    if engine.config.draft_cache != "full":
        drafter.refresh(positions)
    proposed = drafter.propose(Growth.of(engine.config.tree))  # reads the root
    tree = tree or proposed
    row = tree.tokens[:1].repeat(max(1, (len(tree) - 1) // max(1, int(tree.depth.max()))))  # a level, on average

    def draft_pass() -> None:
        with drafter.cache.provisional():
            drafter.score(row)

    steps = {
        "autoregressive_step": lambda: target.verify(DraftTree.root(row[0])),
        "target_forward": lambda: target.verify(tree),
        "draft_forward": draft_pass,
        "retrieval": lambda: retriever.select(target.attention_row, drafter.context),
    }
    if engine.config.draft_cache != "full":
        steps["retrieval_cache_update"] = lambda: drafter.refresh(positions)
    return {name: round(median_ms(step, device, warm_up=1), 4) for name, step in steps.items()}


def equation1(study: Study) -> None:
    """Speed-up over autoregressive decoding: predicted from tau, d and single passes, and measured."""
    study.measure_prompts("equation1", ("standard", "specextend"), _equation1)


def _equation1(engine: SpecExtend, prompt: Tensor, new_tokens: int) -> dict[str, float]:
    result, baseline = (generate(prompt, new_tokens) for generate in (engine.generate, engine.autoregressive))
    rounds = watched(engine, prompt, new_tokens)
    own = _passes_ms(engine, prompt, middle_tree(rounds))
    flash = engine.with_config(replace(engine.config, flash_prefill=True, hybrid_tree_attention=True))
    times = {"draft_forward_ms": own["draft_forward"], "verify_ms": own["target_forward"]}
    times["target_forward_ms"] = _passes_ms(flash, prompt)["autoregressive_step"]  # the baseline's
    passes = mean_depth(rounds)
    return {
        "tokens_per_round": result.tokens_per_round,
        "draft_passes_per_round": passes,
        **times,
        "predicted": predicted_speedup(
            result.tokens_per_round, passes, draft_ms=times["draft_forward_ms"], verify_ms=times["verify_ms"],
            target_ms=times["target_forward_ms"],
        ),
        "measured": result.decode_tokens_per_s / baseline.decode_tokens_per_s,
    }  # fmt: skip


PARTS: dict[str, Callable[[Study], None]] = {
    one.__name__: one for one in (divergence, entropy, chunks, sweep, refresh, equation1)
}

if __name__ == "__main__":
    flags.run(main)

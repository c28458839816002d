"""Why it is fast: the paper's analyses on one pair of models, into results/cpu/analysis.json.

    python scripts/analyse.py --data_dir data/govreport                 # all parts
    python scripts/analyse.py --data_dir data/govreport --only sweep    # one of them

- divergence: how far the draft's next-token distribution is from the target's, by position and cache (figure 3).
- entropy: which output tokens were accepted drafts, and how unsure the target was of each (easy and hard tokens).
- chunks: which chunks Cross-model Retrieval chose, refresh after refresh.
- sweep: working cache, chunk size and refresh period (table 8).
- refresh: what a retrieval and a refresh of the draft's cache cost beside the passes of a round (table 7).
- equation1: the speed-up that equation 1 predicts from single passes, beside the measured one.

Latency by stage and the ablation come from the records of the evaluations. Written through: the same command goes on
after a stop.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, installed or not

from probe import Probe
from readings import CACHES
from records import Records, model_setting

from specextend import SpecExtend
from specextend.cli import flags
from specextend.cli.commands import load_pair
from specextend.data.builtin import builtin_text
from specextend.data.prompts import cut_to_fit, find_buckets, parse_length, read_prompts
from specextend.decoding.sampling import greedy
from specextend.engine import default_tree
from specextend.errors import ConfigError
from specextend.methods import METHODS
from specextend.trees.acceptance import accept
from specextend.trees.tree import DraftTree

READ = 64  # tokens of the text that a divergence is averaged over
REPEATS = 20
SIZES = (64, 128, 256, 512, 1024, 2048, 4096)
CHUNKS = (1, 4, 8, 16, 32, 64, 128)
PERIODS = (1, 2, 4, 8, 16, 32)


def main() -> None:
    args = parse_args()
    models = load_pair(args)
    config = METHODS["specextend"].config(default_tree(models), models.preset.retrieval)
    engine = SpecExtend(models, config)
    setting = model_setting(engine) | {"data": args.data_dir.resolve().name if args.data_dir else "builtin"}
    setting |= {"tree": f"{config.tree.nodes} nodes, depth {config.tree.max_depth}", "new_tokens": args.max_gen_len}
    records = Records(args.output_file, setting, fresh=args.fresh)
    study = Study(engine, records, Texts(engine, args.data_dir), args.lengths, args.samples, args.max_gen_len)
    seconds = {}
    for part in args.only or PARTS:
        start = time.perf_counter()
        with torch.inference_mode():
            PARTS[part](study)
        seconds[part] = round(time.perf_counter() - start, 1)
        print(f"{part}: {seconds[part]} s", file=sys.stderr)
    print(json.dumps({"output": str(args.output_file), "records": len(list(records)), "seconds": seconds}))


def parse_args() -> argparse.Namespace:
    parser = flags.parser(
        "The paper's analyses: divergence, easy and hard tokens, chunks, sweeps, latencies, equation 1."
    )
    flags.add_model_flags(parser)
    parser.add_argument("--data_dir", type=Path, help="folder of <name>_<length>.jsonl files; else the built-in text")
    parser.add_argument("--only", nargs="+", choices=PARTS, help="these parts; all without it")
    parser.add_argument("--lengths", nargs="+", default=["1K", "2K", "4K", "8K"], help="of the prompts")
    parser.add_argument("--samples", "-n", type=int, default=2, help="prompts per length")
    parser.add_argument("--max_gen_len", "-max", type=int, default=128, help="new tokens per generation")
    parser.add_argument("--output_file", type=Path, default=Path("results/cpu/analysis.json"))
    parser.add_argument("--fresh", action="store_true", help="start over instead of resuming")
    parser.set_defaults(use_specextend=True)
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
    records: Records
    texts: Texts
    lengths: list[str]
    samples: int
    new_tokens: int

    def named(self, method: str) -> SpecExtend:
        config = self.engine.config
        return self.engine.with_config(METHODS[method].config(config.tree, config.retrieval))

    def prompts(self) -> Iterator[tuple[dict[str, Any], Tensor]]:
        for length in self.lengths:
            for sample in range(self.samples):
                yield {"length": length, "sample": sample}, self.texts.prompt(length, sample)


# --- the decode loop, watched ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """A round of decoding: positions are those of a refresh before it, None without one."""

    context: int
    tree: DraftTree
    logits: Tensor
    path: Tensor
    positions: Tensor | None


def watch(engine: SpecExtend, prompt: Tensor, new_tokens: int) -> Iterator[Step]:
    """The greedy loop, with all that it sees."""
    target, drafter, retriever = engine._target, engine._drafter, engine._retriever
    extra_slots = new_tokens + 2 * (engine.config.tree.nodes + 1)
    first = target.prefill(prompt, extra_slots)[-1].argmax()
    drafter.prefill(prompt, first, extra_slots)
    made = rounds = 0
    while made < new_tokens:
        positions = None
        if retriever.is_due(rounds, drafter.context):
            positions = retriever.select(target.attention_row, drafter.context)
            drafter.refresh(positions)
        tree = drafter.propose()
        logits = target.verify(tree)
        accepted = accept(tree, greedy(logits, 0, tree.depth))
        yield Step(target.cache.length, tree, logits, accepted.path, positions)
        target.commit(accepted.path)
        drafter.commit(accepted)
        made, rounds = made + len(accepted.path), rounds + 1


# --- the parts ------------------------------------------------------------------------------------------------------


def divergence(study: Study) -> None:
    """KL divergence from the target, overlap of the distributions and equal argmax, over `READ` tokens."""
    probe = Probe(study.engine)
    for length in study.lengths:
        for sample in range(study.samples):
            key = {"part": "divergence", "length": length, "sample": sample}
            study.records.measure(key, partial(_divergence, probe, study.texts.running(length, sample)))


def _divergence(probe: Probe, text: Tensor) -> dict[str, Any]:
    logits = probe.logits(text[:-READ], text[-READ:])
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
    """Of every token of the output: the target's entropy in nats, and whether a draft had it right."""
    for method in ("standard", "fa_hta_streaming", "specextend"):
        for key, prompt in study.prompts():
            key = {"part": "entropy", "method": method} | key
            study.records.measure(key, partial(_entropy, study.named(method), prompt, study.new_tokens))


def _entropy(engine: SpecExtend, prompt: Tensor, new_tokens: int) -> dict[str, list]:
    entropies, drafted = [], []
    for step in watch(engine, prompt, new_tokens):
        logs = step.logits[step.path].float().log_softmax(-1)
        entropies += [round(-value, 4) for value in (logs.exp() * logs).sum(-1).tolist()]
        drafted += [1] * (len(step.path) - 1) + [0]
    return {"entropy": entropies, "accepted": drafted}


def chunks(study: Study) -> None:
    """Chunk indices of each refresh, on the first prompt of the longest length; twice the new tokens."""
    length = study.lengths[-1]
    prompt = study.texts.prompt(length, 0)

    def measure() -> dict[str, Any]:
        size = study.engine.config.retrieval.chunk_size
        steps = enumerate(watch(study.engine, prompt, 2 * study.new_tokens))
        refreshes = [(index, step) for index, step in steps if step.positions is not None]
        return {
            "chunk_size": size,
            "round": [index for index, _ in refreshes],
            "context": [step.context for _, step in refreshes],
            "chosen": [torch.unique(step.positions // size).tolist() for _, step in refreshes],
        }

    study.records.measure({"part": "chunks", "length": length, "sample": 0}, measure)


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
            study.records.measure(key, lambda engine=engine, sample=sample: _swept(study, engine, length, sample))


def _swept(study: Study, engine: SpecExtend, length: str, sample: int) -> dict[str, float]:
    result = engine.generate(study.texts.prompt(length, sample), study.new_tokens)
    return {
        "accepted_per_round": result.accepted_per_round,
        "decode_tokens_per_s": result.decode_tokens_per_s,
        "rounds": len(result.rounds),
    }


def refresh(study: Study) -> None:
    """Milliseconds of a round's passes and of a retrieval, by prompt length."""
    for length in study.lengths:
        study.records.measure({"part": "refresh", "length": length}, partial(_passes_ms, study, length))


def _passes_ms(study: Study, length: str) -> dict[str, float]:
    engine = study.engine
    *_, step = watch(engine, study.texts.prompt(length, 0), study.new_tokens)
    target, drafter, retriever = engine._target, engine._drafter, engine._retriever
    positions = retriever.select(target.attention_row, drafter.context)
    row = step.tree.tokens[:1].repeat(_level_width(step.tree))

    def draft_pass() -> None:
        with drafter.cache.provisional():
            drafter.score(row)

    return {
        "autoregressive_step": median_ms(lambda: target.verify(DraftTree.root(row[0]))),
        "target_forward": median_ms(lambda: target.verify(step.tree)),
        "draft_forward": median_ms(draft_pass),
        "retrieval": median_ms(lambda: retriever.select(target.attention_row, drafter.context)),
        "retrieval_cache_update": median_ms(lambda: drafter.refresh(positions)),
    }


def _level_width(tree: DraftTree) -> int:
    """Nodes of a level, on average, the root's left out."""
    return max(1, (len(tree) - 1) // max(1, int(tree.depth.max())))


def equation1(study: Study) -> None:
    """Speed-up over autoregressive decoding: predicted from tau, d and single passes, and measured."""
    for method in ("standard", "specextend"):
        for key, prompt in study.prompts():
            key = {"part": "equation1", "method": method} | key
            study.records.measure(key, partial(_equation1, study.named(method), prompt, study.new_tokens))


def _equation1(engine: SpecExtend, prompt: Tensor, new_tokens: int) -> dict[str, float]:
    """Equation 1: time per token / T_target = (1 / tau) * (d * T_draft / T_target + T_verify / T_target).

    Here tau includes the bonus token (tokens per round), and d is the mean depth of the trees.
    """
    turns = [engine.generate, engine.autoregressive]
    result, baseline = (generate(prompt, new_tokens) for generate in turns)
    steps = list(watch(engine, prompt, new_tokens))
    target, drafter = engine._target, engine._drafter
    middle = sorted(steps, key=lambda step: len(step.tree))[len(steps) // 2].tree
    row = middle.tokens[:1].repeat(_level_width(middle))

    def draft_pass() -> None:
        with drafter.cache.provisional():
            drafter.score(row)

    t_draft, t_verify = median_ms(draft_pass), median_ms(lambda: target.verify(middle))
    t_target = median_ms(lambda: engine._baseline.verify(DraftTree.root(row[0])))
    passes = statistics.fmean(max(1, int(step.tree.depth.max())) for step in steps)
    tau = result.tokens_per_round
    return {
        "tokens_per_round": tau,
        "draft_passes_per_round": passes,
        "draft_forward_ms": t_draft,
        "verify_ms": t_verify,
        "target_forward_ms": t_target,
        "predicted": tau * t_target / (passes * t_draft + t_verify),
        "measured": result.decode_tokens_per_s / baseline.decode_tokens_per_s,
    }


def median_ms(run: Callable[[], object]) -> float:
    """Median of `REPEATS` calls after one that is not counted; waits for a GPU."""
    cuda = torch.cuda.is_available()
    times = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        run()
        if cuda:
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return round(statistics.median(times[1:]), 4)


PARTS: dict[str, Callable[[Study], None]] = {
    "divergence": divergence,
    "entropy": entropy,
    "chunks": chunks,
    "sweep": sweep,
    "refresh": refresh,
    "equation1": equation1,
}


if __name__ == "__main__":
    flags.run(main)

"""What each step costs on a GPU at the size of large models, without a download: results/<gpu>/bench.json and summary.

    python -m scripts.bench.gpu --output results/h200
    python -m scripts.bench.gpu --only steps --output results/h200     # takes one part anew, the others stay

The bundled models are widened to the shapes of Vicuna-7B and Vicuna-68M (`specextend.models.widen`): their tokens, and
so their acceptance, at the cost of the large models' weights. Everything runs in one process; medians after warm-up.
Decoding speeds are an evaluation's: `eval_classic.py --widen vicuna_7b`.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache

from eagle.drafter import EagleDrafter
from eagle.models import RETRIEVAL
from eagle.models import load_models as load_eagle
from eagle.widen import widen_head
from scripts.bench.model_size import cache_bytes, working_tokens
from scripts.bench.timing import captured, elapsed_ms, median_ms
from scripts.bench.widened import widened
from scripts.report.gpu import summary
from specextend import RetrievalConfig, SamplingConfig, SpecExtend, SpecExtendConfig
from specextend.cli import flags
from specextend.config import TreeConfig
from specextend.data.builtin import builtin_text
from specextend.data.prompts import find_buckets, read_prompts
from specextend.decoding import priced_graphs
from specextend.errors import ConfigError
from specextend.evaluation.environment import environment
from specextend.evaluation.journal import write_json
from specextend.kernels import tree_attention
from specextend.methods import METHODS
from specextend.modeling.attention import NAME
from specextend.models.loading import load_models
from specextend.models.widen import SHAPES, widen
from specextend.policy.calibration import Calibration
from specextend.policy.policies import PricedTree
from specextend.trees.growth import Growth

PARTS = ("bandwidth", "kernels", "steps", "slots", "policy", "prefill", "trace", "eagle", "long")
SHAPE, DRAFT_SHAPE, LONG_SHAPE = SHAPES["vicuna_7b"], SHAPES["vicuna_68m"], SHAPES["llama31_8b"]
SLOTS = TreeConfig(nodes=63, threshold=0.0)  # 64 with the root, and always ten levels
CHAIN = TreeConfig(nodes=63, max_depth=63)
EAGLE_VOCAB = 32000  # draft vocabulary of the published EAGLE-3 heads
GIB = 1 << 30
TURNS = 12  # of answers that are compared


def main() -> None:
    args = parse_args()
    bench = Bench(args)
    for part in (part for part in PARTS if part in args.only):  # in that order: the last lets go of the models
        began = time.monotonic()
        bench.record[part], bench.record["commands"][part] = getattr(bench, part)(), shlex.join(sys.argv)
        print(f"{part}: {time.monotonic() - began:.0f}s", flush=True)
        write_json(args.output / "bench.json", bench.record)
        write_json(args.output / "summary.json", summary(bench.record))
    for name, value in summary(bench.record).items():
        print(f"{name:<36}  {value:10.3f}")


def parse_args() -> argparse.Namespace:
    parser = flags.parser(__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1000, 2000, 4000, 8000, 16000])
    parser.add_argument("--data_dir", type=Path, nargs="+", default=[], help="folders of prompts; else built-in text")
    parser.add_argument("--output", type=Path, default=Path("results/gpu"))
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise ConfigError("there is no CUDA GPU here; scripts.bench.cpu measures a CPU")
    args.files = [list(find_buckets(folder).values())[-1] for folder in args.data_dir]  # the longest prompts
    return args


class UnmovedTree(PricedTree):
    """Thinks as its parent does, and decides in favour of one tree every time, by default the paper's."""

    threshold = TreeConfig().threshold

    def plan(self, context: int) -> Growth:
        super().plan(context)
        return Growth(*self._bounds, self.threshold, calibration=Calibration())

    def size(self, reach: NDArray[np.float64], context: int) -> int:
        super().size(reach, context)
        return len(reach)

    def loses(self, reach: NDArray[np.float64], context: int) -> float:
        super().loses(reach, context)
        return 0.0


class Bench:
    """The models of one shape, and the record of what was measured so far."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.dtype, self.device = args, getattr(torch, args.dtype), torch.device("cuda")
        self.median_ms = partial(median_ms, device=self.device)
        self.record = self._begun()
        self.small = load_models("bundled", device="cuda", dtype="float32")
        self.models = widened(self.small, "vicuna_7b", self.dtype)
        self.engine = SpecExtend(self.models, SpecExtendConfig.specextend(tree=SLOTS), prefix_reuse=False)
        texts = [read_prompts(file, limit=2)[-1].text for file in args.files]
        self.text = self.engine.encode("\n".join(texts) or builtin_text())

    def _begun(self) -> dict:
        """The record that is there of this kind of GPU, to be replaced part by part, or an empty one."""
        path = self.args.output / "bench.json"
        found = json.loads(path.read_text()) if path.exists() else {}
        kept = found if found.get("gpu") == torch.cuda.get_device_name() else {}
        return kept | {
            "commands": kept.get("commands", {}), "environment": environment(), "gpu": torch.cuda.get_device_name(),
            "shape": asdict(SHAPE), "dtype": self.args.dtype,
            "pair": "bundled models widened without changing what they compute; no weights of that size were loaded",
        }  # fmt: skip

    # --- parts ---

    def bandwidth(self) -> dict:
        """TB/s of a large copy, bytes read plus written, and of a large read."""
        source = torch.empty(2 * GIB, dtype=torch.float32, device=self.device).normal_()
        target = torch.empty_like(source)
        copy, read = self.median_ms(lambda: target.copy_(source)), self.median_ms(lambda: torch.sum(source))
        return {"copy_tb_s": 2 * source.nbytes / copy / 1e9, "read_tb_s": source.nbytes / read / 1e9}

    def kernels(self) -> list[dict]:
        """Tree attention alone, over several layers' caches so that none stays in the L2 cache."""
        shape, rows, place = SHAPE, [], {"dtype": self.dtype, "device": self.device}
        for length in (1000, 16000):
            caches = torch.randn(8, 2, shape.kv_heads, length + 128, shape.head_dim, **place)
            for slots in (1, 64):
                query = torch.randn(shape.heads, slots, shape.head_dim, **place)
                mask = torch.ones(slots, slots, dtype=torch.bool, device=self.device).tril()
                words, known = tree_attention.pack_mask(mask), torch.tensor(length, device=self.device)
                launch = tree_attention.launch_for(self.device, shape.kv_heads, shape.heads // shape.kv_heads * slots)
                work = tree_attention.Workspace(*query.shape, launch.splits, self.device)

                def layers(query=query, caches=caches, known=known, words=words, launch=launch, work=work, slots=slots):
                    for keys, values in caches:
                        tree_attention.tree_attention(
                            query, keys, values, known, words, 0.1, slots=slots, launch=launch, workspace=work
                        )

                us = 1e3 * self.median_ms(captured(layers)) / len(caches)
                read = cache_bytes(shape, length) / shape.layers
                rows.append({"tokens": length, "slots": slots, "us": us, "tb_s": read / us / 1e6})
        return rows

    def steps(self) -> list[dict]:
        """Milliseconds of every captured step, alone and repeated, beside the bytes it cannot avoid."""
        return [self.steps_at(self.engine, DRAFT_SHAPE, length) for length in self.args.lengths]

    def steps_at(self, engine: SpecExtend, draft: object, length: int) -> dict:
        """Args: draft: the shape of the draft's cache; None where it is not counted."""
        prompt, figures = self.prompt(length), {"tokens": length}
        torch.cuda.reset_peak_memory_stats()
        generation = engine.generate(prompt, 64)
        peak = torch.cuda.max_memory_allocated()
        figures |= self.replayed_ms(engine, prompt, 64)
        alone = engine.with_config(METHODS["autoregressive"].config(engine.config.tree, engine.config.retrieval))
        figures["autoregressive_ms"] = self.replayed_ms(alone, prompt, 8)["verify_ms"]
        rounds = [one.seconds for one in generation.rounds[3:]]
        figures["round_ms"] = 1e3 * statistics.median(sum(seconds.values()) for seconds in rounds)
        figures["host_ms"] = 1e3 * statistics.median(seconds.get("host", 0.0) for seconds in rounds)
        figures["byte_floor_ms"] = self.floor_ms(self.models.target, cache_bytes(SHAPE, length))
        own = sum(weight.nbytes for model in (self.models.target, engine.models.draft) for weight in model.parameters())
        own += engine.cache_bytes
        if draft is not None:
            own += cache_bytes(draft, length + working_tokens(engine.config.tree, engine.config.retrieval))
        figures["peak_extra_gb"] = (peak - own) / 1e9
        return figures

    def slots(self) -> list[dict]:
        """Milliseconds of a verification by its slots: what a policy chooses among. More must never cost less."""
        rows = []
        for length in (self.args.lengths[0], self.args.lengths[-1]):
            for nodes in (95, 127):
                engine = self.engine.with_config(tree=replace(TreeConfig.priced(), nodes=nodes))
                for name, cost in self.replayed_ms(engine, self.prompt(length), 16).items():
                    if name.startswith("verify") and (nodes == 127) == (name != "verify 96_ms"):
                        rows.append({"tokens": length, "slots": int(name.split()[1].removesuffix("_ms")), "ms": cost})
        return sorted(rows, key=lambda row: (row["tokens"], row["slots"]))

    def policy(self) -> list[dict]:
        """Milliseconds of a round with one tree in every round: as a fixed bound, and as what a policy decides.

        Both write the same answers (temperature 0.8), in turns; what thinking about trees costs is in the second.
        """
        rows = []
        trees = {"fixed": TreeConfig(), "decided": TreeConfig(threshold=0.0, rule="price")}
        for length in (self.args.lengths[0], self.args.lengths[-1]):
            prompt, turns = self.prompt(length), []
            engines = {name: self.engine.with_config(tree=tree) for name, tree in trees.items()}
            with mock.patch.object(priced_graphs, "PricedTree", UnmovedTree):
                for turn in range(TURNS + 1):  # the first captures
                    order = sorted(engines, reverse=turn % 2 == 1)
                    turns.append({name: self.round_of(engines[name], prompt) for name in order})
            row = {f"{name}_{what}": statistics.median(turn[name][what] for turn in turns[1:])
                   for name in engines for what in ("round_ms", "tokens")}  # fmt: skip
            rows.append({"tokens": length, **row, "turns": turns[1:]})
        return rows

    def round_of(self, engine: SpecExtend, prompt: Tensor) -> dict[str, float]:
        """Milliseconds and tokens of the mean round of a generation."""
        generation = engine.generate(prompt, 256, sampling=SamplingConfig(0.8))
        rounds = len(generation.rounds)
        return {"round_ms": 1e3 * generation.decode_s / rounds, "tokens": len(generation.token_ids) / rounds}

    def replayed_ms(self, engine: SpecExtend, prompt: Tensor, new_tokens: int) -> dict[str, float]:
        """Milliseconds of each captured step, by name, in the state that a generation leaves behind."""
        with engine.steps_after(prompt, new_tokens) as steps:
            return {
                f"{name}_ms": self.median_ms(partial(steps.run, name), before=steps.restore) for name in steps.names()
            }

    def prefill(self) -> list[dict]:
        """Seconds to read a prompt: ours, by dense attention, transformers with sdpa and eagerly; and the draft's."""
        standard = SpecExtend(self.models, SpecExtendConfig.standard(), prefix_reuse=False)
        rows = []
        for length in self.args.lengths:
            prompt = self.prompt(length)
            ours = [self.engine.generate(prompt, 1).prefill_seconds for _ in range(4)][1:]
            dense = [standard.generate(prompt, 1).prefill_seconds["target"] for _ in range(4)][1:]
            medians = {f"{of}_s": statistics.median(one.get(of, 0.0) for one in ours) for of in ("target", "draft")}
            medians["standard_s"] = statistics.median(dense)
            for how in ("sdpa", "eager"):
                transformers = [self.hugging_face_s(prompt, how) for _ in range(4)][1:]
                medians[f"hugging_face_{how}_s"] = statistics.median(transformers)
            rows.append({"tokens": length, **medians})
        return rows

    def trace(self) -> dict:
        """What the host and the device do in one round: no wait but one."""
        profile = torch.profiler.profile(acc_events=True)
        with self.engine.steps_after(self.prompt(self.args.lengths[-1]), 32) as steps:
            with torch.inference_mode(), profile:
                for name in steps.names():
                    if name != "refresh":
                        steps.run(name)
                torch.cuda.synchronize()
            steps.restore()
        events = profile.key_averages()
        host = {event.key: event.count for event in events if event.key.startswith("cuda")}
        device = {e.key: (e.count, e.device_time_total) for e in events if not e.key.startswith(("cuda", "aten"))}
        slowest = sorted(device.items(), key=lambda item: -item[1][1])[:30]
        return {
            "host_calls": host,
            "kernels": [{"name": name[:90], "launches": count, "us": us} for name, (count, us) in slowest],
        }

    def eagle(self) -> list[dict]:
        """The steps with the EAGLE heads in their 7B shapes."""
        rows = []
        for head in ("eagle1", "eagle3"):
            small = load_eagle("bundled", head=head, device="cuda", dtype="float32")
            with torch.inference_mode():
                wide = widen_head(small.draft, self.small.target, self.models.target, draft_vocab=EAGLE_VOCAB)
            models = replace(self.models, draft=wide, drafter=partial(EagleDrafter, target=self.models.target))
            config = SpecExtendConfig.specextend(tree=SLOTS, retrieval=RETRIEVAL)
            with SpecExtend(models, config, prefix_reuse=False) as engine:
                rows.append({"head": head, "steps": self.steps_at(engine, None, self.args.lengths[-1])})
        return rows

    def long(self) -> list[dict]:
        """Llama-3.1-8B's shape at 16K to 128K tokens of context: what a step costs; the text means nothing there.

        Verified is a chain of 64, which prompt lookup proposes.
        """
        self.engine.close()
        self.models = None  # lets go of the widened pair
        torch.cuda.empty_cache()
        with torch.inference_mode():
            target = widen(self.small.target, LONG_SHAPE, dtype=self.dtype, device=self.device)
        models = replace(
            self.small, target=target, draft=None, dtype=self.dtype, limit=1 << 18, vocab_size=LONG_SHAPE.vocab
        )
        config = replace(METHODS["prompt_lookup"].config(CHAIN, RetrievalConfig()), tree=CHAIN)
        lookup = SpecExtend(models, config, prefix_reuse=False)
        rows = []
        for length in (16000, 32000, 64000, 128000):
            generation = lookup.autoregressive(self.prompt(length), 24)
            step = [sum(one.seconds.values()) for one in generation.rounds[4:]]
            rows.append(
                {
                    "tokens": length, "autoregressive_ms": 1e3 * statistics.median(step),
                    "verify_ms": self.replayed_ms(lookup, self.prompt(length), 8)["verify_ms"],
                    "byte_floor_ms": self.floor_ms(target, cache_bytes(LONG_SHAPE, length)),
                    "prefill_s": generation.ttft_s,
                }
            )  # fmt: skip
        return rows

    # --- what the parts share ---

    def floor_ms(self, target: torch.nn.Module, cache: int) -> float:
        """One pass over a target's weights, a few rows of the embedding, and its cache at the measured bandwidth."""
        weights = sum(weight.nbytes for weight in target.parameters()) - target.get_input_embeddings().weight.nbytes
        return (weights + cache) / self.record.get("bandwidth", {"read_tb_s": 4.27})["read_tb_s"] / 1e9

    def prompt(self, length: int) -> Tensor:
        """The first `length` tokens of the longest texts at hand, repeated if they are too short."""
        return self.text.repeat(-(-length // len(self.text)))[:length]

    @torch.inference_mode()
    def hugging_face_s(self, ids: Tensor, attention: str) -> float:
        """Seconds of transformers' own prefill with this attention of its own and a dynamic cache."""
        model, cache = self.models.target, DynamicCache()
        model.set_attn_implementation(attention)
        try:
            read = partial(model, ids[None], past_key_values=cache, use_cache=True, logits_to_keep=1)
            return elapsed_ms(read, self.device) / 1e3
        finally:
            model.set_attn_implementation(NAME)


if __name__ == "__main__":
    flags.run(main)

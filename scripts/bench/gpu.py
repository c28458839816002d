"""Speed on a GPU at the cost of large models, without a download: results/<gpu>/bench.json, summary.json and a table.

    python scripts/bench_gpu.py --data_dir data/govreport data/pg19 --output results/h200
    python scripts/bench_gpu.py --only stages --output results/h200     # takes one part anew, the others stay

The bundled models are widened to the shapes of Vicuna-7B and Vicuna-68M (`specextend.models.widen`): their
tokens, and so their acceptance, at the cost of the large models' weights. Everything runs in one process;
medians after warm-up.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import DynamicCache

sys.path.insert(0, str(Path(__file__).parents[1]))

from gpu_figures import CAPTURED, EAGER, SPECEXTEND, STANDARD, summary

from eagle.drafter import EagleDrafter
from eagle.models import BUNDLED_RETRIEVAL, RETRIEVAL
from eagle.models import load_models as load_eagle
from eagle.widen import widen_head
from specextend import SamplingConfig, SpecExtend, SpecExtendConfig
from specextend.config import TreeConfig
from specextend.data.builtin import builtin_text
from specextend.data.prompts import find_buckets, read_prompts
from specextend.evaluation.environment import environment
from specextend.evaluation.journal import write_json
from specextend.evaluation.records import first_difference
from specextend.kernels import tree_attention
from specextend.kernels.tree import TreeBuffers
from specextend.modeling.attention import NAME
from specextend.modeling.fused_target import FusedTarget
from specextend.modeling.llama_blocks import Workspaces
from specextend.models.loading import LoadedModels, load_models
from specextend.models.widen import SHAPES, Shape, widen

PARTS = ("bandwidth", "kernels", "stages", "prefill", "trace", "decode", "eagle", "long")
REPEATS = 20
SHAPE, DRAFT_SHAPE, LONG_SHAPE = SHAPES["vicuna_7b"], SHAPES["vicuna_68m"], SHAPES["llama31_8b"]
SLOTS = TreeConfig(nodes=63, threshold=0.0)  # 64 with the root, and always ten levels
EAGLE_VOCAB = 32000  # draft vocabulary of the published EAGLE-3 heads
GIB = 1 << 30


def main() -> None:
    args = parse_args()
    if args.summarize:
        write_json(args.summarize.with_name("summary.json"), summary(json.loads(args.summarize.read_text())))
        return
    bench = Bench(args)
    for part in (part for part in PARTS if part in args.only):  # in that order: the last lets go of the models
        began = time.monotonic()
        bench.results[part], bench.commands[part] = getattr(bench, part)(), shlex.join(sys.argv)
        bench.note(f"{part}: {time.monotonic() - began:.0f}s")
        bench.write()
    print(table(summary(bench.results)))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1000, 2000, 4000, 8000, 16000])
    parser.add_argument("--data_dir", type=Path, nargs="+", default=[], help="folders of prompts; else built-in text")
    parser.add_argument("--samples", type=int, default=2, help="prompts per data set and length")
    parser.add_argument("--new_tokens", type=int, default=256)
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 0.8])
    parser.add_argument("--decode_seconds", type=float, default=140.0, help="for decoding prompts, per pair of models")
    parser.add_argument("--output", type=Path, default=Path("results/gpu"))
    parser.add_argument("--summarize", type=Path, metavar="BENCH_JSON", help="only write its summary.json anew")
    args = parser.parse_args()
    if args.summarize:
        return args
    if not torch.cuda.is_available():
        parser.error("there is no CUDA GPU here")
    for folder in args.data_dir:
        missing = {bucket(length) for length in args.lengths} - find_buckets(folder).keys()
        if missing:
            parser.error(f"{folder} has no prompts of {', '.join(sorted(missing))} tokens; choose other --lengths")
    return args


def bucket(length: int) -> str:
    """The data sets' name of a length."""
    return f"{length // 1000}K" if length >= 1000 else str(length)


class Bench:
    """The models of one shape, what was measured so far, and where it goes."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.dtype, self.device = args, getattr(torch, args.dtype), torch.device("cuda")
        self.results: dict[str, object] = {}
        self.commands: dict[str, str] = {}  # by which each part was measured
        self.log: list[str] = []
        args.output.mkdir(parents=True, exist_ok=True)
        self._go_on()
        began = time.monotonic()
        self.small = load_models("bundled", device="cuda", dtype="float32")
        self.models = self._widened()
        torch.cuda.synchronize()
        self.note(f"widened to {SHAPE} in {time.monotonic() - began:.1f}s")
        self.engine = SpecExtend(self.models, SpecExtendConfig.specextend(tree=TreeConfig()))
        texts = [read_prompts(list(find_buckets(folder).values())[-1], limit=2)[-1].text for folder in args.data_dir]
        self.text = self.engine.encode("\n".join(texts) or builtin_text())

    def _go_on(self) -> None:
        """Take over what an earlier run on this kind of GPU measured, to be replaced part by part."""
        path = self.args.output / "bench.json"
        found = json.loads(path.read_text()) if path.exists() else {}
        if found.get("gpu") == torch.cuda.get_device_name():
            self.results = {part: found[part] for part in PARTS if part in found}
            self.commands = dict(found["commands"])

    def _widened(self) -> LoadedModels:
        options = {"dtype": self.dtype, "device": self.device}
        with torch.inference_mode():
            target = widen(self.small.target, SHAPE, **options)
            draft = widen(self.small.draft, DRAFT_SHAPE, seed=1, **options)
        return replace(
            self.small, name="bundled widened to Vicuna-7B's shape", target=target, draft=draft, dtype=self.dtype,
            vocab_size=SHAPE.vocab,
        )  # fmt: skip

    def note(self, line: str) -> None:
        self.log.append(line)
        print(line, flush=True)

    def write(self) -> None:
        record = {
            "commands": self.commands, "environment": environment(), "gpu": torch.cuda.get_device_name(),
            "shape": asdict(SHAPE), "dtype": self.args.dtype,
            "pair": "bundled models widened without changing what they compute; no weights of that size were loaded",
            "log": self.log, **self.results,
        }  # fmt: skip
        write_json(self.args.output / "bench.json", record)
        write_json(self.args.output / "summary.json", summary(self.results))

    # --- parts ---

    def bandwidth(self) -> dict:
        """TB/s of a large copy, bytes read plus written, and of a large read."""
        source = torch.empty(2 * GIB, dtype=torch.float32, device=self.device).normal_()
        target = torch.empty_like(source)
        copy, read = median_ms(lambda: target.copy_(source)), median_ms(lambda: torch.sum(source))
        return {"copy_tb_s": 2 * source.nbytes / copy / 1e9, "read_tb_s": source.nbytes / read / 1e9}

    def kernels(self) -> list[dict]:
        """Tree attention alone, over several layers' caches so that none stays in the L2 cache."""
        shape, rows = SHAPE, []
        for length in (1000, 16000):
            caches = torch.randn(
                8, 2, shape.kv_heads, length + 128, shape.head_dim, dtype=self.dtype, device=self.device
            )
            for slots in (1, 64):
                query = torch.randn(shape.heads, slots, shape.head_dim, dtype=self.dtype, device=self.device)
                mask = torch.ones(slots, slots, dtype=torch.bool, device=self.device).tril()
                words, known = tree_attention.pack_mask(mask), torch.tensor(length, device=self.device)
                launch = tree_attention.launch_for(self.device, shape.kv_heads, shape.heads // shape.kv_heads * slots)
                work = tree_attention.Workspace(*query.shape, launch.splits, self.device)

                def layers(query=query, caches=caches, known=known, words=words, launch=launch, work=work, slots=slots):
                    for keys, values in caches:
                        tree_attention.tree_attention(
                            query, keys, values, known, words, 0.1, slots=slots, launch=launch, workspace=work
                        )

                us = 1e3 * median_ms(captured(layers)) / len(caches)
                read = cache_bytes(shape, length, self.dtype) / shape.layers
                rows.append({"tokens": length, "slots": slots, "us": us, "tb_s": read / us / 1e6})
        return rows

    def prefill(self) -> list[dict]:
        """Seconds to read a prompt: Hugging Face with sdpa, ours, and the draft's."""
        rows = []
        for length in self.args.lengths:
            prompt = self.prompt(length)
            self.hugging_face(prompt, 1)
            ours = [self.engine.generate(prompt, 1).prefill_seconds for _ in range(4)][1:]
            rows.append(
                {
                    "tokens": length,
                    "target_s": statistics.median(one["target"] for one in ours),
                    "draft_s": statistics.median(one.get("draft", 0.0) for one in ours),
                    "hugging_face_sdpa_s": self.hugging_face(prompt, 1)["prefill_s"],
                }
            )
        return rows

    def stages(self) -> list[dict]:
        """Milliseconds of every captured step, alone and repeated, beside the bytes it cannot avoid."""
        engine = self.engine.with_config(SpecExtendConfig.specextend(tree=SLOTS))
        return [self.stages_at(engine, length) for length in self.args.lengths]

    def stages_at(self, engine: SpecExtend, length: int) -> dict:
        prompt = self.prompt(length)
        torch.cuda.reset_peak_memory_stats()
        generation = engine.generate(prompt, 64)
        loop, decoder = engine._speculative, engine._autoregressive
        engine.autoregressive(prompt, 8)
        peak = torch.cuda.max_memory_allocated()
        one, figures = loop.round, {"tokens": length}
        lengths = [one.target.cache.length, *(cache.length for cache in one.drafter._caches), one.tree.count]
        saved = [value.clone() for value in lengths]

        def restore() -> None:
            for value, old in zip(lengths, saved, strict=True):
                value.copy_(old)

        for name, step in loop.steps.items():
            figures[f"{name if isinstance(name, str) else name[0]}_ms"] = median_ms(step, restore)
        step = next(iter(decoder.steps.values()))[1]
        at = decoder.decoder.target.cache.length
        before = at.clone()
        figures["autoregressive_ms"] = median_ms(step, lambda: at.copy_(before))
        figures["round_ms"] = 1e3 * statistics.median(sum(r.seconds.values()) for r in generation.rounds[3:])
        figures["host_ms"] = 1e3 * statistics.median(r.seconds["host"] for r in generation.rounds[3:])
        figures["byte_floor_ms"] = self.floor_ms(length)
        own = sum(weight.nbytes for model in (self.models.target, engine.models.draft) for weight in model.parameters())
        caches = [one.target.cache, *one.drafter._caches]
        own += sum(cache.keys.nbytes + cache.values.nbytes for cache in caches)
        figures["peak_extra_gb"] = (peak - own) / 1e9
        return figures

    def decode(self) -> list[dict]:
        """Real prompts beside our captured autoregressive decoding; standard is captured and fused like SpecExtend."""
        standard = SpecExtendConfig(flash_prefill=True, hybrid_tree_attention=True, tree=TreeConfig())
        engines = {SPECEXTEND: self.engine, STANDARD: self.engine.with_config(standard)}
        return self.decode_all(engines, self.args.lengths, self.args.samples, self.args.decode_seconds)

    def decode_all(
        self, engines: dict[str, SpecExtend], lengths: list[int], samples: int, seconds: float
    ) -> list[dict]:  # fmt: skip
        """The first prompt of every length at every temperature, then the second, until the time is over."""
        rows, began = [], time.monotonic()
        for sample in range(samples):
            for temperature in self.args.temperatures:
                for prompt in self.prompts(lengths, sample):
                    if time.monotonic() - began > seconds:
                        self.note(f"decode stops after {seconds:.0f}s, {len(rows)} rows")
                        return rows
                    measured = list(self.decode_one(engines, temperature, *prompt))
                    if not sample and not temperature:
                        measured.append(
                            self.about(temperature, *prompt) | {"method": EAGER} | self.hugging_face(prompt[2], 12)
                        )
                    rows += [row | {"sample": sample} for row in measured]
        return rows

    def decode_one(
        self, engines: dict[str, SpecExtend], temperature: float, name: str, length: int, ids: Tensor
    ) -> Iterator[dict]:
        sampling, about = SamplingConfig(temperature=temperature), self.about(temperature, name, length, ids)
        alone = self.engine.autoregressive(ids, self.args.new_tokens, sampling=sampling)
        yield about | self.row(CAPTURED, alone)
        for method, engine in engines.items():
            generation = engine.generate(ids, self.args.new_tokens, sampling=sampling)
            part = first_difference(generation.token_ids, alone.token_ids)
            gap = self.gap(ids, alone.token_ids, part, sampling)
            yield about | self.row(method, generation) | {"first_difference": part, "gap": gap}

    def about(self, temperature: float, name: str, length: int, ids: Tensor) -> dict:
        return {"data": name, "tokens": length, "temperature": temperature, "prompt_tokens": len(ids)}

    def eagle(self) -> list[dict]:
        """Stages and decoding with the EAGLE heads in their 7B shapes."""
        rows = []
        for head in ("eagle1", "eagle3"):
            small = load_eagle("bundled", head=head, device="cuda", dtype="float32")
            with torch.inference_mode():
                wide = widen_head(small.draft, self.small.target, self.models.target, draft_vocab=EAGLE_VOCAB)
            models = replace(self.models, draft=wide, drafter=partial(EagleDrafter, target=self.models.target))
            engine = SpecExtend(
                models, SpecExtendConfig.specextend(tree=SLOTS, retrieval=RETRIEVAL), cache=self.engine._cache
            )
            rows.append({"head": head, "stages": self.stages_at(engine, self.args.lengths[-1])})
            # these heads have seen no more than 1,024 tokens
            engine = engine.with_config(replace(engine.config, tree=TreeConfig(), retrieval=BUNDLED_RETRIEVAL))
            standard = engine.with_config(replace(engine.config, draft_cache="full"))
            engines = {head: engine, f"{head} standard": standard}
            rows[-1]["decode"] = self.decode_all(engines, self.args.lengths[1::2], 1, self.args.decode_seconds / 5)
        return rows

    def trace(self) -> dict:
        """What the host and the device do in one round: no wait but one."""
        prompt, profile = self.prompt(self.args.lengths[-1]), torch.profiler.profile(acc_events=True)
        loop = self.engine._speculative
        self.engine.generate(prompt, 32)
        one = loop.round
        steps = [step for name, step in loop.steps.items() if name != "refresh"]
        with torch.inference_mode(), profile:
            for step in steps:
                step()
            one.read()
        events = profile.key_averages()
        host = {event.key: event.count for event in events if event.key.startswith("cuda")}
        device = {e.key: (e.count, e.device_time_total) for e in events if not e.key.startswith(("cuda", "aten"))}
        slowest = sorted(device.items(), key=lambda item: -item[1][1])[:30]
        return {
            "host_calls": host,
            "kernels": [{"name": name[:90], "launches": count, "us": us} for name, (count, us) in slowest],
        }

    def long(self) -> list[dict]:
        """Llama-3.1-8B's shape at 16K to 128K tokens of context: what a step costs; the text means nothing there."""
        self.models = self.engine = None  # lets go of the widened pair
        torch.cuda.empty_cache()
        with torch.inference_mode():
            target = widen(self.small.target, LONG_SHAPE, dtype=self.dtype, device=self.device)
        models = replace(
            self.small, target=target, draft=None, dtype=self.dtype, limit=1 << 18, vocab_size=LONG_SHAPE.vocab
        )
        engine, rows = SpecExtend(models), []
        for length in (16000, 32000, 64000, 128000):
            generation = engine.autoregressive(self.prompt(length), 24)
            step = [sum(one.seconds.values()) for one in generation.rounds[4:]]
            floor = (weight_bytes(target) + cache_bytes(LONG_SHAPE, length, self.dtype)) / self.read_rate / 1e9
            rows.append(
                {
                    "tokens": length, "autoregressive_ms": 1e3 * statistics.median(step),
                    "verify_ms": self.verify_ms(engine), "byte_floor_ms": floor, "prefill_s": generation.ttft_s,
                }
            )  # fmt: skip
        return rows

    @torch.inference_mode()
    def verify_ms(self, engine: SpecExtend) -> float:
        """Milliseconds to verify a chain of 64 behind what the engine's target read last."""
        tree = TreeBuffers(SLOTS, LONG_SHAPE.vocab, self.device)
        tree.depth.copy_(torch.arange(tree.slots))
        tree.ancestor_bits.copy_(
            tree_attention.pack_mask(torch.ones(tree.slots, tree.slots, device=self.device).tril().bool())
        )
        target = FusedTarget(engine._baseline, Workspaces(self.device), tree.slots)
        return median_ms(captured(lambda: target.verify(tree).argmax(-1)))

    # --- what the parts share ---

    @property
    def read_rate(self) -> float:
        """TB/s; the machine's own where it was measured."""
        return self.results.get("bandwidth", {"read_tb_s": 4.27})["read_tb_s"]

    def floor_ms(self, length: int) -> float:
        """One pass over the target's weights and cache at the measured bandwidth."""
        cache = cache_bytes(SHAPE, length, self.dtype)
        return (weight_bytes(self.models.target) + cache) / self.read_rate / 1e9

    def prompt(self, length: int) -> Tensor:
        """The first `length` tokens of the longest texts at hand, repeated if they are too short."""
        return self.text.repeat(-(-length // len(self.text)))[:length]

    def prompts(self, lengths: list[int], sample: int) -> Iterator[tuple[str, int, Tensor]]:
        """(data set, nominal length, ids) of prompt number `sample` of every data set and length."""
        for folder in self.args.data_dir:
            for length in lengths:
                prompt = read_prompts(find_buckets(folder)[bucket(length)], limit=sample + 1)[-1]
                yield folder.name, length, self.engine.encode(prompt.text)[:length]
        if not self.args.data_dir and not sample:
            yield from (("built-in", length, self.prompt(length)) for length in lengths)

    def row(self, method: str, generation) -> dict:
        rounds = generation.rounds[2:] or generation.rounds  # the first run is not captured, the second captures
        seconds, tokens = sum(sum(r.seconds.values()) for r in rounds), sum(len(r.tokens) for r in rounds)
        return {
            "method": method, "new_tokens": generation.new_tokens, "prefill_s": generation.ttft_s,
            "decode_tokens_per_s": tokens / seconds, "ms_per_round": 1e3 * seconds / len(rounds),
            "accepted_per_round": sum(r.accepted for r in rounds) / len(rounds),
        }  # fmt: skip

    def gap(self, ids: Tensor, tokens: list[int], at: int | None, sampling: SamplingConfig) -> float | None:
        """Difference of the two highest logits where two outputs part: a near-tie, or a mistake."""
        if at is None or sampling.temperature:
            return None
        known = torch.cat((ids, torch.tensor(tokens[:at], dtype=torch.long, device=ids.device)))
        with torch.inference_mode():
            best = self.engine._baseline.prefill(known, 1)[0].float().topk(2).values
        return float(best[0] - best[1])

    @torch.inference_mode()
    def hugging_face(self, ids: Tensor, new_tokens: int) -> dict:
        """transformers' own forward passes with sdpa and a dynamic cache."""
        model, cache, times = self.models.target, DynamicCache(), []
        model.set_attn_implementation("sdpa")
        try:
            newest = ids[None]
            for _ in range(new_tokens):
                torch.cuda.synchronize()
                began = time.perf_counter()
                logits = model(newest, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
                newest = logits[:, -1].argmax(-1, keepdim=True)
                torch.cuda.synchronize()
                times.append(time.perf_counter() - began)
        finally:
            model.set_attn_implementation(NAME)
        step = statistics.median(times[2:]) if len(times) > 3 else None
        return {"prefill_s": times[0], "ms_per_round": step and 1e3 * step, "decode_tokens_per_s": step and 1 / step}


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes a step reads: all weights but the embedding's."""
    return sum(weight.nbytes for weight in model.parameters()) - model.get_input_embeddings().weight.nbytes


def cache_bytes(shape: Shape, tokens: int, dtype: torch.dtype) -> int:
    """Keys and values of all layers."""
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * tokens * dtype.itemsize


def captured(step: Callable[[], None]) -> Callable[[], None]:
    """`step` as a graph's replay."""
    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


@torch.inference_mode()
def median_ms(step: Callable[[], object], before: Callable[[], object] = lambda: None) -> float:
    """Median milliseconds of `step` on the device, `before` not counted."""
    times = []
    for repeat in range(REPEATS + 3):
        before()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        step()
        end.record()
        end.synchronize()
        if repeat >= 3:
            times.append(start.elapsed_time(end))
    before()
    return statistics.median(times)


def table(summary: dict[str, float]) -> str:
    width = max(map(len, summary), default=0)
    return "\n".join(f"{name:<{width}}  {value:10.3f}" for name, value in summary.items())


if __name__ == "__main__":
    main()

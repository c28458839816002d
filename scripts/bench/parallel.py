"""Verification and one token of a target on one GPU and shared by several: results/h200x2/parallel.json.

    torchrun --nproc_per_node 2 -m scripts.bench.parallel --output results/h200x2/parallel.json
    torchrun --nproc_per_node 2 -m scripts.bench.parallel --smoke --output /tmp/parallel.json     # CPUs, gloo

Random weights of a shape, made on every device; behind them a cache of random keys and values. Rank 0 measures the
whole model first (`FusedTarget`, what one GPU runs), then all ranks their shares (`ShardedFusedTarget`),
with sums over ranks by NCCL and by the peers' memory, met at a barrier or inside the kernel that sums. On a GPU every
step is a captured CUDA graph. What is left out of 70B are layers:
time per layer and readout are what matters. Medians of steps that begin together; the slowest rank's count. Logits are
compared with the whole model's.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

# NVLink's multicast is left off, which some hosts ask for; nothing here needs it
os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
if "--smoke" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from scripts.bench.timing import captured, median_ms
from specextend.cli import flags
from specextend.evaluation.environment import environment
from specextend.evaluation.journal import write_json
from specextend.kernels.elementwise import Norm
from specextend.kernels.tree import TreeNodes
from specextend.modeling.cache import KVCache
from specextend.modeling.fused_target import FusedTarget
from specextend.modeling.llama_blocks import Workspaces
from specextend.models import tensor_parallel
from specextend.models.sharded_target import GroupReducer, PeerReducer, ShardedFusedTarget
from specextend.models.tensor_parallel import Ranks
from specextend.models.widen import SHAPES, Shape

CASES = {
    "vicuna_7b": SHAPES["vicuna_7b"],
    "llama31_70b_8_layers": Shape(8192, 8, 64, 8, 128, 28672, 128256),
}
TINY = {"tiny": Shape(64, 1, 4, 2, 32, 96, 98)}
SUMS = ("process_group", "peer_memory", "peer_memory_signals")
STD = 0.02


@dataclass(frozen=True)
class Effort:
    """How much is measured."""

    tokens: int = 16000
    slots: int = 64
    warm_up: int = 3
    repeats: int = 20


def main() -> None:
    args = parse_args()
    ranks = tensor_parallel.join("cpu" if args.smoke else "cuda")
    effort = Effort(20, 4, 0, 1) if args.smoke else Effort(tokens=args.tokens)
    record = {
        "command": ["torchrun --nproc_per_node", str(ranks.count), "-m scripts.bench.parallel", *sys.argv[1:]],
        "environment": environment(), "ranks": ranks.count, "dtype": args.dtype, "effort": asdict(effort),
        "weights": "random, made on the device; no checkpoint was loaded", "shapes": {},
    }  # fmt: skip
    dtype = torch.float32 if args.smoke else getattr(torch, args.dtype)
    bench = Bench(args.output, ranks, dtype, effort, args.sums, record)
    for name, shape in (TINY if args.smoke else {name: CASES[name] for name in args.shapes}).items():
        bench.measure(name, shape)
    print(json.dumps({"output": str(args.output), "ratios": bench.ratios()}))
    tensor_parallel.leave()


def parse_args() -> argparse.Namespace:
    parser = flags.parser(__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--tokens", type=int, default=16000, help="committed, in the cache")
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16")
    parser.add_argument("--sums", nargs="+", choices=SUMS, default=list(SUMS), help="ways to sum over ranks")
    parser.add_argument("--smoke", action="store_true", help="a tiny shape through Triton's interpreter, on CPUs")
    parser.add_argument("--output", type=Path, default=Path("results/h200x2/parallel.json"))
    return parser.parse_args()


class Bench:
    """One rank's part in the measurements; rank 0 writes the record after each of them."""

    def __init__(
        self, output: Path, ranks: Ranks, dtype: torch.dtype, effort: Effort, sums: list[str], record: dict
    ):  # fmt: skip
        self._output, self._ranks, self._dtype, self._effort, self._record = output, ranks, dtype, effort, record
        self._device, self._sums = ranks.device, sums

    def measure(self, name: str, shape: Shape) -> None:
        """The whole model on rank 0, then shared by all, by each way to sum."""
        found = self._record["shapes"][name] = {"shape": asdict(shape)}
        with torch.inference_mode():
            model = random_llama(shape, self._dtype, self._device)
            keys_values = self._random_cache(shape)
            reference = None
            if not self._ranks.rank:
                target = FusedTarget(
                    model, self._cache(model, keys_values), Workspaces(self._device), self._effort.slots
                )
                found["one"], reference = self._steps(target, together=False)
            self._write()
            if self._ranks.count == 1:
                return
            dist.barrier()
            share = share_of(model, shape, self._ranks)
            del model
            heads = shape.kv_heads // self._ranks.count
            keys_values = keys_values[:, :, :, self._ranks.rank * heads : (self._ranks.rank + 1) * heads].clone()
            cache = self._cache(share, keys_values)
            for kind, make in self._reducers(shape).items():
                self._measure_shared(found, kind, make, (share, cache), shape, reference)
        del share, cache, keys_values
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _measure_shared(
        self,
        found: dict,
        kind: str,
        make: Callable,
        part: tuple[LlamaForCausalLM, KVCache],
        shape: Shape,
        reference: Tensor | None,
    ) -> None:
        failure, sums = None, None
        try:
            sums = make()
        except (RuntimeError, NotImplementedError) as error:
            failure = " ".join(str(error).split())[:200]
        failures: list[str | None] = [None] * self._ranks.count
        dist.all_gather_object(failures, failure)
        if any(failures):  # one rank's failure is everyone's
            found[kind] = {"failed": next(filter(None, failures))}
            self._write()
            return
        fused = ShardedFusedTarget(*part, Workspaces(self._device), self._effort.slots, sums, shape.vocab)
        found[kind], logits = self._steps(fused, together=True)
        found[kind]["sum_us"] = self._sum_us(sums, shape)
        if reference is not None:
            found[kind] |= {
                "of_one": {step: found[kind][step] / found["one"][step] for step in ("verify_ms", "token_ms")},
                "logits_error": float((logits - reference).norm() / reference.norm()),
                "same_choices": float((logits.argmax(-1) == reference.argmax(-1)).float().mean()),
            }
        self._write()

    def _reducers(self, shape: Shape) -> dict[str, Callable]:
        rows, place = self._effort.slots, (self._dtype, self._device)
        share = shape.vocab // self._ranks.count
        kinds = {
            "process_group": lambda: GroupReducer(rows, shape.hidden, *place),
            "peer_memory": lambda: PeerReducer(rows, shape.hidden, share, *place, signals=False),
            "peer_memory_signals": lambda: PeerReducer(rows, shape.hidden, share, *place, signals=True),
        }
        return {kind: kinds[kind] for kind in self._sums}

    def _steps(self, target: FusedTarget, *, together: bool) -> tuple[dict, Tensor]:
        """Milliseconds of a verification and of a token, and the verification's logits [T, V]."""
        tree, root = (TreeNodes.chain(slots - 1, self._device) for slots in (self._effort.slots, 1))
        chosen = {nodes: torch.zeros_like(nodes.tokens) for nodes in (tree, root)}
        logits: dict[object, Tensor] = {}

        def step(nodes) -> Callable[[], None]:
            def run() -> None:
                logits[nodes] = target.verify(nodes)
                chosen[nodes].copy_(logits[nodes].argmax(-1))

            return run

        found: dict = {}
        for name, nodes in (("token", root), ("verify", tree)):  # whose logits are compared comes last
            found[f"{name}_ms"] = self._median_ms(step(nodes), together)
        return found, logits[tree].float().clone()

    def _median_ms(self, step: Callable[[], object], together: bool) -> float:
        """Median of a step, captured on a GPU; of steps that all ranks begin together, the slowest rank's."""

        def begin() -> None:
            if together:
                dist.barrier()
            self._synchronize()

        step = captured(step) if self._device.type == "cuda" else step
        counts = {"repeats": self._effort.repeats, "warm_up": self._effort.warm_up}
        median = torch.tensor(median_ms(step, self._device, before=begin, **counts), device=self._device)
        if together:
            dist.all_reduce(median, op=dist.ReduceOp.MAX)
        return float(median)

    def _sum_us(self, sums, shape: Shape) -> float:
        """Microseconds of one sum with its norm, of 64 in a row."""
        rows, count = self._effort.slots, 64 if self._device.type == "cuda" else 2
        residual = torch.zeros(rows, shape.hidden, dtype=self._dtype, device=self._device)
        norm = Norm(torch.ones(shape.hidden, dtype=self._dtype, device=self._device), 1e-5)

        def run() -> None:
            for _ in range(count):
                sums.part(rows).zero_()
                sums.add_and_norm(residual, norm)

        return 1e3 * self._median_ms(run, together=True) / count

    def _random_cache(self, shape: Shape) -> Tensor:
        """Keys and values [2, L, 1, H_kv, S, D], the same on every rank."""
        generator = torch.Generator(self._device).manual_seed(1)
        size = (2, shape.layers, 1, shape.kv_heads, self._effort.tokens + self._effort.slots, shape.head_dim)
        return torch.randn(size, generator=generator, dtype=self._dtype, device=self._device)

    def _cache(self, model: LlamaForCausalLM, keys_values: Tensor) -> KVCache:
        cache = KVCache(model.config, self._dtype, self._device)
        cache.reset(keys_values.shape[4])
        cache.fill(*keys_values[..., : self._effort.tokens, :])
        return cache

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _write(self) -> None:
        if not self._ranks.rank:
            write_json(self._output, self._record)
            print(f"measured so far: {', '.join(self._record['shapes'])}", flush=True)

    def ratios(self) -> dict:
        """Shared over alone, the best way to sum of each shape."""
        return {
            name: {
                step: min((kind["of_one"][step] for kind in found.values() if "of_one" in kind), default=None)
                for step in ("verify_ms", "token_ms")
            }
            for name, found in self._record["shapes"].items()
        }


def random_llama(shape: Shape, dtype: torch.dtype, device: torch.device) -> LlamaForCausalLM:
    """A Llama with random weights, the same on every rank."""
    model = empty_llama(shape, dtype, device)
    generator = torch.Generator(device).manual_seed(0)
    for weight in model.parameters():
        if weight.ndim == 2:
            weight.normal_(0.0, STD, generator=generator)
        else:
            weight.fill_(1.0)
    return model


def share_of(model: LlamaForCausalLM, shape: Shape, ranks: Ranks) -> LlamaForCausalLM:
    """One rank's heads and neurons of `model`, and its rows of the readout."""
    count = ranks.count
    local = replace(shape, heads=shape.heads // count, kv_heads=shape.kv_heads // count, ffn=shape.ffn // count)
    share = empty_llama(local, model.dtype, ranks.device)
    share.lm_head = nn.Linear(
        shape.hidden, shape.vocab // count, bias=False, dtype=model.dtype, device=ranks.device
    ).requires_grad_(False)
    whole = dict(model.named_parameters())
    for name, weight in share.named_parameters():
        part = whole[name]
        if part.shape != weight.shape:
            dim = 0 if part.shape[0] != weight.shape[0] else 1
            part = part.chunk(count, dim)[ranks.rank]
        weight.copy_(part)
    return share


def empty_llama(shape: Shape, dtype: torch.dtype, device: torch.device) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=shape.hidden, num_hidden_layers=shape.layers, num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads, head_dim=shape.head_dim, intermediate_size=shape.ffn,
        vocab_size=shape.vocab, max_position_embeddings=1 << 17, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(dtype)
    model = model.to_empty(device=device)
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    return model.requires_grad_(False).eval()


if __name__ == "__main__":
    flags.run(main)

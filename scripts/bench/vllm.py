"""The same weights and prompts in vLLM and in our engine, one after the other: results/<gpu>/vllm.json.

    python -m scripts.bench.vllm --data_dir data/govreport data/pg19 --output results/h200

The bundled pair, widened to the shapes of Vicuna-7B and Vicuna-68M, is saved as two checkpoints that both engines
decode: vLLM autoregressively, with the draft model and by n-grams; ours autoregressively and with trees. Greedy, batch
1, EOS ignored, no prefix kept from one prompt to the next; each way to decode runs in a process of its own. The clock
goes around one whole call: the prefill is a call for one token, decoding what a call for many takes longer.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from scripts.bench.widened import widened
from specextend import SpecExtend, SpecExtendConfig
from specextend.cli import flags
from specextend.config import TreeConfig
from specextend.data.prompts import find_buckets, read_prompts
from specextend.errors import ConfigError
from specextend.evaluation.environment import environment
from specextend.evaluation.journal import write_json
from specextend.models.loading import load_models
from specextend.models.widen import SHAPES

SHAPE = "vicuna_7b"
LENGTHS = {"1K": 1000, "4K": 4000, "16K": 16000}  # bucket of the prompts, tokens read of each
POSITIONS = 20480  # both checkpoints say that they can be read so far: vLLM sizes its tables of angles by it
NEW_TOKENS = 257  # the first comes out of the prefill
WARM_UP = 24
THRESHOLDS = (0.7, 0.1, 0.05)  # of our tree's stop rule; the first is the paper's
VLLM: dict[str, dict[str, Any]] = {  # arguments of the engine beside those of all
    "vllm_ar": {},
    "vllm_draft_5": {"speculative_config": {"method": "draft_model", "num_speculative_tokens": 5}},
    "vllm_draft_8": {
        "speculative_config": {"method": "draft_model", "num_speculative_tokens": 8}, "async_scheduling": True,
    },
    "vllm_ngram": {
        "speculative_config": {
            "method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 4, "prompt_lookup_min": 2,
        },
    },
}  # fmt: skip
Answer = Callable[[list[int], int], list[int]]  # prompt, how many new tokens -> those


class Prompt(NamedTuple):
    """The first tokens of a text.

    Attributes:
        tokens: how many were wanted; a short text has fewer.
        sample: its number in the data set.
    """

    data: str
    tokens: int
    sample: int
    ids: list[int]


@dataclass(frozen=True)
class Work:
    """What every process is told: where the checkpoints lie, what is read, how often."""

    folder: Path
    data: list[Path]
    samples: int
    repeats: int


def main() -> None:
    args = parse_args()
    record = {
        "command": shlex.join(["python", "-m", "scripts.bench.vllm", *sys.argv[1:]]),
        "environment": environment() | {"vllm": importlib.metadata.version("vllm")},
        "gpu": torch.cuda.get_device_name(), "dtype": "float16", "shape": asdict(SHAPES[SHAPE]),
        "pair": "bundled models widened without changing what they compute; no weights of that size were loaded",
        "settings": {}, "rows": [],
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        work = Work(Path(folder), args.data_dir, args.samples, args.repeats)
        for part, name in ((measure_ours, "ours"), *((measure_vllm, name) for name in VLLM)):
            settings, rows = in_own_process(part, work, name)
            record["settings"] |= settings
            record["rows"] += rows
            write_json(args.output / "vllm.json", record)
            print(f"{name}: {len(rows)} rows", flush=True)
    print(json.dumps({"output": str(args.output / "vllm.json"), "rows": len(record["rows"])}))


def parse_args() -> argparse.Namespace:
    parser = flags.parser(__doc__.splitlines()[0])
    parser.add_argument("--data_dir", type=Path, nargs="+", required=True, help="folders of prompts")
    parser.add_argument("--samples", type=int, default=2, help="prompts of each folder and length (default: 2)")
    parser.add_argument("--repeats", type=int, default=3, help="measured calls of each kind (default: 3)")
    parser.add_argument("--output", type=Path, default=Path("results/gpu"))
    args = parser.parse_args()
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError("vLLM is not installed here, and this measures beside it: pip install vllm")
    if not torch.cuda.is_available():
        raise ConfigError("there is no CUDA GPU here; vLLM and our captured rounds both need one")
    return args


def in_own_process(part: Callable, *args: object) -> Any:
    """What `part` returns; its memory on the GPU is free again afterwards. Unlike a daemon it may have children."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(part, *args).result()


def measure_ours(work: Work, _: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Settings and rows of our engine; leaves the checkpoints and the prompts behind for vLLM."""
    small = load_models("bundled", device="cuda", dtype="float32")
    models = replace(widened(small, SHAPE), eos_token_ids=frozenset())
    configs = {f"ours_tree_{end:g}": SpecExtendConfig.specextend(tree=TreeConfig(threshold=end)) for end in THRESHOLDS}
    first, *others = configs
    engines = {first: SpecExtend(models, configs[first], prefix_reuse=False)}
    engines |= {name: engines[first].with_config(configs[name]) for name in others}
    prompts = read(work, lambda text: engines[first].encode(text).tolist())
    (work.folder / "prompts.json").write_text(json.dumps(prompts))
    for name, model in (("target", models.target), ("draft", models.draft)):
        model.config.max_position_embeddings = POSITIONS
        model.save_pretrained(work.folder / name)

    counted: list[int] = []

    def ours(generate: Callable) -> Answer:
        def answer(ids: list[int], new_tokens: int) -> list[int]:
            generation = generate(torch.tensor(ids, device="cuda"), new_tokens)
            torch.cuda.synchronize()
            counted.append(len(generation.rounds))
            return generation.token_ids

        return answer

    answers = {"ours_ar": ours(engines[first].autoregressive)}
    answers |= {name: ours(engine.generate) for name, engine in engines.items()}
    rows = []
    for name, answer in answers.items():
        rows += measured(name, answer, lambda: sum(counted), prompts, work.repeats)
    return {name: asdict(config) for name, config in configs.items()}, rows


def measure_vllm(work: Work, name: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Settings and rows of one way to decode with vLLM."""
    os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")  # greedy decoding has no use for it
    from vllm import LLM, SamplingParams

    settings: dict[str, Any] = {
        "dtype": "float16", "skip_tokenizer_init": True, "max_num_seqs": 1, "max_model_len": 16896,
        "enable_prefix_caching": False, "gpu_memory_utilization": 0.85, "seed": 0, "disable_log_stats": False,
    } | VLLM[name]  # fmt: skip
    guess = dict(settings.get("speculative_config", {}))
    if guess.get("method") == "draft_model":
        guess["model"] = str(work.folder / "draft")
    llm = LLM(model=str(work.folder / "target"), **settings | ({"speculative_config": guess} if guess else {}))

    def rounds() -> int:
        """Drafts verified since the start; 0 without a draft."""
        return sum(int(one.value) for one in llm.get_metrics() if one.name == "vllm:spec_decode_num_drafts")

    def answer(ids: list[int], new_tokens: int) -> list[int]:
        greedy = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        (output,) = llm.generate([{"prompt_token_ids": ids}], greedy, use_tqdm=False)
        return list(output.outputs[0].token_ids)

    prompts = [Prompt(*one) for one in json.loads((work.folder / "prompts.json").read_text())]
    return {name: settings}, measured(name, answer, rounds, prompts, work.repeats)


def read(work: Work, encode: Callable[[str], list[int]]) -> list[Prompt]:
    """The prompts, by length, number and data set."""
    found = []
    for bucket, tokens in LENGTHS.items():
        for sample in range(work.samples):
            for folder in work.data:
                text = read_prompts(find_buckets(folder)[bucket], limit=sample + 1)[-1].text
                found.append(Prompt(folder.name, tokens, sample, encode(text)[:tokens]))
    return found


def measured(
    name: str, answer: Answer, rounds: Callable[[], int], prompts: list[Prompt], repeats: int
) -> list[dict[str, Any]]:
    """A row per prompt; the first of a length warms up with a whole answer.

    Args:
        rounds: how many the engine has run so far.
    """
    rows, lengths = [], set()
    for prompt in prompts:
        answer(prompt.ids, WARM_UP if prompt.tokens in lengths else NEW_TOKENS)
        lengths.add(prompt.tokens)
        one_s = [timed(answer, prompt.ids, 1)[0] for _ in range(repeats)]
        before = rounds()
        calls = [timed(answer, prompt.ids, NEW_TOKENS) for _ in range(repeats)]
        tokens = calls[-1][1]
        rows.append(
            {
                "method": name, "data": prompt.data, "tokens": prompt.tokens, "sample": prompt.sample,
                "prompt_tokens": len(prompt.ids), "decoded": len(tokens) - 1, "one_token_s": one_s,
                "all_tokens_s": [seconds for seconds, _ in calls], "rounds": (rounds() - before) / repeats,
                "sha256": digest(tokens),
            }
        )  # fmt: skip
    return rows


def timed(answer: Answer, ids: list[int], new_tokens: int) -> tuple[float, list[int]]:
    began = time.perf_counter()
    tokens = answer(ids, new_tokens)
    return time.perf_counter() - began, tokens


def digest(tokens: list[int]) -> str:
    """Which answers are the same."""
    return hashlib.sha256(torch.tensor(tokens, dtype=torch.int64).numpy().tobytes()).hexdigest()[:16]


if __name__ == "__main__":
    flags.run(main)

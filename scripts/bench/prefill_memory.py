"""Peak memory of a prefill, against the bytes that must be there: weights, caches, one block of activations.

    python -m scripts.bench.prefill_memory --use_specextend --input_len 16000

The prompt is the built-in text. On a CPU the peak is what the process's resident memory grew by since before the
models were loaded (Linux: VmHWM); on a GPU it is PyTorch's peak. The last line printed is the record.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from scripts.bench.model_size import working_tokens
from specextend import SpecExtend
from specextend.cli import flags
from specextend.config import prefill_block
from specextend.data.encoded import gather_prompts
from specextend.evaluation.environment import environment
from specextend.evaluation.journal import write_json
from specextend.methods import name_of
from specextend.modeling.cache import cache_shape
from specextend.modeling.packed import weight_nbytes
from specextend.models.loading import load_models

NEW_TOKENS = 16


def parse_args() -> argparse.Namespace:
    parser = flags.parser("Peak memory of a prefill against the bytes it needs by count.")
    parser.add_argument("--input_len", type=int, default=16000, help="prompt tokens")
    parser.add_argument("--output_file", type=Path, default=Path("results/cpu/prefill_memory.json"))
    flags.add_model_flags(parser)
    flags.add_method_flags(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.ones(256, 256).matmul(torch.ones(256, 256))  # thread pools and libraries are not the prefill's
    before = resident_bytes("VmRSS")
    models = load_models(
        args.model_name, draft=getattr(args, "draft_model", None), dtype=args.dtype, device=args.device
    )
    engine = SpecExtend(models, flags.config_from(args, models), prefix_reuse=False)
    room = engine.max_prompt_tokens(NEW_TOKENS)
    (prompt,) = gather_prompts(
        None, 1, args.input_len, encode=engine.encode, max_prompt_tokens=room, has_template=bool(models.preset.template)
    )
    reset_peak()
    at_first_token = {}

    def on_round(output, round_) -> None:
        if round_ is None:
            at_first_token["peak"] = resident_bytes("VmHWM") - before

    result = engine.generate(prompt.ids, NEW_TOKENS, on_round=on_round)
    peak = result.peak_bytes if models.device.type == "cuda" else at_first_token["peak"]
    count = count_bytes(engine, len(prompt.ids))
    record = {
        "method": name_of(engine.config),
        "prompt_tokens": len(prompt.ids),
        "peak_bytes": peak,
        "counted_bytes": count,
        "counted_total_bytes": sum(count.values()),
        "peak_over_count": round(peak / sum(count.values()), 4),
        "environment": environment(),
    }
    write_json(args.output_file, record)
    print(json.dumps(record))


def count_bytes(engine: SpecExtend, prompt_tokens: int) -> dict[str, int]:
    """The bytes a prefill cannot do without.

    One block of activations is the widest moment of a target layer: residual stream and its copy for the MLP, gate,
    up and their product, or queries, keys, values and the attention output, whichever is more.
    """
    models, config = engine.models, engine.config
    size = models.dtype.itemsize
    slots = NEW_TOKENS + config.tree.nodes + 1
    tree_slots = config.tree.nodes * config.tree.max_depth
    working = working_tokens(config.tree, config.retrieval) - tree_slots
    retained = prompt_tokens + slots if config.draft_cache == "full" else working
    block = prefill_block(config, engine.models.device) or prompt_tokens
    target = models.target.config
    hidden, ffn = target.hidden_size, target.intermediate_size
    return {
        "weights": weight_nbytes(models.target) + weight_nbytes(models.draft),
        "target_cache": (prompt_tokens + slots) * bytes_per_token(target, size),
        "draft_full_cache": 0
        if config.draft_cache == "full"
        else (prompt_tokens + slots) * bytes_per_token(models.draft.config, size),
        "draft_working_cache": (retained + tree_slots) * bytes_per_token(models.draft.config, size),
        "block_activations": block * size * (2 * hidden + max(3 * ffn, 4 * hidden)),
    }


def bytes_per_token(config, size: int) -> int:
    """Keys and values of one token in all layers."""
    layers, heads, dim = cache_shape(config)
    return 2 * layers * heads * dim * size


def resident_bytes(field: str) -> int:
    """VmRSS (now) or VmHWM (peak since `reset_peak`) of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


if __name__ == "__main__":
    flags.run(main)

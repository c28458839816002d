"""What makes a round fast on a CPU, each measured beside what it replaces: results/cpu/layers.json.

    python -m scripts.bench.cpu

- Linear layers of the bundled target, by rows: PyTorch's product over plain weights against packed weights.
- Attention of a draft tree over a cached prefix, by tokens: prefix and tree apart, merged by log-sum-exp, against one
  masked pass of the fused op.
- A verification of the bundled target by tree nodes: what one more node costs.

The two take turns in one process; medians and 10th to 90th percentile in milliseconds.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from scripts.analysis.probe import target_of
from scripts.bench.timing import in_turns
from specextend import SpecExtend
from specextend.cli import flags
from specextend.errors import ConfigError
from specextend.evaluation.environment import environment
from specextend.evaluation.journal import write_json
from specextend.modeling.attention import flash_attention, masked_attention, masked_flash_attention, merge
from specextend.modeling.packed import PackedLinear, can_pack
from specextend.trees.tree import DraftTree

ROWS = (1, 2, 5, 9, 13, 51)
PREFIXES = (1024, 4096, 16000)
REPEATS = 15


def main() -> None:
    parser = flags.parser(__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("results/cpu/layers.json"))
    output = parser.parse_args().output
    if not can_pack(nn.Linear(1, 1)):
        raise ConfigError("this PyTorch has no oneDNN for float32 on this CPU: nothing to compare")
    engine = SpecExtend.from_pretrained("bundled", device="cpu", prefix_reuse=False)
    with torch.inference_mode():
        record = {
            "linear_layers_ms": linear_layers(engine.models.target),
            "tree_attention_ms": tree_attention(),
            "verify_ms": verification(engine),
            "environment": environment(),
        }
    write_json(output, record)
    print(json.dumps({"output": str(output), **{name: record[name] for name in ("linear_layers_ms", "verify_ms")}}))


def linear_layers(target: nn.Module) -> dict[str, dict]:
    """All linear layers of `target`, one after the other, on rows of random numbers."""
    packed = [module for module in target.modules() if isinstance(module, PackedLinear)]
    plain = []
    for layer in packed:
        linear = nn.Linear(layer.in_features, layer.out_features, bias=False)
        linear.weight.copy_(layer.weight)
        plain.append(linear)
    figures = {}
    for rows in ROWS:
        inputs = {size: torch.randn(rows, size) for size in {layer.in_features for layer in packed}}

        def run(layers: list[nn.Module], inputs: dict[int, Tensor] = inputs) -> None:
            for layer in layers:
                layer(inputs[layer.in_features])

        figures[str(rows)] = side_by_side(plain=lambda run=run: run(plain), packed=lambda run=run: run(packed))
    return figures


def tree_attention() -> dict[str, dict]:
    """Six layers of six heads of 64, each with its own cache, so that keys come from memory as they do in use."""
    figures = {}
    for prefix in PREFIXES:
        keys, values = torch.randn(2, 6, 1, 6, prefix + max(ROWS), 64)
        for tokens in ROWS[1:]:
            query, mask = torch.randn(1, 6, tokens, 64), torch.ones(tokens, tokens, dtype=torch.bool).tril()
            both = [
                (key[:, :, : prefix + tokens], value[:, :, : prefix + tokens])
                for key, value in zip(keys, values, strict=True)
            ]

            def two_parts(query=query, both=both, mask=mask, prefix=prefix) -> None:
                for key, value in both:
                    merge(
                        flash_attention(query, key[:, :, :prefix], value[:, :, :prefix], 0.125),
                        masked_attention(query, key[:, :, prefix:], value[:, :, prefix:], 0.125, mask),
                    )

            def one_pass(query=query, both=both, mask=mask, tokens=tokens) -> None:
                for key, value in both:
                    masked_flash_attention(query, key, value, 0.125, tokens, mask)

            figures[f"{prefix} + {tokens}"] = side_by_side(two_parts=two_parts, one_pass=one_pass)
    return figures


def verification(engine: SpecExtend) -> dict[str, dict]:
    """The whole target on a chain of so many tokens behind so many; 1 is a step of autoregressive decoding."""
    figures = {}
    target, ids = target_of(engine.models, engine.config), engine.encode("word " * max(PREFIXES))
    for prefix in PREFIXES:
        target.prefill(ids[:prefix], max(ROWS))
        trees = {f"{rows} tokens": DraftTree.from_parents(ids[:rows], torch.arange(rows) - 1) for rows in ROWS}
        figures[str(prefix)] = side_by_side(
            **{name: (lambda tree=tree: target.verify(tree)) for name, tree in trees.items()}
        )
    return figures


def side_by_side(**runs: Callable[[], object]) -> dict[str, dict[str, float]]:
    """Medians and spread of each, in milliseconds; they take turns, after one unmeasured call each."""
    for run in runs.values():
        run()
    times = in_turns(runs, REPEATS)
    return {
        name: {
            "median": round(statistics.median(measured), 3),
            "p10": round(float(np.percentile(measured, 10)), 3),
            "p90": round(float(np.percentile(measured, 90)), 3),
        }
        for name, measured in times.items()
    }


if __name__ == "__main__":
    flags.run(main)

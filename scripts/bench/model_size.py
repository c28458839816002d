"""What a target and its draft need on each of the devices that share the target: the table of docs/scale.md.

python -m scripts.bench.model_size                                # Llama-3.1-70B at 128K on 1, 2, 4 and 8 devices
python -m scripts.bench.model_size --tokens 32768 --ranks 2 4
"""

from __future__ import annotations

from dataclasses import dataclass

from scripts.analysis.store import positive
from scripts.report.markdown import lines_of
from specextend.cli import flags
from specextend.config import RetrievalConfig, TreeConfig
from specextend.models.widen import Shape

BYTES = 2  # of a weight or a cached number in float16 or bfloat16
GB = 1e9
H200_TB_S = 4.37  # bytes read per second as measured, results/h200/bench.json
LLAMA_70B = Shape(hidden=8192, layers=80, heads=64, kv_heads=8, head_dim=128, ffn=28672, vocab=128256)
LLAMA_1B = Shape(hidden=2048, layers=16, heads=32, kv_heads=8, head_dim=64, ffn=8192, vocab=128256)


@dataclass(frozen=True)
class Need:
    """Bytes on one device: weights (the embedding among them) and caches of the target's share and the whole draft."""

    weights: int
    embedding: int
    cache: int
    draft_weights: int
    draft_full: int
    draft_working: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.draft_weights + self.draft_full + self.draft_working

    @property
    def verify_floor_ms(self) -> float:
        """Reading the share of weights and cache once, at the bandwidth of an H200; of the embedding, a few rows."""
        return 1e3 * (self.weights - self.embedding + self.cache) / (H200_TB_S * 1e12)


def need(target: Shape, draft: Shape, tokens: int, ranks: int, tree: TreeConfig, retrieval: RetrievalConfig) -> Need:
    """What one of `ranks` devices holds for a context of `tokens`."""
    return Need(
        weights=BYTES * (split_weights(target) // ranks + whole_weights(target)),
        embedding=BYTES * target.vocab * target.hidden,
        cache=cache_bytes(target, tokens + tree.nodes + 1) // ranks,
        draft_weights=BYTES * (split_weights(draft) - draft.vocab * draft.hidden + whole_weights(draft)),  # tied
        draft_full=cache_bytes(draft, tokens),
        draft_working=cache_bytes(draft, working_tokens(tree, retrieval)),
    )


def split_weights(shape: Shape) -> int:
    """Numbers that ranks share: q, k, v, o, gate, up and down of each layer, and the readout."""
    attention = 2 * shape.hidden * shape.heads * shape.head_dim + 2 * shape.hidden * shape.kv_heads * shape.head_dim
    return shape.layers * (attention + 3 * shape.hidden * shape.ffn) + shape.vocab * shape.hidden


def whole_weights(shape: Shape) -> int:
    """Numbers that every rank has: the embedding and the norms."""
    return shape.vocab * shape.hidden + (2 * shape.layers + 1) * shape.hidden


def cache_bytes(shape: Shape, tokens: int) -> int:
    """Keys and values of `tokens`."""
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * BYTES * tokens


def working_tokens(tree: TreeConfig, retrieval: RetrievalConfig) -> int:
    """Tokens of the draft's working cache: chunks, what comes until the next refresh, and a tree being grown."""
    rounds = (retrieval.every_n_steps + 1) * (tree.max_depth + 1)
    return retrieval.top_k * retrieval.chunk_size + rounds + tree.nodes * tree.max_depth


def table(tokens: int, ranks: list[int]) -> str:
    """Gigabytes per device, a row per number of ranks, in Markdown."""
    rows = {}
    for count in ranks:
        one = need(LLAMA_70B, LLAMA_1B, tokens, count, TreeConfig(), RetrievalConfig())
        rows[count] = {
            "weights": f"{one.weights / GB:.1f}",
            "KV cache": f"{one.cache / GB:.1f}",
            "draft weights": f"{one.draft_weights / GB:.1f}",
            "draft cache, full": f"{one.draft_full / GB:.1f}",
            "draft cache, working": f"{one.draft_working / GB:.2f}",
            "sum": f"{one.total / GB:.1f}",
            "bytes of a verification, ms": f"{one.verify_floor_ms:.1f}",
        }
    return lines_of(rows, "devices")


def main() -> None:
    parser = flags.parser("What Llama-3.1-70B and a 1B draft need on each of several devices.")
    parser.add_argument("--tokens", type=positive, default=1 << 17, help="of the context, new ones included")
    parser.add_argument("--ranks", type=positive, nargs="+", default=[1, 2, 4, 8])
    args = parser.parse_args()
    print(table(args.tokens, args.ranks))


if __name__ == "__main__":
    flags.run(main)

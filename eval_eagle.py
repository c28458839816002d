"""Measures speculative decoding with an EAGLE head as draft against autoregressive decoding, length by length.

    python eval_eagle.py --data_dir data/govreport --use_specextend

Without --use_specextend it measures standard tree speculative decoding, the paper's baseline. Each prompt is also
decoded autoregressively in the same process. Writes the per-length figures (JSON) and one record per sample and run
(JSON Lines) beside them; run the same command again to go on after an interruption.
"""

from __future__ import annotations

import argparse

from eagle import load_models
from eagle.weights import KINDS
from specextend import cli, entry


def parse_args() -> argparse.Namespace:
    parser = cli.parser("Speculative against autoregressive decoding, length by length; run again to resume.")
    cli.add_model_flags(parser)
    parser.add_argument(
        "--head", choices=KINDS, help="kind of head; without it the preset's, or what --draft_model holds"
    )
    entry.add_eval_flags(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    entry.measure(
        args,
        lambda: load_models(
            args.model_name,
            head=args.head,
            draft=getattr(args, "draft_model", None),
            dtype=args.dtype,
            device=args.device,
        ),
    )


if __name__ == "__main__":
    cli.run(main)

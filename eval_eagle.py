"""Measures speculative decoding with an EAGLE head as draft against autoregressive decoding, length by length.

    python eval_eagle.py --data_dir data/govreport --use_specextend

Without --use_specextend it measures standard tree speculative decoding, the paper's baseline. Each prompt is also
decoded autoregressively in the same process. Writes the per-length figures (JSON) and one record per sample and run
(JSON Lines) beside them; run the same command again to go on after an interruption.
"""

from __future__ import annotations

from specextend.cli.entry import run


def main() -> None:
    from functools import partial

    from eagle.entry import add_model_flags, load_pair
    from specextend.cli import commands, flags

    parser = flags.parser("Speculative against autoregressive decoding, length by length; run again to resume.")
    add_model_flags(parser)
    commands.add_eval_flags(parser)
    args = parser.parse_args()
    commands.measure(args, partial(load_pair, args))


if __name__ == "__main__":
    run(main)

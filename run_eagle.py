"""Answer prompts by speculative decoding with an EAGLE head as draft: standard, or with SpecExtend.

python run_eagle.py --use_specextend                      # the bundled pair on built-in text, no download
python run_eagle.py --use_specextend --compare            # beside autoregressive and standard decoding
python run_eagle.py -m llama31_8b -i prompts.jsonl --use_specextend --verbose
"""

from __future__ import annotations

import argparse

from eagle import load_models
from eagle.weights import KINDS
from specextend import cli, entry


def parse_args() -> argparse.Namespace:
    parser = cli.parser(__doc__.splitlines()[0])
    cli.add_model_flags(parser)
    parser.add_argument(
        "--head", choices=KINDS, help="kind of head; without it the preset's, or what --draft_model holds"
    )
    entry.add_run_flags(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    entry.answer(
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

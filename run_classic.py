"""Answer prompts by speculative decoding with a small language model as draft: standard, or with SpecExtend.

python run_classic.py --use_specextend                      # the bundled pair on built-in text, no download
python run_classic.py --use_specextend --compare            # beside autoregressive and standard decoding
python run_classic.py -m vicuna_7b -i prompts.jsonl --use_specextend --verbose
"""

from __future__ import annotations

import argparse

from specextend import cli, entry
from specextend.models import load_models


def parse_args() -> argparse.Namespace:
    parser = cli.parser(__doc__.splitlines()[0])
    cli.add_model_flags(parser)
    entry.add_run_flags(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    entry.answer(
        args,
        lambda: load_models(
            args.model_name, draft=getattr(args, "draft_model", None), dtype=args.dtype, device=args.device
        ),
    )


if __name__ == "__main__":
    cli.run(main)

"""Answer prompts by speculative decoding with an EAGLE head as draft: standard, or with SpecExtend.

python run_eagle.py --use_specextend                      # the bundled pair on built-in text, no download
python run_eagle.py --use_specextend --compare            # beside autoregressive and standard decoding
python run_eagle.py -m llama31_8b -i prompts.jsonl --use_specextend --verbose
"""

from __future__ import annotations

from specextend.cli.entry import run


def main() -> None:
    from functools import partial

    from eagle.entry import add_model_flags, load_pair
    from specextend.cli import commands, flags

    parser = flags.parser(__doc__.splitlines()[0])
    add_model_flags(parser)
    commands.add_run_flags(parser)
    args = parser.parse_args()
    commands.answer(args, partial(load_pair, args))


if __name__ == "__main__":
    run(main)

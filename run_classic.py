"""Answer prompts by speculative decoding with a small language model as draft: standard, or with SpecExtend.

python run_classic.py --use_specextend                      # the bundled pair on built-in text, no download
python run_classic.py --use_specextend --compare            # beside autoregressive and standard decoding
python run_classic.py -m vicuna_7b -i prompts.jsonl --use_specextend --verbose
"""

from __future__ import annotations

from specextend.cli.entry import run


def main() -> None:
    from functools import partial

    from specextend.cli import commands, flags

    parser = flags.parser(__doc__.splitlines()[0])
    flags.add_model_flags(parser, widen=True)
    commands.add_run_flags(parser)
    args = parser.parse_args()
    commands.answer(args, partial(commands.load_pair, args))


if __name__ == "__main__":
    run(main)

"""Answer prompts by speculative decoding with a small language model as draft: standard, or with SpecExtend.

python run_classic.py --use_specextend                      # the bundled pair on built-in text, no download
python run_classic.py --use_specextend --compare            # beside autoregressive and standard decoding
python run_classic.py -m vicuna_7b -i prompts.jsonl --use_specextend --verbose
"""

from __future__ import annotations

from functools import partial

from specextend import cli, entry


def main() -> None:
    parser = cli.parser(__doc__.splitlines()[0])
    cli.add_model_flags(parser)
    entry.add_run_flags(parser)
    args = parser.parse_args()
    entry.answer(args, partial(entry.load_pair, args))


if __name__ == "__main__":
    cli.run(main)

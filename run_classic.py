"""Answer prompts by speculative decoding with a small language model as draft: standard, or with SpecExtend.

python run_classic.py --use_specextend                      # the bundled pair on built-in text, no download
python run_classic.py --use_specextend --compare            # beside autoregressive and standard decoding
python run_classic.py -m vicuna_7b -i prompts.jsonl --use_specextend --verbose
"""

from __future__ import annotations

import argparse
from pathlib import Path

from specextend import SpecExtend
from specextend.cli import (
    add_method_flags,
    add_model_flags,
    add_sampling_flags,
    config_from,
    parser,
    run,
    sampling_from,
)
from specextend.config import SpecExtendConfig
from specextend.models import load_models
from specextend.prompts import gather_prompts
from specextend.report import Narrator


def parse_args() -> argparse.Namespace:
    flags = parser(__doc__.splitlines()[0])
    text = flags.add_argument_group("text")
    text.add_argument("--input_file", "-i", type=Path, help=".jsonl (field text) or a text file; else built-in text")
    text.add_argument("--max_samples", "-n", type=int, default=1, help="prompts to answer")
    text.add_argument("--max_gen_len", "-max", type=int, default=256, help="new tokens at most")
    text.add_argument("--input_len", type=int, help="cut prompts to this many tokens; 4096 for the built-in text")
    text.add_argument("--stop", action="append", default=[], help="string that ends the answer; may be given twice")
    show = flags.add_argument_group("display")
    show.add_argument("--verbose", action="store_true", help="stream the text, tokens coloured by who wrote them")
    show.add_argument("--compare", action="store_true", help="also autoregressive and standard decoding, side by side")
    show.add_argument("--output_result_line", action="store_true", help="print one JSON line per result")
    add_model_flags(flags)
    add_method_flags(flags)
    add_sampling_flags(flags)
    return flags.parse_args()


def main() -> None:
    args = parse_args()
    sampling = sampling_from(args)
    narrator = Narrator(verbose=args.verbose, result_line=args.output_result_line)
    with narrator.busy(f"loading {args.model_name}"):
        models = load_models(
            args.model_name, draft=getattr(args, "draft_model", None), dtype=args.dtype, device=args.device
        )
        engine = SpecExtend(models, config_from(args, models))
    narrator.introduce(engine, sampling)
    for prompt in gather_prompts(engine, args.input_file, args.max_samples, args.input_len, args.max_gen_len):
        methods = {engine.config.method: engine.generate}
        if args.compare:
            standard = engine.with_config(SpecExtendConfig.standard(tree=engine.config.tree))
            methods = {"autoregressive": engine.autoregressive, "standard": standard.generate} | methods
        narrator.answer(prompt, methods, max_new_tokens=args.max_gen_len, sampling=sampling, stop=args.stop)


if __name__ == "__main__":
    run(main)

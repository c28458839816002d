"""Measures speculative decoding with a small draft model against autoregressive decoding, length by length.

    python eval_classic.py --data_dir data/govreport --use_specextend

Without --use_specextend it measures standard tree speculative decoding, the paper's baseline. Each prompt is also
decoded autoregressively in the same process. Writes the per-length figures (JSON) and one record per sample and run
(JSON Lines) beside them; run the same command again to go on after an interruption.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from specextend import SpecExtend, cli
from specextend.evaluate import Plan, evaluate, read_buckets, require_positive
from specextend.models import load_models
from specextend.prepare import ensure_data


def parse_args() -> argparse.Namespace:
    parser = cli.parser("Speculative against autoregressive decoding, length by length; run again to resume.")
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data_dir", type=Path, default=Path("data/govreport"), help="folder of <name>_<length>.jsonl files"
    )
    data.add_argument("--lengths", nargs="+", metavar="LENGTH", help="only these, as 512 1K 4K; all without it")
    data.add_argument("--samples_per_length", "-n", type=int, default=20, help="prompts per length")
    data.add_argument("--runs_per_sample", "-r", type=int, default=2, help="measurements per prompt")
    output = parser.add_argument_group("output")
    output.add_argument("--max_gen_len", "-max", type=int, default=256, help="new tokens per generation at most")
    output.add_argument("--output_file", type=Path, help="results/<data>_<model>_<method>.json without it")
    output.add_argument("--fresh", action="store_true", help="start over instead of resuming")
    cli.add_model_flags(parser)
    cli.add_method_flags(parser)
    cli.add_sampling_flags(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    require_positive(
        samples_per_length=args.samples_per_length, runs_per_sample=args.runs_per_sample, max_gen_len=args.max_gen_len
    )
    sampling = cli.sampling_from(args)
    data_dir = ensure_data(args.data_dir, args.model_name)
    plan = Plan(
        data=data_dir.resolve().name,
        buckets=read_buckets(data_dir, args.samples_per_length, args.lengths or ()),
        runs_per_sample=args.runs_per_sample,
        max_new_tokens=args.max_gen_len,
        sampling=sampling,
    )
    draft = getattr(args, "draft_model", None)
    models = load_models(args.model_name, draft=draft, dtype=args.dtype, device=args.device)
    engine = SpecExtend(models, cli.config_from(args, models))
    print(json.dumps(evaluate(engine, plan, args.output_file, fresh=args.fresh)))


if __name__ == "__main__":
    cli.run(main)

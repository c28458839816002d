"""Record the race that opens the README: results/cpu/race.json, and from it the animation results/figures/race.svg.

python -m scripts.analysis.race              # races on a quiet machine, keeps the median one, draws it
python -m scripts.analysis.race --draw_only  # the figure again, from the record
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

from scripts.analysis.store import model_setting, positive
from scripts.report.race_svg import race_svg
from specextend import SpecExtend
from specextend.cli import flags
from specextend.cli.commands import load_pair
from specextend.errors import InputError
from specextend.evaluation.environment import environment
from specextend.race.documents import read_prompt
from specextend.race.record import Race, Racetrack


def main() -> None:
    args = parse_args()
    if not args.draw_only:
        record(args)
    if not args.output_file.exists():
        raise InputError(f"{args.output_file} does not exist; leave out --draw_only to record it")
    content = json.loads(args.output_file.read_text(encoding="utf-8"))
    race = Race.from_dict(content["race"])
    args.figure.parent.mkdir(parents=True, exist_ok=True)
    args.figure.write_text(race_svg(race, content["environment"], hold_s=args.hold), encoding="utf-8")
    seconds = {lane.method: round(lane.total_s, 3) for lane in race.lanes}
    size = {str(path): path.stat().st_size for path in (args.output_file, args.figure)}
    print(json.dumps({"seconds": seconds, "differs_at": race.differs_at, "bytes": size}))


def parse_args() -> argparse.Namespace:
    parser = flags.parser("Record a race on the built-in text and draw it as an animated SVG.")
    flags.add_model_flags(parser)
    parser.add_argument("--input_len", type=int, default=4096, help="prompt tokens")
    parser.add_argument("--max_gen_len", "-max", type=int, default=128, help="new tokens")
    parser.add_argument("--races", "-r", type=positive, default=5, help="the one with the median time is kept")
    parser.add_argument("--hold", type=float, default=4.0, help="seconds that the end is shown before it starts again")
    parser.add_argument("--output_file", type=Path, default=Path("results/cpu/race.json"))
    parser.add_argument("--figure", type=Path, default=Path("results/figures/race.svg"))
    parser.add_argument("--draw_only", action="store_true", help="do not race; draw the record that is there")
    parser.set_defaults(use_specextend=True)
    return parser.parse_args()


def record(args: argparse.Namespace) -> None:
    """Race several times and write the race whose lanes took the median time in all."""
    engine = SpecExtend(load_pair(args), eager=args.eager)
    track, prompt = Racetrack(engine), read_prompt(engine, None, args.input_len)
    races = [track.run(prompt, args.max_gen_len) for _ in range(args.races)]
    totals = [[round(lane.total_s, 4) for lane in race.lanes] for race in races]
    median = sorted(races, key=lambda race: sum(lane.total_s for lane in race.lanes))[len(races) // 2]
    setting = model_setting(engine)
    median = replace(median, model=setting["model"], draft=setting["draft"])
    args.output_file.parent.mkdir(parents=True, exist_ok=True)
    content = {"setting": setting, "races_total_s": totals, "environment": environment(), "race": median.to_dict()}
    args.output_file.write_text(json.dumps(content, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")


if __name__ == "__main__":
    flags.run(main)

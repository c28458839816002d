#!/usr/bin/env python
"""Build evaluation prompts under data/: from the Hugging Face hub, a folder of text files, or the built-in text.

python scripts/prepare_data.py govreport pg19        # these two; without names govreport, pg19, booksum and aime24
python scripts/prepare_data.py --from_dir FOLDER     # data/FOLDER from the .txt, .md and .rst files in it
python scripts/prepare_data.py --builtin             # data/builtin from Python's language reference, no network

The same documents at every length, by another model's tokenizer and conversation template (data/README.md):

python scripts/prepare_data.py govreport pg19 --same_documents -m smollm2 --root data/smollm2
python scripts/prepare_data.py --from_prompts data/pg19 --same_documents -m smollm2 --root data/smollm2
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the package of this checkout, installed or not

from specextend.cli import flags
from specextend.data.prepare import (
    BUILTIN,
    DEFAULT_LENGTHS,
    DEFAULT_ROOM,
    DEFAULT_SAMPLES,
    HUB_SOURCES,
    PrepareConfig,
    prepare_folder,
    prepare_known,
    prepare_prompts,
)
from specextend.data.prompts import parse_length
from specextend.errors import InputError


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = flags.parser(__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("sets", nargs="*", metavar="SET", help=f"any of {', '.join(HUB_SOURCES)} (default: all)")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--from_dir", type=Path, metavar="FOLDER", help="build from the text files in a folder")
    source.add_argument("--from_prompts", type=Path, metavar="FOLDER", help="build from the documents of its prompts")
    source.add_argument("--builtin", action="store_true", help="build from Python's language reference")
    parser.add_argument("--name", help="name of the set built from a folder (default: the folder's)")
    parser.add_argument("--root", type=Path, default=Path("data"), help="where the sets' folders go (default: data)")
    parser.add_argument("--model_name", "-m", default="bundled", help="its tokenizer counts (default: bundled)")
    parser.add_argument("--lengths", nargs="+", default=DEFAULT_LENGTHS, help="in tokens (default: 512 1K ... 16K)")
    parser.add_argument("--samples", "-n", type=int, default=DEFAULT_SAMPLES, help="prompts per length (default: 20)")
    parser.add_argument("--same_documents", action="store_true", help="in every length, cut in the middle")
    parser.add_argument(
        "--room", type=int, default=DEFAULT_ROOM, help="new tokens that fit behind the longest of --same_documents "
        f"(default: {DEFAULT_ROOM})",
    )  # fmt: skip
    parser.add_argument("--skip", type=int, default=0, metavar="N", help="leave out the first N documents")
    parser.add_argument("--force", action="store_true", help="build again what is there already")
    return parser.parse_args(argv)


def main() -> None:
    args = parse_args()
    folder = args.from_dir or args.from_prompts
    if args.sets and (args.builtin or folder):
        raise InputError(
            f"{' '.join(args.sets)} come from the hub; give either sets, or --from_dir, or --from_prompts, or --builtin"
        )
    if args.name and not folder:
        raise InputError("--name names what --from_dir or --from_prompts builds; give both or neither")
    config = PrepareConfig(
        args.root, args.model_name, tuple(parse_length(label) for label in args.lengths), args.samples, args.force,
        args.same_documents, args.room, args.skip,
    )  # fmt: skip
    if folder:
        build = prepare_folder if args.from_dir else prepare_prompts
        build(folder, args.name, config)
    else:
        for name in [BUILTIN] if args.builtin else args.sets or HUB_SOURCES:
            prepare_known(name, config)


if __name__ == "__main__":
    flags.run(main)

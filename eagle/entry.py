"""What `run_eagle.py` and `eval_eagle.py` share: the head as a flag, and loading it with its target."""

from __future__ import annotations

import argparse

from eagle.models import HEADS, load_models
from eagle.weights import KINDS, holds_head
from eagle.widen import widened
from specextend.cli import commands, flags
from specextend.errors import ConfigError
from specextend.models.checkpoints import HUB_ID, local_directory
from specextend.models.loading import LoadedModels
from specextend.models.presets import find_preset


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    flags.add_model_flags(parser, widen=True)
    parser.add_argument(
        "--head", default=argparse.SUPPRESS, metavar="HEAD", help=f"EAGLE head: {', '.join(KINDS)}, a directory or a "
        "hub id (default: the one that belongs to the target, or what --draft_model holds)",
    )  # fmt: skip


def load_either(args: argparse.Namespace) -> LoadedModels:
    """The target with an EAGLE head where one is named, or nothing else is known for it; else with a small model."""
    preset, draft = find_preset(args.model_name), flags.draft_from(args)
    if draft:
        directory = local_directory(draft)
        drafts_with_head = directory is not None and holds_head(directory)
    else:
        drafts_with_head = preset.draft is None and any(name == preset.name for name, _ in HEADS)
    return load_pair(args) if "head" in args or drafts_with_head else commands.load_pair(args)


def load_pair(args: argparse.Namespace) -> LoadedModels:
    """The target with an EAGLE head as draft, as the flags say."""
    if flags.ranks_from(args):
        raise ConfigError(
            "an EAGLE head reads the target's embedding and readout, which --tensor_parallel spreads over devices; "
            "draft with a small model (run_classic.py, eval_classic.py)"
        )
    head, draft, shape = getattr(args, "head", None), flags.draft_from(args), flags.shape_from(args)
    if head and head not in KINDS and (local_directory(head) or HUB_ID.fullmatch(head)):
        if draft:
            raise ConfigError(f"--head {head} and --draft_model {draft} both name a head; give one")
        head, draft = None, head
    models = load_models(
        args.model_name, head=head, draft=draft, dtype="float32" if shape else args.dtype, device=args.device,
    )  # fmt: skip
    return widened(models, shape, dtype=args.dtype) if shape else models

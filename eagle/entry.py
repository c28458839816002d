"""What `run_eagle.py` and `eval_eagle.py` share: the head as a flag, and loading it with its target."""

from __future__ import annotations

import argparse

from eagle.models import load_models
from eagle.weights import KINDS
from specextend.cli import flags
from specextend.errors import ConfigError
from specextend.models.loading import LoadedModels


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    flags.add_model_flags(parser)
    parser.add_argument("--head", choices=KINDS, help="else the preset's, or what --draft_model holds")


def load_pair(args: argparse.Namespace) -> LoadedModels:
    """The target with an EAGLE head as draft, as the flags say."""
    if flags.ranks_from(args):
        raise ConfigError(
            "an EAGLE head reads the target's embedding and readout, which --tensor_parallel spreads over devices; "
            "draft with a small model (run_classic.py, eval_classic.py)"
        )
    draft = getattr(args, "draft_model", None)
    return load_models(args.model_name, head=args.head, draft=draft, dtype=args.dtype, device=args.device)

"""What the entry points share: flags, settings out of flags, and errors as one line with exit status 2."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import fields, replace

from rich.console import Console

from specextend.cli.flag_names import FLAGS
from specextend.config import DRAFT_CACHES, SamplingConfig, SpecExtendConfig, TreeConfig
from specextend.engine import default_tree
from specextend.errors import ConfigError, SpecExtendError, describe
from specextend.methods import METHODS, find_method
from specextend.models import tensor_parallel
from specextend.models.loading import LoadedModels
from specextend.models.presets import PRESETS


def run(main: Callable[[], None]) -> None:
    """Run an entry point: a mistake of the user's is one line on stderr and exit status 2, Ctrl-C is 130."""
    try:
        main()
    except SpecExtendError as error:
        if tensor_parallel.speaks():
            print(describe(error, FLAGS), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


class _Parser(argparse.ArgumentParser):
    """Flag mistakes, too, are one line and status 2, without the usage dump."""

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: {message} (--help lists the flags)\n")


def parser(description: str) -> argparse.ArgumentParser:
    return _Parser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("models")
    names = ", ".join(PRESETS)
    group.add_argument("--model_name", "-m", default="bundled", help=f"target: {names}, a directory or a hub id")
    group.add_argument(
        "--draft_model", default=argparse.SUPPRESS, help="a directory or hub id; else the preset's draft"
    )
    group.add_argument("--dtype", default="auto", help="auto, float32, float16 or bfloat16; auto is float32 on a CPU")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    group.add_argument("--eager", action="store_true", help="no CUDA graphs and fused kernels, which a GPU has else")


def add_parallel_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("a target on several GPUs (docs/scale.md)")
    group.add_argument(
        "--tensor_parallel", action="store_true", help="share the target among the processes of this torchrun"
    )
    group.add_argument("--check_ranks", action="store_true", help="compare their trees and logits in every round")


def ranks_from(args: argparse.Namespace) -> tensor_parallel.Ranks | None:
    """The processes that share the target, of whom this one is; None where the flags ask for none."""
    if getattr(args, "tensor_parallel", False):
        return tensor_parallel.join(args.device, check=args.check_ranks)
    if getattr(args, "check_ranks", False):
        raise ConfigError("--check_ranks is of no use without --tensor_parallel")
    return None


def add_method_flags(parser: argparse.ArgumentParser, *, several: bool = False) -> None:
    """Flags for what decodes; `several`: `--method` takes more than one name."""
    group = parser.add_argument_group("method")
    switch = {"action": argparse.BooleanOptionalAction, "default": argparse.SUPPRESS}
    named = {"metavar": "NAME"} | ({"nargs": "+"} if several else {})
    _add(group, "--method", str, "what decodes, by name; standard tree speculative decoding without it", **named)
    group.add_argument("--list_methods", action=_ListMethods, help="print the names and what they mean")
    group.add_argument(
        "--use_specextend", action="store_true", help="all parts of SpecExtend: the same as --method specextend"
    )
    group.add_argument("--flash_prefill", **switch, help="FlashAttention prefill of target and draft")
    group.add_argument("--hybrid_tree_attention", **switch, help="verification by Hybrid Tree Attention")
    _add(group, "--draft_cache", str, "what the draft attends to", choices=DRAFT_CACHES)
    _add(group, "--draft_window", int, "sliding window of the draft's flash prefill, tokens; 0 is full causal")
    _add(group, "--prefill_block", int, "tokens per block of the flash prefill")
    _add(group, "--nodes", int, "draft tokens per tree")
    _add(group, "--max_depth", int, "levels of a draft tree")
    _add(group, "--threshold", float, "expected accepted tokens one more level must add")
    _add(group, "--min_probability", float, "leave out nodes that are reached with less than this probability")
    _add(group, "--retrieval_chunk_size", int, "tokens per chunk")
    _add(group, "--retrieve_top_k", int, "chunks in the working cache")
    _add(group, "--retrieve_every_n_steps", int, "rounds between refreshes of the working cache")
    _add(group, "--retrieval_sink", int, "first chunks always kept")
    _add(group, "--retrieval_recent", int, "newest chunks always kept")


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling")
    _add(group, "--temperature", float, "0 is greedy, and the default")
    group.add_argument("--top_p", type=float, default=1.0, help="nucleus mass, 1 is off")
    group.add_argument("--top_k", type=int, default=0, help="most probable tokens to choose from, 0 is off")
    group.add_argument("--seed", type=int, default=0, help="of the sampling noise")


def sampling_from(args: argparse.Namespace, temperature: float = 0.0) -> SamplingConfig:
    """The sampling the flags ask for; `temperature` is the default where no flag gives one."""
    return SamplingConfig(getattr(args, "temperature", temperature), args.top_p, args.top_k, args.seed)


def methods_from(args: argparse.Namespace) -> list[str]:
    """Names of the methods the flags ask for; switches, sizes and trees come on top of each (`config_from`)."""
    named = getattr(args, "method", None)
    names = [named] if isinstance(named, str) else named
    if args.use_specextend and names not in (None, ["specextend"]):
        raise ConfigError(
            f"--use_specextend is --method specextend, which contradicts --method {' '.join(names)}; give one"
        )
    for name in names or ():
        find_method(name)
    return names or ["specextend" if args.use_specextend else "standard"]


def config_from(args: argparse.Namespace, models: LoadedModels, method: str | None = None) -> SpecExtendConfig:
    """The setting the flags ask for; what they leave open is the preset's for this device, then the paper's.

    Args:
        method: one of `methods_from`; None takes the first.
    """
    base = find_method(method or methods_from(args)[0]).config(default_tree(models), models.preset.retrieval)
    retrieval = {
        "chunk_size": "retrieval_chunk_size",
        "top_k": "retrieve_top_k",
        "every_n_steps": "retrieve_every_n_steps",
        "sink": "retrieval_sink",
        "recent": "retrieval_recent",
    }
    return replace(
        base,
        **_given(args, {name.name: name.name for name in fields(SpecExtendConfig)}),
        tree=replace(base.tree, **_given(args, {name.name: name.name for name in fields(TreeConfig)})),
        retrieval=replace(base.retrieval, **_given(args, retrieval)),
    )


def _given(args: argparse.Namespace, flags: dict[str, str]) -> dict:
    """Settings whose flag was typed: {setting: flag} -> {setting: value}."""
    return {setting: getattr(args, flag) for setting, flag in flags.items() if hasattr(args, flag)}


def _add(group, flag: str, kind: type, text: str, **options) -> None:
    """A flag that is absent from the namespace unless it is typed, so that defaults live in one place."""
    group.add_argument(flag, type=kind, default=argparse.SUPPRESS, help=text, **options)


class _ListMethods(argparse.Action):
    """Prints each method with a line, as --help prints the flags."""

    def __init__(self, option_strings, dest, help=None):
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser, *_) -> None:
        width = max(map(len, METHODS))
        for name, method in METHODS.items():
            print(f"{name:{width}}  {method.summary}")
        parser.exit()


def console(*, stderr: bool = False) -> Console:
    """Numbers and paths uncoloured, lines unbroken where the output is no terminal."""
    width = None if sys.stdout.isatty() else 120
    return Console(width=width, stderr=stderr, highlight=False, emoji=False, soft_wrap=not sys.stdout.isatty())

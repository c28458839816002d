"""What the entry points share: flags, and settings out of flags."""

from __future__ import annotations

import argparse
import shutil
import textwrap
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any, get_type_hints

from specextend.cli.entry import run as run
from specextend.config import DRAFT_CACHES, RetrievalConfig, SamplingConfig, SpecExtendConfig, TreeConfig
from specextend.engine import default_tree
from specextend.errors import ConfigError
from specextend.methods import METHODS, find_method
from specextend.models import tensor_parallel
from specextend.models.loading import LoadedModels
from specextend.models.placement import DTYPES
from specextend.models.presets import PRESETS
from specextend.models.widen import PAIRS


@dataclass(frozen=True)
class Setting:
    """A field of a config that has a flag; type and default are the field's own.

    Args:
        part: where `SpecExtendConfig` holds it, "" for its own fields.
        name: the field, where the flag is called otherwise.
    """

    config: type
    part: str
    text: str
    name: str = ""
    options: dict[str, Any] = field(default_factory=dict)


SWITCH = {"action": argparse.BooleanOptionalAction}
SETTINGS = {
    "flash_prefill": Setting(SpecExtendConfig, "", "FlashAttention for the prefill of target and draft", "", SWITCH),
    "hybrid_tree_attention": Setting(SpecExtendConfig, "", "Hybrid Tree Attention for verification", "", SWITCH),
    "draft_cache": Setting(SpecExtendConfig, "", "what the draft attends to", "", {"choices": DRAFT_CACHES}),
    "draft_window": Setting(SpecExtendConfig, "", "sliding window of the draft's prefill in tokens, 0: no window"),
    "prefill_block": Setting(SpecExtendConfig, "", "tokens per block of the prefill, 0: chosen for the device"),
    "nodes": Setting(TreeConfig, "tree", "draft tokens per tree"),
    "max_depth": Setting(TreeConfig, "tree", "levels per tree"),
    "threshold": Setting(TreeConfig, "tree", "expected accepted tokens that one more level must add"),
    "min_probability": Setting(TreeConfig, "tree", "leave out nodes that are less probable than this"),
    "retrieval_chunk_size": Setting(RetrievalConfig, "retrieval", "tokens per retrieved chunk", "chunk_size"),
    "retrieve_top_k": Setting(RetrievalConfig, "retrieval", "chunks the draft attends to", "top_k"),
    "retrieve_every_n_steps": Setting(RetrievalConfig, "retrieval", "rounds between two retrievals", "every_n_steps"),
    "retrieval_sink": Setting(RetrievalConfig, "retrieval", "first chunks, always kept", "sink"),
    "retrieval_recent": Setting(RetrievalConfig, "retrieval", "newest chunks, always kept", "recent"),
    "temperature": Setting(SamplingConfig, "sampling", "sampling temperature, 0: greedy"),
    "top_p": Setting(SamplingConfig, "sampling", "nucleus sampling: probability mass to choose from, 1: all"),
    "top_k": Setting(SamplingConfig, "sampling", "number of most probable tokens to choose from, 0: all"),
    "seed": Setting(SamplingConfig, "sampling", "random seed of sampling"),
}


class _Parser(argparse.ArgumentParser):
    """Flag mistakes, too, are one line and status 2, without the usage dump."""

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: {' '.join(message.split())} (--help lists the flags)\n")


def parser(description: str) -> argparse.ArgumentParser:
    return _Parser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)


def add_model_flags(parser: argparse.ArgumentParser, *, widen: bool = False) -> None:
    """Flags for what is loaded; `widen`: the program can widen it."""
    group = parser.add_argument_group("models")
    names = ", ".join(PRESETS)
    group.add_argument(
        "--model_name", "-m", default="bundled", help=f"target model: {names}, a local directory or a hub id"
    )
    group.add_argument(
        "--draft_model", default=argparse.SUPPRESS, help="draft model: a local directory or a hub id"
        " (default: the one that belongs to the target)",
    )  # fmt: skip
    group.add_argument("--dtype", default="auto", help="auto, float32, float16 or bfloat16; auto is float32 on a CPU")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    group.add_argument("--eager", action="store_true", help="disable CUDA graphs and fused kernels")
    if widen:
        group.add_argument(
            "--widen", choices=PAIRS, default=argparse.SUPPRESS, help="pad the loaded models with idle weights to the "
            "size of these: same tokens, the cost of the large models",
        )  # fmt: skip


def add_parallel_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("tensor parallelism (docs/scale.md)")
    group.add_argument(
        "--tensor_parallel", action="store_true", help="split the target over the processes of this torchrun"
    )
    group.add_argument("--check_ranks", action="store_true", help="compare their trees and logits in every round")


def ranks_from(args: argparse.Namespace) -> tensor_parallel.Ranks | None:
    """The processes that share the target, of whom this one is; None where the flags ask for none."""
    if getattr(args, "tensor_parallel", False):
        return tensor_parallel.join(args.device, check=args.check_ranks)
    if getattr(args, "check_ranks", False):
        raise ConfigError("--check_ranks is of no use without --tensor_parallel")
    return None


def draft_from(args: argparse.Namespace) -> str | None:
    """The draft the flags name, None where they name none."""
    draft = getattr(args, "draft_model", None)
    if draft == "":
        raise ConfigError("--draft_model is empty; give a directory or a hub id, or leave the flag out")
    return draft


def shape_from(args: argparse.Namespace) -> str | None:
    """The shape that the flags ask to widen the models to."""
    shape = getattr(args, "widen", None)
    if shape and getattr(args, "tensor_parallel", False):
        raise ConfigError("--widen and --tensor_parallel cannot be combined: widened weights are not on any disk")
    if shape and args.dtype not in ("auto", *DTYPES):
        raise ConfigError(f"dtype {args.dtype!r} is unknown; choose one of auto, {', '.join(DTYPES)}")
    return shape


def add_method_flags(parser: argparse.ArgumentParser, *, several: bool = False) -> None:
    """Flags for what decodes; `several`: `--method` takes more than one name."""
    group = parser.add_argument_group("method")
    named = {"metavar": "NAME"} | ({"nargs": "+"} if several else {})
    group.add_argument(
        "--method", default=argparse.SUPPRESS, help="decoding method, see --list_methods (default: standard)", **named
    )
    group.add_argument("--list_methods", action=_ListMethods, help="list the methods and exit")
    group.add_argument("--use_specextend", action="store_true", help="short for --method specextend")
    _add_settings(group, "", "tree", "retrieval")


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    _add_settings(parser.add_argument_group("sampling"), "sampling")


def sampling_from(args: argparse.Namespace, temperature: float = 0.0) -> SamplingConfig:
    """The sampling the flags ask for; `temperature` is the default where no flag gives one."""
    return SamplingConfig(**{"temperature": temperature} | _given(args, "sampling"))


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
    repeated = [name for name in names or () if names.count(name) > 1]
    if repeated:
        raise ConfigError(f"--method names {repeated[0]} twice; give each method once")
    return names or ["specextend" if args.use_specextend else "standard"]


def check_settings(args: argparse.Namespace) -> None:
    """ConfigError for a setting out of its range, before anything is loaded."""
    for name in methods_from(args):
        _with_given(
            args, find_method(name).config(TreeConfig(), RetrievalConfig(top_k=256))
        )  # as large as any preset's
    sampling_from(args)


def config_from(args: argparse.Namespace, models: LoadedModels, method: str | None = None) -> SpecExtendConfig:
    """The setting the flags ask for; what they leave open is the preset's for this device, then the paper's.

    Args:
        method: one of `methods_from`; None takes the first.
    """
    chosen = find_method(method or methods_from(args)[0])
    return _with_given(args, chosen.config(default_tree(models), models.preset.retrieval))


def _with_given(args: argparse.Namespace, base: SpecExtendConfig) -> SpecExtendConfig:
    return replace(
        base,
        **_given(args, ""),
        tree=replace(base.tree, **_given(args, "tree")),
        retrieval=replace(base.retrieval, **_given(args, "retrieval")),
    )


def _given(args: argparse.Namespace, part: str) -> dict[str, Any]:
    """Fields of one part of the setting whose flags were typed."""
    return {
        setting.name or flag: getattr(args, flag)
        for flag, setting in SETTINGS.items()
        if setting.part == part and hasattr(args, flag)
    }


def _add_settings(group, *parts: str) -> None:
    """Flags of `parts`, absent from the namespace unless they are typed, so that defaults live in one place."""
    for flag, setting in SETTINGS.items():
        if setting.part in parts:
            name = setting.name or flag
            kind = {} if setting.options else {"type": get_type_hints(setting.config)[name]}
            default = next(one.default for one in fields(setting.config) if one.name == name)
            assert default is not MISSING, f"{name} has a default"
            preset = " or the model's own" if setting.part in ("tree", "retrieval") else ""
            shown = "" if setting.options == SWITCH else f" (default: {default}{preset})"
            group.add_argument(
                f"--{flag}", default=argparse.SUPPRESS, help=setting.text + shown, **kind, **setting.options
            )


class _ListMethods(argparse.Action):
    """Prints each method with a line, as --help prints the flags."""

    def __init__(self, option_strings, dest, help=None):
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser, *_) -> None:
        indent = max(map(len, METHODS)) + 2
        for name, method in METHODS.items():
            line = f"{name:{indent}}{method.summary}"
            print(textwrap.fill(line, shutil.get_terminal_size((120, 24)).columns, subsequent_indent=" " * indent))
        parser.exit()

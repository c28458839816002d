"""What the entry points share: flags, and settings out of flags."""

from __future__ import annotations

import argparse
import shutil
import sys
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields, replace
from typing import Any, get_type_hints

from specextend.cli.entry import run as run
from specextend.cli.flag_names import FLAGS
from specextend.config import DRAFT_CACHES, TREES, RetrievalConfig, SamplingConfig, SpecExtendConfig, TreeConfig
from specextend.engine import default_tree
from specextend.errors import ConfigError
from specextend.evaluation.arms import OWNER, Arm, read_arms, resolve
from specextend.methods import METHODS, find_method
from specextend.models import tensor_parallel
from specextend.models.loading import LoadedModels
from specextend.models.placement import DTYPES
from specextend.models.presets import PRESETS
from specextend.models.widen import PAIRS

PARTS = {"": SpecExtendConfig, "tree": TreeConfig, "retrieval": RetrievalConfig, "sampling": SamplingConfig}
SWITCH = {"action": argparse.BooleanOptionalAction}
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {  # what `FLAGS` has a flag for: help, and options of the flag
    "flash_prefill": ("FlashAttention for the prefill of target and draft", SWITCH),
    "hybrid_tree_attention": ("Hybrid Tree Attention for verification", SWITCH),
    "draft_cache": ("what the draft attends to", {"choices": DRAFT_CACHES}),
    "draft_window": ("sliding window of the draft's prefill in tokens, 0: no window", {}),
    "prefill_block": ("tokens per block of the prefill, 0: chosen for the device", {}),
    "tree.nodes": ("draft tokens per tree", {}),
    "tree.max_depth": ("levels per tree", {}),
    "tree.threshold": ("expected accepted tokens that one more level must add", {}),
    "tree.min_probability": ("leave out nodes that are less probable than this", {}),
    "tree.lookup_branch": (
        "priced trees: one more branch, what followed the newest tokens where they stood before",
        SWITCH,
    ),
    "retrieval.chunk_size": ("tokens per retrieved chunk", {}),
    "retrieval.top_k": ("chunks the draft attends to", {}),
    "retrieval.every_n_steps": ("rounds between two retrievals", {}),
    "retrieval.sink": ("first chunks, always kept", {}),
    "retrieval.recent": ("newest chunks, always kept", {}),
    "sampling.temperature": ("sampling temperature, 0: greedy", {}),
    "sampling.top_p": ("nucleus sampling: probability mass to choose from, 1: all", {}),
    "sampling.top_k": ("number of most probable tokens to choose from, 0: all", {}),
    "sampling.seed": ("random seed of sampling", {}),
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
        "--model_name",
        "-m",
        default="bundled",
        help=f"target model: {names}, a local directory, a GGUF file or a hub id",
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
    """Flags for what decodes; `several`: `--method` takes more than one name, and `--arms` takes the place of it."""
    group = parser.add_argument_group("method")
    named = {"metavar": "NAME"} | ({"nargs": "+"} if several else {})
    group.add_argument(
        "--method", default=argparse.SUPPRESS, help="decoding method, see --list_methods (default: standard)", **named
    )
    if several:
        group.add_argument(
            "--arms", nargs="+", metavar="ARM", default=argparse.SUPPRESS, help="instead of --method: methods with "
            "settings of their own, as standard specextend specextend:top_k=8,tree=price, beside each other on every "
            f"prompt; settings: tree, {', '.join(OWNER)}",
        )  # fmt: skip
    group.add_argument("--list_methods", action=_ListMethods, help="list the methods and exit")
    group.add_argument("--use_specextend", action="store_true", help="short for --method specextend")
    group.add_argument(
        "--tree", choices=TREES, default=argparse.SUPPRESS, help="draft trees: as large as they earn their measured "
        "time, or the paper's bounds (default: price; paper with --tensor_parallel, or where a flag gives a bound)",
    )  # fmt: skip
    _add_settings(group, "", "tree", "retrieval")


def add_sampling_flags(parser: argparse.ArgumentParser, *, several: bool = False) -> None:
    """Flags for how tokens are chosen; `several`: `--temperature` takes more than one."""
    changed = {"temperature": ("-t", {"nargs": "+"})} if several else {}
    _add_settings(parser.add_argument_group("sampling"), "sampling", changed=changed)


def sampling_from(args: argparse.Namespace, temperature: float = 0.0) -> SamplingConfig:
    """The sampling the flags ask for; `temperature` is the default where no flag gives one."""
    given = {"temperature": temperature} | _given(args, "sampling")
    if isinstance(given["temperature"], list):
        given["temperature"], *more = given["temperature"]
        if more and not hasattr(args, "arms"):
            raise ConfigError("--temperature takes several values with --arms alone; give one")
    return SamplingConfig(**given)


def temperatures_from(args: argparse.Namespace, default: float = 0.0) -> tuple[float, ...]:
    """Those that the flags ask for, each to be measured."""
    given = getattr(args, "temperature", default)
    return tuple(given) if isinstance(given, list) else (given,)


def methods_from(args: argparse.Namespace) -> list[str]:
    """Names of the methods the flags ask for; switches, sizes and trees come on top of each (`config_from`)."""
    named = getattr(args, "method", None)
    arms = arms_from(args)
    if arms:
        if named or args.use_specextend:
            raise ConfigError(f"--arms takes the place of {'--method' if named else '--use_specextend'}; give one")
        return [*dict.fromkeys(arm.method for arm in arms)]
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


def arms_from(args: argparse.Namespace) -> list[Arm]:
    """The arms that the flags ask for, none where they ask for methods."""
    return read_arms(getattr(args, "arms", ()))


def check_settings(args: argparse.Namespace) -> None:
    """ConfigError for a setting out of its range, before anything is loaded."""
    tree, retrieval = _tree_from(args, TREES["price"]), RetrievalConfig(top_k=256)  # as large as any preset's
    bases = {name: _with_given(args, find_method(name).config(tree, retrieval)) for name in methods_from(args)}
    for arm in arms_from(args):
        arm.config(bases[arm.method], keeps_rule=hasattr(args, "tree"))
    sampling_from(args)


def config_from(args: argparse.Namespace, models: LoadedModels, method: str | None = None) -> SpecExtendConfig:
    """The setting the flags ask for; what they leave open is the preset's for this device, then the paper's.

    Args:
        method: one of `methods_from`; None takes the first.
    """
    chosen = find_method(method or methods_from(args)[0])
    return _with_given(args, chosen.config(_tree_from(args, default_tree(models)), models.preset.retrieval))


def arm_configs(args: argparse.Namespace, models: LoadedModels) -> dict[str, SpecExtendConfig]:
    """The setting of each arm by its name; the other flags hold for all of them."""

    def config_of(arm: Arm) -> SpecExtendConfig:
        return arm.config(config_from(args, models, arm.method), keeps_rule=hasattr(args, "tree"))

    return resolve(arms_from(args), config_of, lambda line: print(line, file=sys.stderr))


def _tree_from(args: argparse.Namespace, default: TreeConfig) -> TreeConfig:
    """The tree that the flags name, or what their bounds make of the default one."""
    return TREES[args.tree] if hasattr(args, "tree") else default.given(_given(args, "tree"))


def _with_given(args: argparse.Namespace, base: SpecExtendConfig) -> SpecExtendConfig:
    return replace(
        base,
        **_given(args, ""),
        tree=replace(base.tree, **_given(args, "tree")),
        retrieval=replace(base.retrieval, **_given(args, "retrieval")),
    )


def _given(args: argparse.Namespace, part: str) -> dict[str, Any]:
    """Fields of one part of the setting whose flags were typed."""
    return {name: getattr(args, flag) for flag, name, *_ in _settings_of(part) if hasattr(args, flag)}


def _settings_of(part: str) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """Flag, field, help and options of each setting of one of `PARTS`."""
    for setting, (text, options) in SETTINGS.items():
        owner, _, name = setting.rpartition(".")
        if owner == part:
            yield FLAGS[setting].removeprefix("--"), name, text, options


def _add_settings(group, *parts: str, changed: Mapping[str, tuple[str, dict[str, Any]]] | None = None) -> None:
    """Flags of `parts`, absent from the namespace unless they are typed, so that defaults live in one place.

    Args:
        changed: by flag a short form of it, and further options.
    """
    for part in parts:
        for flag, name, text, options in _settings_of(part):
            kind = {} if options else {"type": get_type_hints(PARTS[part])[name]}
            default = next(one.default for one in fields(PARTS[part]) if one.name == name)
            assert default is not MISSING, f"{name} has a default"
            preset = " or the model's own" if part in ("tree", "retrieval") else ""
            shown = "" if options == SWITCH else f" (default: {default}{preset})"
            short, more = (changed or {}).get(flag, ("", {}))
            names = (f"--{flag}", short) if short else (f"--{flag}",)
            group.add_argument(*names, default=argparse.SUPPRESS, help=text + shown, **kind, **options, **more)


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

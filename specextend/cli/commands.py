"""What the entry points do once their models can be loaded: answer prompts, or measure a data set.

`run_classic.py` and `run_eagle.py` differ in the draft alone, and so do the two eval scripts.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

from specextend.cli import flags
from specextend.cli.arms import data_dirs, measure_arms
from specextend.cli.engines import uniform_engine
from specextend.cli.reporter import ConsoleReporter
from specextend.config import SpecExtendConfig
from specextend.data.encoded import gather_prompts
from specextend.data.prepare import ensure_data
from specextend.data.prompts import read_prompts
from specextend.engine import SpecExtend
from specextend.errors import ConfigError, WorkerError
from specextend.evaluation.files import check_output
from specextend.evaluation.plan import DEFAULT_FOLDER, Plan, read_buckets, require_positive
from specextend.evaluation.ranks import Leader, follow
from specextend.evaluation.run import check_outputs, evaluate
from specextend.evaluation.workers import LocalWorker, Workers
from specextend.methods import METHODS, name_of
from specextend.models import tensor_parallel
from specextend.models.loading import LoadedModels, load_models
from specextend.models.presets import find_preset
from specextend.models.widen import widened

NEW_TOKENS = 256
# Short problems, long answers (the paper's "long-form reasoning"): the context grows while generating.
REASONING = ("aime24",)
REASONING_TOKENS, REASONING_TEMPERATURE = 32 * 1024, 0.5
PROBLEM_TOKENS = 1024  # left for the problem where a model holds less


def load_pair(args: argparse.Namespace) -> LoadedModels:
    """The target with a small language model as draft, as the flags of `flags.add_model_flags` say."""
    draft, shape = flags.draft_from(args), flags.shape_from(args)
    # a method that needs no draft does without where none is known
    needed = any(METHODS[name].drafts_with_model for name in flags.methods_from(args))
    with_draft = needed or bool(draft or find_preset(args.model_name).draft)
    models = load_models(
        args.model_name,
        draft=draft,
        dtype="float32" if shape else args.dtype,
        device=args.device,
        with_draft=with_draft,
        ranks=flags.ranks_from(args),
    )
    return widened(models, shape, dtype=args.dtype) if shape else models


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    text = parser.add_argument_group("prompts")
    text.add_argument(
        "--input_file", "-i", type=Path, default=argparse.SUPPRESS, help="prompts: .jsonl with a field text, or a text "
        "file (default: built-in text)",
    )  # fmt: skip
    text.add_argument("--max_samples", "-n", type=int, default=1, help="maximum number of prompts to answer")
    text.add_argument("--max_gen_len", "-max", type=int, default=256, help="maximum number of new tokens")
    text.add_argument(
        "--input_len", type=int, default=argparse.SUPPRESS, help="truncate prompts to this many tokens (default: no; "
        "the built-in text to 4096)",
    )  # fmt: skip
    text.add_argument(
        "--prefix_reuse", action=argparse.BooleanOptionalAction, default=True, help="do not read again what a prompt "
        "has in common with an earlier one",
    )  # fmt: skip
    text.add_argument("--stop", action="append", default=argparse.SUPPRESS, help="stop at this string; can be repeated")
    show = parser.add_argument_group("output")
    show.add_argument("--verbose", action="store_true", help="stream the text, coloured by which model wrote it")
    show.add_argument(
        "--compare", action="store_true", help="time autoregressive and standard decoding as well; all read every "
        "prompt whole",
    )  # fmt: skip
    show.add_argument("--output_result_line", action="store_true", help="print results as JSON, one line each")
    flags.add_method_flags(parser)
    flags.add_sampling_flags(parser)
    flags.add_parallel_flags(parser)


def answer(args: argparse.Namespace, load: Callable[[], LoadedModels]) -> None:
    """Answer the prompts the flags name."""
    flags.ranks_from(args)  # before anything is printed
    _check(args)
    length = getattr(args, "input_len", None)
    require_positive(
        max_samples=args.max_samples, max_gen_len=args.max_gen_len, input_len=1 if length is None else length
    )
    input_file = getattr(args, "input_file", None)
    prompts = read_prompts(input_file, args.max_samples) if input_file else None
    reporter = ConsoleReporter(verbose=args.verbose, result_line=args.output_result_line)
    with reporter.busy(f"loading {args.model_name}"):
        models = load()
        configs = [flags.config_from(args, models)]
        if args.compare and models.draft is not None:
            tree = flags.config_from(args, models, "standard").tree
            configs.append(SpecExtendConfig.standard(tree=tree))
        engine = uniform_engine(models, configs, eager=args.eager, prefix_reuse=args.prefix_reuse and not args.compare)
    sampling = flags.sampling_from(args, models.preset.temperature)
    reporter.introduce(engine, sampling)
    methods = {name_of(engine.config): engine.generate}
    if args.compare:
        others = {name_of(config): engine.with_config(config).generate for config in configs[1:]}
        methods = {"autoregressive": engine.autoregressive} | others | methods
    request = {"max_new_tokens": args.max_gen_len, "sampling": sampling, "stop": getattr(args, "stop", [])}
    encoded = gather_prompts(
        prompts,
        args.max_samples,
        length,
        encode=engine.encode,
        max_prompt_tokens=engine.max_prompt_tokens(args.max_gen_len),
        has_template=models.preset.template is not None,
    )
    for prompt in encoded:
        reporter.answer(prompt, methods, **request)
    tensor_parallel.leave()


def _check(args: argparse.Namespace) -> None:
    """Mistakes that need no model to be seen."""
    flags.check_settings(args)
    flags.draft_from(args)
    flags.shape_from(args)


def add_eval_flags(parser: argparse.ArgumentParser) -> None:
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data_dir", type=Path, nargs="+", default=argparse.SUPPRESS, help="folder of <name>_<length>.jsonl; with "
        "--arms also several (default: data/govreport)",
    )  # fmt: skip
    data.add_argument(
        "--lengths", "-l", nargs="+", metavar="LENGTH", default=argparse.SUPPRESS, help="prompt lengths to measure, "
        "such as 512 1K 4K (default: all)",
    )  # fmt: skip
    data.add_argument(
        "--samples_per_length", "-n", type=int, default=20, help="number of prompts per length and data set"
    )
    data.add_argument("--runs_per_sample", "-r", type=int, default=2, help="number of measurements per prompt")
    output = parser.add_argument_group("output")
    output.add_argument(
        "--max_gen_len", "-max", type=int, default=argparse.SUPPRESS,
        help="maximum number of new tokens (default: 256; for"
        " aime24 32K or what the model holds)",
    )  # fmt: skip
    output.add_argument(
        "--output_file", type=Path, default=argparse.SUPPRESS, help="results file (.json); {method} in it stands for "
        "the method (default: results/<data>_<model>_<draft>_<method>.json)",
    )  # fmt: skip
    output.add_argument(
        "--fresh", action="store_true", help="do not resume: start over, and keep the old results as .bak"
    )
    output.add_argument(
        "--seconds", type=float, default=argparse.SUPPRESS, help="with --arms: begin no prompt after so many seconds; "
        "the same command goes on",
    )  # fmt: skip
    spread = parser.add_argument_group("several workers (docs/scale.md)")
    spread.add_argument("--ray", action="store_true", help="measure on Ray workers, one per GPU or --cpus_per_worker")
    spread.add_argument(
        "--ray_address", default=argparse.SUPPRESS, help="connect to this Ray cluster, host:port or auto (default: "
        "start one)",
    )  # fmt: skip
    spread.add_argument(
        "--cpus_per_worker", type=int, default=argparse.SUPPRESS, help="cores per worker (default: 1, beside a GPU its "
        "share of the host's)",
    )  # fmt: skip
    spread.add_argument(
        "--max_workers", type=int, default=argparse.SUPPRESS, help="maximum number of workers (default: all that fit)"
    )
    flags.add_method_flags(parser, several=True)
    flags.add_sampling_flags(parser, several=True)
    flags.add_parallel_flags(parser)


def measure(args: argparse.Namespace, load: Callable[[], LoadedModels]) -> None:
    """Measure what the flags name: several arms beside each other, or one method after the other."""
    if hasattr(args, "arms"):
        _check_eval(args)
        return measure_arms(args, load)
    ranks = flags.ranks_from(args)
    if ranks and ranks.rank:
        follow(Engines(args, load))
        return tensor_parallel.leave()
    _check_eval(args)
    folders = data_dirs(args)
    if len(folders) > 1:
        raise ConfigError("--data_dir takes several folders with --arms alone; give one")
    if hasattr(args, "seconds"):
        raise ConfigError("--seconds is of no use without --arms")
    outputs = _output_files(getattr(args, "output_file", None), flags.methods_from(args))
    data_dir = ensure_data(folders[0], args.model_name)
    name = data_dir.resolve().name
    buckets = read_buckets(data_dir, args.samples_per_length, getattr(args, "lengths", ()))
    reasoning = name in REASONING and all("answer" in one.extra for prompts in buckets.values() for one in prompts)
    failed = []
    with _workers(args, partial(Engines, args, load)) as workers:
        plan = Plan(
            data=name,
            buckets=buckets,
            runs_per_sample=args.runs_per_sample,
            max_new_tokens=getattr(args, "max_gen_len", _reasoning_tokens(workers.limit) if reasoning else NEW_TOKENS),
            sampling=flags.sampling_from(args, REASONING_TEMPERATURE if reasoning else 0.0),
        )
        for method, output_file in outputs.items():
            summary = evaluate(workers, replace(plan, method=method), output_file, fresh=args.fresh)
            failed += [f"{method}, {one}" for one in summary.get("failed", ())]
            print(json.dumps(summary))
    tensor_parallel.leave()
    if failed:
        raise WorkerError(
            f"{len(failed)} samples could not be measured: {'; '.join(failed)}. The rest is in the results; the same "
            "command tries them again"
        )


def _check_eval(args: argparse.Namespace) -> None:
    """Mistakes in what is to be measured that need no model to be seen."""
    _check(args)
    require_positive(
        samples_per_length=args.samples_per_length,
        runs_per_sample=args.runs_per_sample,
        max_gen_len=getattr(args, "max_gen_len", 1),
    )


def _reasoning_tokens(limit: int) -> int:
    """As long an answer as the model has room for beside a problem."""
    return min(REASONING_TOKENS, max(limit - PROBLEM_TOKENS, limit // 2))


class Engines:
    """The models that the flags name, loaded once, under one method after the other, all on one backend."""

    def __init__(self, args: argparse.Namespace, load: Callable[[], LoadedModels]):
        self._args, self._models = args, load()
        configs = [flags.config_from(args, self._models, method) for method in flags.methods_from(args)]
        self._engine = uniform_engine(self._models, configs, eager=args.eager)

    def __call__(self, method: str | None) -> SpecExtend:
        """The engine of `method`, None for the first of the flags; its target's cache is the others' too."""
        if method is None:
            return self._engine
        config = flags.config_from(self._args, self._models, method)
        return self._engine if config == self._engine.config else self._engine.with_config(config)


def _workers(args: argparse.Namespace, make: Callable[[], Engines]) -> AbstractContextManager[Workers]:
    """Who measures: this process, or those that the flags ask Ray for."""
    given = {name: getattr(args, name, None) for name in ("cpus_per_worker", "max_workers")}
    address = getattr(args, "ray_address", None)
    if not (args.ray or address):
        for flag, value in given.items():
            if value is not None:
                raise ConfigError(f"--{flag} is of no use without --ray")
        return Leader(make()) if args.tensor_parallel else nullcontext(LocalWorker(make()))
    if args.tensor_parallel:
        raise ConfigError("--ray and --tensor_parallel cannot be combined: a worker of Ray has one device")
    if importlib.util.find_spec("ray") is None:
        raise ConfigError("--ray needs Ray, which is not installed; run: pip install ray psutil")
    from specextend.evaluation.ray_workers import RayWorkers

    return RayWorkers(make, address=address, device=args.device, **given)


def _output_files(template: Path | None, methods: list[str]) -> dict[str, Path | None]:
    """Each method's per-length file, checked; None is the default one."""
    if template is None:
        check_output(DEFAULT_FOLDER / "any.json")
        return dict.fromkeys(methods)
    if len(methods) > 1 and "{method}" not in str(template):
        raise ConfigError(f"output_file is {template} for {len(methods)} methods; put {{method}} into its name")
    files = {method: Path(str(template).replace("{method}", method)) for method in methods}
    for file in files.values():
        check_outputs(file)
    return files

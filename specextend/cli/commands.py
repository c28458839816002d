"""What the entry points do once their models can be loaded: answer prompts, or measure a data set.

`run_classic.py` and `run_eagle.py` differ in the draft alone, and so do the two eval scripts.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

from specextend.cli import flags
from specextend.cli.reporter import ConsoleReporter
from specextend.config import SpecExtendConfig
from specextend.data.encoded import gather_prompts
from specextend.data.prepare import ensure_data
from specextend.engine import SpecExtend
from specextend.errors import ConfigError, WorkerError
from specextend.evaluation import ranks
from specextend.evaluation.plan import Plan, read_buckets, require_positive
from specextend.evaluation.run import evaluate
from specextend.evaluation.workers import LocalWorker, Workers
from specextend.methods import METHODS, name_of
from specextend.models import tensor_parallel
from specextend.models.loading import LoadedModels, load_models
from specextend.models.presets import find_preset

NEW_TOKENS = 256
# Short problems, long answers (the paper's "long-form reasoning"): the context grows while generating.
REASONING = ("aime24",)
REASONING_TOKENS, REASONING_TEMPERATURE = 32 * 1024, 0.5
PROBLEM_TOKENS = 1024  # left for the problem where a model holds less


def load_pair(args: argparse.Namespace) -> LoadedModels:
    """The target with a small language model as draft, as the flags of `flags.add_model_flags` say."""
    draft = getattr(args, "draft_model", None)
    # a method that needs no draft does without where none is known
    needed = any(METHODS[name].drafts_with_model for name in flags.methods_from(args))
    with_draft = needed or bool(draft or find_preset(args.model_name).draft)
    ranks = flags.ranks_from(args)
    return load_models(
        args.model_name, draft=draft, dtype=args.dtype, device=args.device, with_draft=with_draft, ranks=ranks
    )


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    text = parser.add_argument_group("text")
    text.add_argument("--input_file", "-i", type=Path, help=".jsonl (field text) or a text file; else built-in text")
    text.add_argument("--max_samples", "-n", type=int, default=1, help="prompts to answer")
    text.add_argument("--max_gen_len", "-max", type=int, default=256, help="new tokens at most")
    text.add_argument("--input_len", type=int, help="cut prompts to this many tokens; 4096 for the built-in text")
    text.add_argument("--stop", action="append", default=[], help="string that ends the answer; may be given twice")
    show = parser.add_argument_group("display")
    show.add_argument("--verbose", action="store_true", help="stream the text, tokens coloured by who wrote them")
    show.add_argument("--compare", action="store_true", help="also autoregressive and standard decoding, side by side")
    show.add_argument("--output_result_line", action="store_true", help="print one JSON line per result")
    flags.add_method_flags(parser)
    flags.add_sampling_flags(parser)
    flags.add_parallel_flags(parser)


def answer(args: argparse.Namespace, load: Callable[[], LoadedModels]) -> None:
    """Answer the prompts the flags name."""
    flags.ranks_from(args)  # before anything is printed
    sampling = flags.sampling_from(args)
    reporter = ConsoleReporter(verbose=args.verbose, result_line=args.output_result_line)
    with reporter.busy(f"loading {args.model_name}"):
        models = load()
        engine = SpecExtend(models, flags.config_from(args, models), eager=args.eager)
    reporter.introduce(engine, sampling)
    prompts = gather_prompts(
        args.input_file,
        args.max_samples,
        args.input_len,
        encode=engine.encode,
        max_prompt_tokens=engine.max_prompt_tokens(args.max_gen_len),
        has_template=models.preset.template is not None,
    )
    for prompt in prompts:
        methods = {name_of(engine.config): engine.generate}
        if args.compare:
            standard = engine.with_config(SpecExtendConfig.standard(tree=engine.config.tree))
            methods = {"autoregressive": engine.autoregressive, "standard": standard.generate} | methods
        reporter.answer(prompt, methods, max_new_tokens=args.max_gen_len, sampling=sampling, stop=args.stop)
    tensor_parallel.leave()


def add_eval_flags(parser: argparse.ArgumentParser) -> None:
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data_dir", type=Path, default=Path("data/govreport"), help="folder of <name>_<length>.jsonl files"
    )
    data.add_argument("--lengths", nargs="+", metavar="LENGTH", help="only these, as 512 1K 4K; all without it")
    data.add_argument("--samples_per_length", "-n", type=int, default=20, help="prompts per length")
    data.add_argument("--runs_per_sample", "-r", type=int, default=2, help="measurements per prompt")
    output = parser.add_argument_group("output")
    output.add_argument(
        "--max_gen_len",
        "-max",
        type=int,
        default=argparse.SUPPRESS,
        help="new tokens per generation at most; 256, for problems to reason about 32K or what the model holds",
    )
    output.add_argument(
        "--output_file",
        type=Path,
        help="results/<data>_<model>_<method>.json without it; {method} in it stands for the name",
    )
    output.add_argument("--fresh", action="store_true", help="start over instead of resuming")
    spread = parser.add_argument_group("spreading over processes and hosts (docs/scale.md)")
    spread.add_argument("--ray", action="store_true", help="one worker per GPU, or per --cpus_per_worker, by Ray")
    spread.add_argument("--ray_address", help="of a Ray cluster that runs, host:port or auto; else one is started")
    spread.add_argument(
        "--cpus_per_worker", type=int, help="cores each worker has to itself; 1, beside a GPU its share of the host's"
    )
    spread.add_argument("--max_workers", type=int, help="workers at most; all that fit without it")
    flags.add_method_flags(parser, several=True)
    flags.add_sampling_flags(parser)
    flags.add_parallel_flags(parser)


def measure(args: argparse.Namespace, load: Callable[[], LoadedModels]) -> None:
    """Measure the data set the flags name by each method, each prompt beside its autoregressive decoding."""
    ranks = flags.ranks_from(args)
    if ranks and ranks.rank:
        ranks.follow(Engines(args, load))
        return tensor_parallel.leave()
    typed = getattr(args, "max_gen_len", 1)
    require_positive(
        samples_per_length=args.samples_per_length, runs_per_sample=args.runs_per_sample, max_gen_len=typed
    )
    data_dir = ensure_data(args.data_dir, args.model_name)
    buckets = read_buckets(data_dir, args.samples_per_length, args.lengths or ())
    reasoning = data_dir.resolve().name in REASONING
    sampling = flags.sampling_from(args, REASONING_TEMPERATURE if reasoning else 0.0)
    outputs = _output_files(args.output_file, flags.methods_from(args))
    failed = []
    with _workers(args, partial(Engines, args, load)) as workers:
        new_tokens = min(REASONING_TOKENS, workers.limit - PROBLEM_TOKENS) if reasoning else NEW_TOKENS
        for method, output_file in outputs.items():
            plan = Plan(
                data=data_dir.resolve().name,
                buckets=buckets,
                runs_per_sample=args.runs_per_sample,
                max_new_tokens=getattr(args, "max_gen_len", new_tokens),
                sampling=sampling,
                method=method,
            )
            summary = evaluate(workers, plan, output_file, fresh=args.fresh)
            failed += [f"{method}, {one}" for one in summary.get("failed", ())]
            print(json.dumps(summary))
    tensor_parallel.leave()
    if failed:
        raise WorkerError(
            f"{len(failed)} samples could not be measured: {'; '.join(failed)}. The rest is in the results; the same "
            "command tries them again"
        )


class Engines:
    """The models that the flags name, loaded once, under one method after the other."""

    def __init__(self, args: argparse.Namespace, load: Callable[[], LoadedModels]):
        self._args, self._models = args, load()
        self._engine = SpecExtend(self._models, flags.config_from(args, self._models), eager=args.eager)

    def __call__(self, method: str | None) -> SpecExtend:
        """The engine of `method`, None for the first of the flags; its target's cache is the others' too."""
        if method is None:
            return self._engine
        config = flags.config_from(self._args, self._models, method)
        return self._engine if config == self._engine.config else self._engine.with_config(config)


def _workers(args: argparse.Namespace, make: Callable[[], Engines]) -> AbstractContextManager[Workers]:
    """Who measures: this process, or those that the flags ask Ray for."""
    if not (args.ray or args.ray_address):
        for flag in ("cpus_per_worker", "max_workers"):
            if getattr(args, flag) is not None:
                raise ConfigError(f"--{flag} is of no use without --ray")
        return ranks.Leader(make()) if args.tensor_parallel else nullcontext(LocalWorker(make()))
    if args.tensor_parallel:
        raise ConfigError("--ray and --tensor_parallel cannot be combined: a worker of Ray has one device")
    if importlib.util.find_spec("ray") is None:
        raise ConfigError("--ray needs Ray, which is not installed; run: pip install ray")
    from specextend.evaluation.ray_workers import RayWorkers

    return RayWorkers(
        make,
        address=args.ray_address,
        device=args.device,
        cpus_per_worker=args.cpus_per_worker,
        max_workers=args.max_workers,
    )


def _output_files(template: Path | None, methods: list[str]) -> dict[str, Path | None]:
    """Each method's per-length file; None is the default one."""
    if template is None:
        return dict.fromkeys(methods)
    if len(methods) > 1 and "{method}" not in str(template):
        raise ConfigError(f"output_file is {template} for {len(methods)} methods; put {{method}} into its name")
    return {method: Path(str(template).replace("{method}", method)) for method in methods}

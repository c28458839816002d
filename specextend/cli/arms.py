"""Evaluations of several arms beside each other, as the flags say."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from specextend.cli import flags
from specextend.cli.engines import arm_engines
from specextend.data.prepare import ensure_data
from specextend.data.prompts import Prompt, find_buckets, normal_label
from specextend.errors import ConfigError
from specextend.evaluation.files import check_output
from specextend.evaluation.panel import PanelPlan
from specextend.evaluation.panel_run import evaluate_panels
from specextend.evaluation.plan import DEFAULT_FOLDER, read_buckets
from specextend.evaluation.run import check_outputs
from specextend.models.loading import LoadedModels

SPREAD = ("ray", "ray_address", "cpus_per_worker", "max_workers", "tensor_parallel", "check_ranks")


def measure_arms(args: argparse.Namespace, load: Callable[[], LoadedModels]) -> None:
    """Measure the arms on every prompt of the data sets, in this process; mistakes first, then the models."""
    began = time.monotonic()
    for flag in SPREAD:
        if getattr(args, flag, None):
            raise ConfigError(f"--arms and --{flag} cannot be combined: arms are measured by one process")
    seconds = getattr(args, "seconds", None)
    if seconds is not None and not 0 < seconds < float("inf"):
        raise ConfigError(f"--seconds is {seconds:g}; give a number above 0")
    output_file = _output_file(args)
    plan = PanelPlan(
        _read_data(args),
        flags.temperatures_from(args),
        args.runs_per_sample,
        sampling=replace(flags.sampling_from(args), temperature=0.0),
        **({"max_new_tokens": args.max_gen_len} if hasattr(args, "max_gen_len") else {}),
    )
    models = load()
    engines = arm_engines(models, flags.arm_configs(args, models), eager=args.eager)
    until = None if seconds is None else began + seconds
    print(json.dumps(evaluate_panels(engines, plan, output_file, fresh=args.fresh, until=until)))


def data_dirs(args: argparse.Namespace) -> list[Path]:
    """Folders of the data sets that the flags of an evaluation name."""
    return getattr(args, "data_dir", [Path("data/govreport")])


def _read_data(args: argparse.Namespace) -> dict[str, dict[str, list[Prompt]]]:
    """Prompts of every data set by length; a length that one of several data sets lacks is measured on the others."""
    folders: dict[str, Path] = {}
    for folder in data_dirs(args):
        folder = ensure_data(folder, args.model_name)
        name = folder.resolve().name
        if name in folders:
            raise ConfigError(f"--data_dir names two folders {name}; their records could not be told apart")
        folders[name] = folder
    wanted = [normal_label(length) for length in getattr(args, "lengths", ())]
    there = {name: find_buckets(folder) for name, folder in folders.items()}
    data = {}
    for name, folder in folders.items():
        lacking = [one for one in wanted if one not in there[name] and any(one in other for other in there.values())]
        if lacking:
            print(f"{folder} has no length {', '.join(lacking)}; it is left out there", file=sys.stderr)
        lengths = [one for one in wanted if one not in lacking]
        if lengths or not wanted:
            data[name] = read_buckets(folder, args.samples_per_length, lengths)
    return data


def _output_file(args: argparse.Namespace) -> Path | None:
    """The file of figures, checked; None is the default one."""
    if not hasattr(args, "output_file"):
        check_output(DEFAULT_FOLDER / "any.json")
        return None
    output_file = Path(str(args.output_file).replace("{method}", "arms"))
    check_outputs(output_file)
    return output_file

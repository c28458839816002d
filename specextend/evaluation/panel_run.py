"""An evaluation of several arms in this process: every prompt is answered by all of them, one after the other.

Panels go to a journal (`<output>.jsonl`) as they are measured; a panel that was begun and not finished is measured anew
as a whole. The figures (`<output>.json`, `panel_figures.py`) are derived from it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from specextend.evaluation.environment import environment, gpu_state
from specextend.evaluation.files import locked
from specextend.evaluation.journal import Journal, write_json
from specextend.evaluation.near_ties import gap_between
from specextend.evaluation.panel import BASELINE, Answer, Panel, PanelPlan, PanelTask, order_of
from specextend.evaluation.panel_figures import figures_of
from specextend.evaluation.plan import DEFAULT_FOLDER, WARM_UP_NEW_TOKENS, setting_of_models
from specextend.evaluation.progress import Reporter
from specextend.evaluation.records import Worker
from specextend.evaluation.run import check_outputs, check_room, pending
from specextend.evaluation.tables import panel_table
from specextend.evaluation.terminal import PlainConsole
from specextend.evaluation.workers import judged, prompt_ids, warm
from specextend.methods import name_of

if TYPE_CHECKING:
    from specextend.decoding.output import Generation
    from specextend.engine import SpecExtend

Generate = Callable[..., "Generation"]


def evaluate_panels(
    engines: Mapping[str, SpecExtend],
    plan: PanelPlan,
    output_file: Path | None = None,
    *,
    fresh: bool = False,
    until: float | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Measure what the journal lacks, write the figures, return the summary.

    Ctrl-C keeps what was measured, writes the figures of it and exits with status 130.

    Args:
        engines: of each arm, by its name, over the same models.
        output_file: the figures; the journal lies beside it. None: a name made of data sets and models.
        fresh: start over; what is there moves aside once there is a panel to take its place.
        until: no panel begins after this moment of `time.monotonic()`.
    """
    console = console or PlainConsole()
    meter = PanelMeter(engines, plan)
    setting = meter.setting()
    output_file = output_file or default_output(setting, plan)
    check_outputs(output_file)
    with locked(output_file):
        journal = Journal(
            output_file.with_suffix(".jsonl"), {"setting": setting, "environment": environment()}, fresh=fresh,
            derived=output_file, read=Panel.from_json,
        )  # fmt: skip
        todo = pending(plan, journal)
        if todo:
            check_room(meter.limit, plan.max_new_tokens)
        try:
            left = _measure(meter, plan, todo, journal, console, until)
        finally:
            report = {"figures": figures_of(journal.records), "manifest": journal.manifest}
            if journal.records:
                write_json(output_file, report)
    if report["figures"]:
        console.print(panel_table(report, console.width))
    return {
        "output": str(output_file),
        "records": str(journal.path),
        "arms": list(engines),
        "panels": len(journal.records),
        "left": left,
    }


def default_output(setting: dict[str, Any], plan: PanelPlan, directory: Path = DEFAULT_FOLDER) -> Path:
    """`results/<data sets>_<model>_<draft>_arms.json`."""
    parts = ["+".join(plan.data), Path(setting["model"]).name, Path(setting["draft"]).name, "arms"]
    return directory / f"{'_'.join(parts).replace(' ', '-')}.json"


class PanelMeter:
    """Measures panel after panel.

    Args:
        engines: of each arm, by its name. They share the models and the target's cache, and take turns; each keeps
            its draft's cache and its captured steps.
    """

    def __init__(self, engines: Mapping[str, SpecExtend], plan: PanelPlan):
        self._engines, self._plan = engines, plan
        # our fastest autoregressive loop, whatever the arms can do; it reads nothing of its engine's setting
        self._own = min(engines.values(), key=lambda engine: getattr(engine, "backend", "eager") == "eager")
        self._generate: dict[str, Generate] = {BASELINE: self._own.autoregressive} | {
            name: engine.generate for name, engine in engines.items()
        }
        self._device = self._own.models.device
        self._worker, self._commit = Worker.here(0, 1, self._device), environment()["commit"]
        self._warm: set[str] = set()
        self._last_bucket: str | None = None

    @property
    def limit(self) -> int:
        return self._own.limit

    def setting(self) -> dict[str, Any]:
        """All that decides the numbers besides hardware, versions, prompts and temperature, which a panel names."""
        sampling = asdict(self._plan.sampling)
        del sampling["temperature"]
        return {
            **setting_of_models(self._own.models),
            "backend": getattr(self._own, "backend", "eager"),
            "arms": {
                name: {
                    "method": name_of(engine.config),
                    "backend": getattr(engine, "backend", "eager"),
                    "config": asdict(engine.config),
                }
                for name, engine in self._engines.items()
            },
            "sampling": sampling,
            "seeds": "(seed + 1000 * sample + run) modulo 2^63, the same for all arms and the baseline",
            "max_gen_len": self._plan.max_new_tokens,
            "warm_up": {
                "generations": "one by every arm and one autoregressively at each length, not measured",
                "new_tokens": WARM_UP_NEW_TOKENS,
            },
            "order": "autoregressive decoding and the arms as they are listed, the other way round on the next prompt",
        }

    def is_cold(self, task: PanelTask) -> bool:
        """Whether nothing of the task's length was run yet."""
        return task.key.bucket not in self._warm

    def warm_up(self, task: PanelTask) -> None:
        """A short generation of every kind after the whole prompt, not measured."""
        ids, _ = prompt_ids(self._own, task.prompt, self._plan.max_new_tokens)
        new_tokens = min(WARM_UP_NEW_TOKENS, self._plan.max_new_tokens)
        for generate in self._generate.values():
            generate(ids, new_tokens, sampling=self._plan.sampling)
        self._warm.add(task.key.bucket)

    def measure(self, task: PanelTask) -> Panel:
        """One generation by every arm and one autoregressively, of the same prompt with the same seed."""
        ids, cut = prompt_ids(self._own, task.prompt, self._plan.max_new_tokens)
        sampling = replace(self._plan.sampling, temperature=task.key.temperature, seed=task.seed)
        order = order_of([*self._engines], task.turn)
        done = {
            name: warm(lambda name=name: self._generate[name](ids, self._plan.max_new_tokens, sampling=sampling))
            for name in order
        }
        gpu = gpu_state(self._device) if task.key.bucket != self._last_bucket else None  # while it is still warm
        self._last_bucket = task.key.bucket
        alone = done[BASELINE]
        answers = {
            name: Answer.of(
                one,
                alone,
                gap=gap_between(self._own.models, ids, alone.token_ids, one.token_ids, sampling),
                right=judged(self._own, one.text, task.prompt),
            )
            for name, one in done.items()
        }
        return Panel(
            **task.key._asdict(),
            seed=task.seed,
            source=Path(task.prompt.source).name,
            prompt_sha256=task.prompt_sha256,
            prompt_tokens=len(ids),
            cut=cut,
            order=order,
            autoregressive=answers[BASELINE],
            arms={name: answers[name] for name in self._engines},
            commit=self._commit,
            worker=self._worker,
            gpu=gpu,
        )


def _measure(
    meter: PanelMeter, plan: PanelPlan, todo: list[PanelTask], journal: Journal[Panel], console: Console,
    until: float | None,
) -> int:  # fmt: skip
    """Measure `todo` and write it down, as long as there is time; how many panels are left."""
    left = len(todo)
    try:
        with Reporter(console, todo, plan) as reporter:
            for task in todo:
                if until is not None and time.monotonic() >= until:
                    reporter.note(
                        f"stopped, since its seconds are over: {left} panels are left, {len(journal.records)} are in "
                        f"{journal.path}; the same command goes on"
                    )
                    break
                if meter.is_cold(task):
                    reporter.begin(task, "warm-up before")
                    meter.warm_up(task)
                reporter.begin(task, "measuring")
                panel = meter.measure(task)
                journal.append(panel)
                reporter.finish(task, panel)
                left -= 1
    except KeyboardInterrupt:
        kept = f"{len(journal.records)} panels kept in {journal.path}" if journal.records else "nothing measured yet"
        print(f"Interrupted: {kept}; the same command resumes", file=sys.stderr)
        raise SystemExit(130) from None
    return left

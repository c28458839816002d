"""One training loop for all models: a budget in seconds, phases of different row lengths, resumable."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from scripts.train.settings import Settings

START = time.monotonic()


def log(*words: object) -> None:
    """Print with the seconds since start, at once."""
    print(f"[{time.monotonic() - START:7.1f}s]", *words, flush=True)


def multiplies_bfloat16(device: torch.device) -> bool:
    """Has the device matrix instructions for bfloat16? A CPU without them would emulate it, slowly."""
    return device.type == "cuda" or (device.type == "cpu" and torch.cpu._is_avx512_bf16_supported())


def autocast(device: torch.device) -> torch.autocast:
    """Matrix products in bfloat16 where that is fast."""
    return torch.autocast(device.type, torch.bfloat16, enabled=multiplies_bfloat16(device))


@dataclass(frozen=True)
class Phase:
    """Rows of one shape, used until this fraction of the budget is spent."""

    name: str
    until: float
    batch: int
    context: int


@dataclass(frozen=True)
class Task:
    """What is trained on: a phase's batch, its loss, what to measure now and then, and how to save weights."""

    draw: Callable[[Phase], tuple[Tensor, ...]]
    loss: Callable[..., Tensor]
    validate: Callable[[Phase], dict[str, float]]
    save: Callable[[], None]


class Paused(Exception):
    """The time for this call is over, its state is saved."""


class BudgetClock:
    """Seconds that count: only those between `start` and `stop`, the device's queue emptied at both."""

    def __init__(self, device: torch.device, elapsed: float = 0.0) -> None:
        self.device, self.stopped_at = device, elapsed
        self.started: float | None = None

    def start(self) -> None:
        self._synchronize()
        self.started = time.monotonic()

    def stop(self) -> None:
        self._synchronize()
        self.stopped_at, self.started = self.elapsed, None

    @property
    def elapsed(self) -> float:
        return self.stopped_at + (time.monotonic() - self.started if self.started is not None else 0.0)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


class StepClock:
    """Counts every step as so many seconds: a run that does not depend on how fast the machine is."""

    def __init__(self, steps: Callable[[], int], seconds: float):
        self._steps, self._seconds = steps, seconds

    @property
    def elapsed(self) -> float:
        return self._steps() * self._seconds

    def start(self) -> None:
        pass

    def stop(self) -> None:
        pass


class Trainer:
    """Trains `model` for `seconds`; its whole state can be saved to and resumed from `checkpoint`."""

    def __init__(
        self, name: str, model: nn.Module, task: Task, seconds: float, settings: Settings, checkpoint: Path
    ) -> None:
        self.name, self.model, self.task, self.seconds = name, model, task, seconds
        self.settings, self.checkpoint = settings, checkpoint
        self.device = next(model.parameters()).device
        self.optimizers = make_optimizers(model, settings)
        self.base_lrs = [settings.matrix_lr, settings.adam_lr]
        self.steps = 0
        self.clock = self._clock(settings)
        self.curve: list[dict] = []
        self.validations: list[dict] = []
        self.phase_records: dict[str, dict] = {}
        self.saved_at = self.validated_at = 0.0  # on the budget clock

    def fit(self, phases: list[Phase]) -> dict:
        """Train through the phases that are not over yet; returns the record of the training."""
        if self.checkpoint.exists():
            self._resume()
        for phase in phases:
            end = self.seconds * phase.until
            if self.clock.elapsed < end:
                self._run_phase(phase, end)
        self._validate(phases[-1])
        self.task.save()
        return self.record()

    def record(self) -> dict:
        return {
            "steps": self.steps,
            "budget_s": self.seconds,
            "phases": self.phase_records,
            "curve": self.curve,
            "validation": self.validations,
        }

    def _run_phase(self, phase: Phase, end: float) -> None:
        stalled = time.monotonic()
        for _ in range(self.settings.uncounted_steps):
            loss = self._step(phase)
        self.clock.start()  # waits for the device
        stalled = time.monotonic() - stalled
        log(f"{self.name} {phase.name}: first {self.settings.uncounted_steps} steps {stalled:.1f}s, loss {loss:.3f}")
        tally = self.phase_records.setdefault(
            phase.name, {"batch": phase.batch, "context": phase.context, "steps": 0, "tokens": 0, "seconds": 0.0}
        )
        before, since, first = dict(tally), self.clock.elapsed, self.steps
        while self.clock.elapsed < end:
            loss = self._step(phase)
            tally["steps"] = before["steps"] + self.steps - first
            tally["tokens"] = tally["steps"] * phase.batch * phase.context
            tally["seconds"] = before["seconds"] + self.clock.elapsed - since
            if (self.steps - first) % self.settings.log_steps == 0:
                self._log(phase, tally, loss)
            self._pause_if_due(phase)
        self.clock.stop()
        tally["seconds"] = before["seconds"] + self.clock.elapsed - since
        tally["tokens_per_s"] = tally["tokens"] / max(tally["seconds"], 1e-9)
        log(f"{self.name} {phase.name} done: {tally}")

    def _step(self, phase: Phase) -> Tensor:
        """One optimiser step; returns the loss, still on the device."""
        batch = self.task.draw(phase)
        with autocast(self.device):
            loss = self.task.loss(*batch)
        loss.backward()
        scale = self._schedule()
        for optimizer, base in zip(self.optimizers, self.base_lrs, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = base * scale
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        return loss.detach()

    def _schedule(self) -> float:
        """Warm-up in steps, then flat, then linearly down over the last `lr_decay` of the budget."""
        left = (1 - self.clock.elapsed / self.seconds) / self.settings.lr_decay
        return min(1.0, (self.steps + 1) / self.settings.warmup_steps) * min(1.0, max(0.01, left))

    def _log(self, phase: Phase, tally: dict, loss: Tensor) -> None:
        point = {
            "phase": phase.name,
            "step": self.steps,
            "seconds": round(self.clock.elapsed, 2),
            "loss": round(loss.item(), 4),
            "lr_scale": round(self._schedule(), 4),
        }
        self.curve.append(point)
        log(f"{self.name} {point} {tally['tokens'] / max(tally['seconds'], 1e-9) / 1e6:.3f}M tokens/s")

    def _pause_if_due(self, phase: Phase) -> None:
        now = self.clock.elapsed
        pausing = 0 < self.settings.call_seconds < time.monotonic() - START
        validating = now - self.validated_at >= self.seconds / self.settings.validations
        saving = now - self.saved_at >= self.settings.checkpoint_seconds
        if not (validating or saving or pausing):
            return
        self.clock.stop()
        if validating:
            self.validated_at = now
            self._validate(phase)
        if saving or pausing:
            self.saved_at = now
            self._save()
        if pausing:
            raise Paused(f"{self.name} paused at {now:.0f}s of {self.seconds:.0f}s; the same command goes on with it")
        self.clock.start()

    def _clock(self, settings: Settings, elapsed: float = 0.0) -> BudgetClock | StepClock:
        if settings.step_seconds:
            return StepClock(lambda: self.steps, settings.step_seconds)
        return BudgetClock(self.device, elapsed)

    def _validate(self, phase: Phase) -> None:
        with torch.no_grad(), autocast(self.device):
            figures = {name: round(value, 4) for name, value in self.task.validate(phase).items()}
        self.validations.append(
            {"phase": phase.name, "step": self.steps, "seconds": round(self.clock.elapsed, 2), **figures}
        )
        log(f"{self.name} validation {self.validations[-1]}")

    def _save(self) -> None:
        state = {
            "model": {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad},
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "progress": {"elapsed": self.clock.elapsed, **self.record()},
        }
        partial = self.checkpoint.with_suffix(".partial")
        torch.save(state, partial)
        partial.rename(self.checkpoint)
        self.task.save()
        log(f"{self.name} saved at {self.clock.elapsed:.0f}s of {self.seconds:.0f}s")

    def _resume(self) -> None:
        state = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"], strict=False)  # what is frozen was not saved
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        progress = state["progress"]
        self.clock = self._clock(self.settings, progress["elapsed"])
        self.saved_at = self.validated_at = progress["elapsed"]
        self.steps, self.curve = progress["steps"], progress["curve"]
        self.validations, self.phase_records = progress["validation"], progress["phases"]
        log(f"{self.name} resumed at {self.clock.elapsed:.0f}s of {self.seconds:.0f}s, step {self.steps}")


def make_optimizers(model: nn.Module, settings: Settings) -> tuple[torch.optim.Muon, torch.optim.AdamW]:
    """Muon for the matrices of the layers, AdamW for embedding, LM head and norms."""
    matrices, others = [], []
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            in_layer = weight.ndim == 2 and not {"embed_tokens", "lm_head"} & set(name.split("."))
            (matrices if in_layer else others).append(weight)
    return (
        torch.optim.Muon(matrices, settings.matrix_lr, weight_decay=settings.weight_decay),
        torch.optim.AdamW(others, lr=settings.adam_lr, betas=(0.9, 0.95), weight_decay=0.0),
    )

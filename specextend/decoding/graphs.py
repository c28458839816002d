"""Decoding by captured CUDA graphs: the loops of `generate.py`, with the device left alone within a round.

Every step of a round (refresh, draft, verify, accept) is captured once and replayed at every length; the host reads one
small tensor per round. Prefill, of which there is one per prompt, stays with `Target` and the drafter.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from specextend.config import SamplingConfig, TreeConfig
from specextend.decoding.fused import FusedDecoder, FusedRound
from specextend.decoding.loop import ROOT
from specextend.decoding.output import Output, Round
from specextend.decoding.sampling import Sampler, chooser, filtered
from specextend.drafting.drafter import TreeDrafter
from specextend.drafting.retrieval import Retriever
from specextend.kernels.tree import TreeBuffers
from specextend.modeling.fused_target import FusedTarget, Workspaces
from specextend.modeling.target import Target


class Captured:
    """A step without host decisions: run as it is the first time, captured the second, replayed ever after."""

    def __init__(self, step: Callable[[], None], pool: object | None):
        self._step, self._pool = step, pool
        self._run = self._first

    def __call__(self) -> None:
        self._run()

    def _first(self) -> None:
        self._step()
        if self._pool is not None:  # without one there is no GPU to capture on
            self._run = self._second

    def _second(self) -> None:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            self._step()
        graph.replay()
        self._run = graph.replay


class Stages:
    """Times the stages of one round by marks in the device's queue; the host does not wait for them."""

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"
        self._marks: list[tuple[str, object, object]] = []
        self._began = time.perf_counter()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = self._mark()
        yield
        self._marks.append((name, start, self._mark()))

    def seconds(self) -> dict[str, float]:
        """By stage, after the device has finished; "host" is what no stage accounts for."""
        passed = time.perf_counter() - self._began
        seconds = {name: self._between(start, end) for name, start, end in self._marks}
        return seconds | {"host": max(0.0, passed - sum(seconds.values()))}

    def _mark(self):
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, start, end) -> float:
        return start.elapsed_time(end) / 1e3 if self._on_gpu else end - start


class StaticChooser:
    """`verify.chooser` for rounds of fixed shape: the noise of the next positions lies in a buffer.

    Args:
        steps: output positions a round may choose for.
    """

    def __init__(self, sampling: SamplingConfig, steps: int, vocab_size: int, device: torch.device):
        self._sampling = sampling
        self._noise = torch.zeros(steps, vocab_size if sampling.temperature else 0, device=device)
        self._sampler = Sampler(sampling)

    def begin(self, seed: int) -> None:
        """Start the noise of a new generation."""
        self._sampler = Sampler(replace(self._sampling, seed=seed))

    def prepare(self, first: int) -> None:
        """Lay out the noise for output positions from `first`; outside any graph."""
        if self._sampling.temperature:
            self._noise.copy_(self._sampler.noise(first, first + len(self._noise), self._noise))

    def __call__(self, logits: Tensor, depth: Tensor) -> Tensor:
        if not self._sampling.temperature:
            return logits.argmax(-1)
        return (filtered(logits, self._sampling) + self._noise[depth.long()]).argmax(-1)


class CapturedSpeculation:
    """`generate.speculative` for one target and one drafter, captured lazily, for prompt after prompt."""

    def __init__(self, target: Target, drafter: TreeDrafter, retriever: Retriever, config: TreeConfig):
        self._target, self._drafter, self._retriever, self._config = target, drafter, retriever, config
        self.round: FusedRound | None = None
        self.steps: dict[object, Captured] = {}
        self._choosers: dict[SamplingConfig, StaticChooser] = {}

    @torch.inference_mode()
    def __call__(self, sampling: SamplingConfig, prompt: Tensor, output: Output) -> Iterator[Round | None]:
        """Extend `prompt` [N] with exactly the tokens the target alone would produce."""
        first = _prefill(self._target, sampling, prompt, output)
        with output.prefill_stage("draft"):
            self._drafter.prefill(prompt, first, output.extra_slots)
        output.begin(first)
        yield None

        one, choose = self._ready(prompt.device), self._chooser(sampling, prompt.device)
        one.begin(first)
        while not output.finished:
            stages = Stages(prompt.device)
            if self._retriever.is_due(len(output.rounds), output.context):
                with stages("retrieve"):
                    self._step("refresh", lambda: one.refresh(self._retriever))
            with stages("draft"):
                self._step("draft", one.draft)
            choose.prepare(output.new_tokens)
            with stages("verify"):
                self._step(("verify", choose), lambda: one.verify(choose))
            with stages("accept"):
                self._step("accept", one.accept)
            drafted, tokens = one.read()
            yield output.append(drafted, tokens, stages.seconds())

    def _ready(self, device: torch.device) -> FusedRound:
        """The round over the caches as they are now."""
        if self.round is None or not self.round.is_current:
            workspaces = Workspaces(device)
            tree = TreeBuffers(self._config, self._drafter.candidates, device)
            fused_target = FusedTarget(self._target, workspaces, tree.slots, self._drafter.tap)
            draft = self._drafter.fused(tree, workspaces)
            self.round = FusedRound(fused_target, draft, tree, self._config.max_depth)
            self.steps, self._pool = {}, _pool(device)
        return self.round

    def _step(self, name: object, step: Callable[[], None]) -> None:
        if name not in self.steps:
            self.steps[name] = Captured(step, self._pool)
        self.steps[name]()

    def _chooser(self, sampling: SamplingConfig, device: torch.device) -> StaticChooser:
        rule = replace(sampling, seed=0)
        if rule not in self._choosers:
            steps = self._config.max_depth + 1
            self._choosers[rule] = StaticChooser(rule, steps, self._target.model.config.vocab_size, device)
        self._choosers[rule].begin(sampling.seed)
        return self._choosers[rule]


class CapturedDecoding:
    """`generate.autoregressive`, captured: the baseline gets what the method gets."""

    def __init__(self, target: Target):
        self._target = target
        self.decoder: FusedDecoder | None = None
        self.steps: dict[SamplingConfig, tuple[StaticChooser, Captured]] = {}

    @torch.inference_mode()
    def __call__(self, sampling: SamplingConfig, prompt: Tensor, output: Output) -> Iterator[Round | None]:
        """Extend `prompt` [N] one token at a time."""
        first = _prefill(self._target, sampling, prompt, output)
        output.begin(first)
        yield None

        decoder = self._ready(prompt.device)
        choose, step = self._rule(sampling, prompt.device)
        choose.begin(sampling.seed)
        decoder.begin(first)
        while not output.finished:
            stages = Stages(prompt.device)
            choose.prepare(output.new_tokens)
            with stages("verify"):
                step()
            token = decoder.read()
            yield output.append(0, [token], stages.seconds())

    def _ready(self, device: torch.device) -> FusedDecoder:
        if self.decoder is None or not self.decoder.is_current:
            self.decoder = FusedDecoder(FusedTarget(self._target, Workspaces(device), 1))
            self.steps, self._pool = {}, _pool(device)
        return self.decoder

    def _rule(self, sampling: SamplingConfig, device: torch.device) -> tuple[StaticChooser, Captured]:
        rule = replace(sampling, seed=0)
        if rule not in self.steps:
            choose = StaticChooser(rule, 1, self._target.model.config.vocab_size, device)
            self.steps[rule] = choose, Captured(lambda: self.decoder.step(choose), self._pool)
        return self.steps[rule]


def _prefill(target: Target, sampling: SamplingConfig, prompt: Tensor, output: Output) -> Tensor:
    """Run the target over the prompt; its first token []."""
    with output.prefill_stage("target"):
        return chooser(sampling)(target.prefill(prompt, output.extra_slots), 0, ROOT)[0]


def _pool(device: torch.device) -> object | None:
    """Memory that the graphs of one engine share: they run one after the other."""
    return torch.cuda.graph_pool_handle() if device.type == "cuda" else None

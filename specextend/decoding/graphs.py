"""The steps of a round as captured CUDA graphs over Triton kernels, without host synchronisation within a round.

Every step is captured once and replayed at every length; the host reads one small tensor per round. What is computed
is the eager backend's; the prefill, of which there is one per prompt, is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import Tensor

from specextend.config import SpecExtendConfig
from specextend.decoding.backend import Reservation, read_prompt, unchanged
from specextend.decoding.output import Output
from specextend.decoding.prefixes import NoReuse
from specextend.decoding.short_reads import ChainReader
from specextend.drafting.captured import CapturedDraft, Run, Step, span_for
from specextend.drafting.drafter import Drafter
from specextend.drafting.lookup_branch import NoBranch
from specextend.drafting.retrieval import Retriever, select_positions
from specextend.kernels.tree import TreeNodes
from specextend.modeling.fused_target import FusedTarget
from specextend.modeling.llama_blocks import Workspaces
from specextend.modeling.target import Target
from specextend.trees.tree import DraftTree


class GraphBackend:
    """A target, a drafter and a retriever whose rounds are captured lazily, for prompt after prompt.

    Args:
        target, drafter: they read the prompt; their caches are what the captured steps go on with.
        prefixes: what is kept from prompt to prompt.
    """

    name = "graphs"

    def __init__(
        self, target: Target, drafter: Drafter, retriever: Retriever, config: SpecExtendConfig,
        prefixes: NoReuse | None = None,
    ):  # fmt: skip
        self.device, self._prefixes = target.model.device, prefixes or NoReuse()
        self._host_target, self._drafter, self._retriever = target, drafter, retriever
        self._slots, self._dense = config.slots, not config.hybrid_tree_attention
        self._draft: CapturedDraft | None = None
        self._lookup = NoBranch()
        self._graphs: dict[str, Step] = {}
        self._logits: dict[int, Tensor] = {}  # of the last verification, by its slots

    # --- the steps of a round ---

    def prefill(self, output: Output) -> Tensor:
        self._output, self._reserved = output, Reservation(output, self._slots)
        extra = self._reserved.extra_slots
        first = read_prompt(output, self._host_target, self._drafter, extra, self._prefixes, self._lookup.begin)
        if self._draft is None:
            self._build()
            if not self._dense:  # which goes over as many keys as the last prompt needed
                self._host_target.short_reader = ChainReader(self._target, self._verifiable, self._logits_after)
        self._begin(first)
        self._recapture()
        return first

    def plan(self) -> None:
        pass

    def refresh_is_due(self) -> bool:
        return self._retriever.is_due(len(self._output.rounds), self._output.context)

    def refresh(self) -> None:
        self._run("refresh", self._refresh)
        if self._output.observer:
            positions, exist = self._kept
            self._output.observer.refreshed(
                len(self._output.rounds), positions[exist].clone(), int(self._draft.context()[0])
            )

    def draft(self) -> None:
        if self._reserved.is_short(self._output.context):
            self._grow()
        self._draft.draft(self._run)
        if self._output.observer:
            self._output.observer.drafted(tree_of(self._draft.nodes))

    def verify(self) -> None:
        nodes = self._judged
        logits = self._logits_after(nodes)
        # outside of the graph: one graph serves all temperatures, and processors may look at the host
        self._chosen[: nodes.slots].copy_(self._output.choose(logits, nodes, self._output.new_tokens))
        if self._output.observer:
            self._output.observer.verified(tree_of(nodes), logits[nodes.used.bool()].clone())

    def accept(self) -> None:
        nodes = self._judged
        self._run(self._named("accept", nodes), partial(self._accept, nodes))
        if self._output.observer:
            places = torch.cumsum(nodes.used.long(), 0) - 1
            path = nodes.path[: int(nodes.count)] if nodes.slots > 1 else nodes.path[:1]
            self._output.observer.accepted(places[path])

    def read(self) -> tuple[int, list[int]]:
        self._synchronise()
        drafted, count, *emitted = self._report.tolist()
        return drafted, emitted[:count]

    def steps(self) -> CapturedSteps:
        """The steps as the last generation left them."""
        return CapturedSteps(self._graphs, self._state)

    @property
    def _judged(self) -> TreeNodes:
        """The tree of this round."""
        return self._draft.nodes

    @property
    def _verifiable(self) -> Sequence[TreeNodes]:
        """All for which there is a verification."""
        return [self._draft.nodes]

    def _named(self, step: str, nodes: TreeNodes) -> str:
        """The step for `nodes`, where there are several of its kind."""
        return step

    def _logits_after(self, nodes: TreeNodes) -> Tensor:
        """[T, V] of a verification, until the next one."""
        self._run(self._named("verify", nodes), partial(self._verify, nodes))
        return self._logits[nodes.slots]

    # --- what they capture ---

    def _refresh(self) -> None:
        row = self._target.attention_row(self._draft.nodes.newest) if self._retriever.reads_attention else None
        self._kept = select_positions(row, *self._draft.context(), self._retriever.config)
        self._draft.refresh(*self._kept)

    def _verify(self, nodes: TreeNodes) -> None:
        self._logits[nodes.slots] = self._target.verify(nodes)

    def _accept(self, nodes: TreeNodes) -> None:
        cache = self._target.cache
        nodes.accept(self._chosen[: nodes.slots], cache.length)
        nodes.compact(cache.keys, cache.values)
        self._draft.follow(self._target)
        self._report.copy_(nodes.report, non_blocking=True)

    # --- building and capturing them ---

    def _build(self) -> None:
        """Make the captured parts, once the prefill has given the caches their buffers."""
        workspaces = Workspaces(self.device)
        with self._capturing():
            self._draft = self._drafter.captured(workspaces)
            slots = self._draft.nodes.slots
            self._target = FusedTarget(
                self._host_target.model, self._host_target.cache, workspaces, slots, self._drafter.tap
            )
        self._chosen = torch.zeros(slots, dtype=torch.int64, device=self.device)
        report, cuda = self._draft.nodes.report, self.device.type == "cuda"
        self._report = torch.zeros(len(report), dtype=report.dtype, pin_memory=cuda)  # where the host reads it

    def _begin(self, first: Tensor) -> None:
        self._draft.require(self._reserved.tokens)
        self._rebind()
        self._target.begin(self._host_target.last_queries())
        self._draft.begin(first)

    @property
    def _state(self) -> list[Tensor]:
        """What a round changes besides keys and values that nobody attends to yet."""
        return [*self._draft.state, self._target.cache.length]

    @property
    def _is_current(self) -> bool:
        return self._target.cache.is_current and self._draft.is_current

    def _rebind(self) -> None:
        """Point at the caches' buffers, where one is new."""
        if self._is_current:
            return
        self._graphs = {}  # before the buffers they point at
        self._target.rebind()
        self._draft.rebind()

    def _limit_span(self) -> bool:
        if not self._dense:
            return False
        before = self._target.span
        self._target.span = min(self._target.cache.capacity, span_for(self._reserved.tokens + self._slots.verify))
        return self._draft.limit_span(self._reserved.tokens) or self._target.span != before

    def _grow(self) -> None:
        """More room in every cache; what the device knows of their contents stays."""
        for cache in (self._target.cache, *self._draft.caches):
            cache.tell_host()
        self._reserved.grow(self._output.context)
        self._host_target.cache.require(self._reserved.tokens + self._slots.verify)
        self._drafter.require(self._reserved.tokens + self._slots.verify)
        self._draft.require(self._reserved.tokens)
        self._rebind()
        self._recapture()

    def _recapture(self) -> None:
        """Capture the steps, unless what is captured still holds."""
        if self._limit_span() or not self._graphs:
            self._capture()

    def _capture(self) -> None:
        """Run every step once, so that all kernels are there, then capture it; the caches' contents stay."""
        self._graphs = {}
        if self.device.type != "cuda":
            return
        pool = torch.cuda.graph_pool_handle()  # the steps run one after the other and share their memory

        def run(name: str, step: Step) -> None:
            step()

        def capture(name: str, step: Step) -> None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                step()
            self._graphs[name] = graph.replay

        with self._capturing():
            for handle in (run, capture):
                with unchanged(*self._state):
                    self._each_step(handle)

    def _each_step(self, handle: Run) -> None:
        """Let `handle` have every step that a round may need."""
        if self._retriever.is_due(0, 0):  # a draft that keeps everything is never refreshed
            handle("refresh", self._refresh)
        self._draft.draft(handle, every_level=True)
        self._each_verdict(handle)

    def _each_verdict(self, handle: Run) -> None:
        handle("verify", partial(self._verify, self._draft.nodes))
        handle("accept", partial(self._accept, self._draft.nodes))

    def _run(self, name: str, step: Step) -> None:
        """Replay a step; run it as it is where nothing is captured."""
        self._graphs.get(name, step)()

    def _capturing(self) -> AbstractContextManager[None]:
        """What is inside counts as the output's `capture_s`, up to the end of what it gave the device to do."""
        return self._output.setting_up(self._synchronise)

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()


class CapturedSteps:
    """Captured steps one by one, for measurements; `restore` undoes what running them did to lengths and verdicts."""

    def __init__(self, graphs: dict[str, Step], state: list[Tensor]):
        self._graphs, self._state = graphs, state
        self._saved = [value.clone() for value in state]

    def names(self) -> list[str]:
        """In the order of a round, "refresh" first where there is one."""
        return list(self._graphs)

    def run(self, name: str) -> None:
        self._graphs[name]()

    @torch.inference_mode()
    def restore(self) -> None:
        for value, old in zip(self._state, self._saved, strict=True):
            value.copy_(old)


def tree_of(nodes: TreeNodes) -> DraftTree:
    """The nodes in use as a tree of their own, copied; the host waits."""
    used = nodes.used.bool()
    places = torch.cumsum(used.long(), 0) - 1
    parents = nodes.parents.long()[used]
    return DraftTree.from_parents(nodes.tokens[used], torch.where(parents >= 0, places[parents.clamp(min=0)], -1))

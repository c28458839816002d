"""What a person sees of a run: progress, the text with its tokens coloured, and the figures side by side."""

from __future__ import annotations

import json
import statistics
import threading
import time
from collections.abc import Callable
from itertools import count

from rich.console import Console, RenderableType
from rich.markup import escape

from specextend.config import SamplingConfig, TreeConfig
from specextend.data.encoded import EncodedPrompt
from specextend.decoding.output import Generation, Output, Round
from specextend.decoding.text import TextStream
from specextend.engine import SpecExtend
from specextend.evaluation.plan import WARM_UP_NEW_TOKENS
from specextend.evaluation.terminal import Column, PlainConsole, fitted_table
from specextend.evaluation.workers import warm
from specextend.methods import name_of

DRAFT_STYLE, TARGET_STYLE = "green", "bold yellow"
QUIET_S = 30.0  # without a terminal: seconds between lines that say what goes on


class ConsoleReporter:
    """Tells of generations on the terminal; progress goes to stderr, results to stdout.

    Args:
        verbose: stream the text as rounds finish.
        result_line: end each result with a line of JSON.
    """

    def __init__(self, *, verbose: bool, result_line: bool):
        self._verbose, self._result_line = verbose, result_line
        self._out, self._err = PlainConsole(), PlainConsole(stderr=True)
        self._out.soft_wrap = not self._out.is_terminal

    def busy(self, what: str) -> Busy:
        """Says what goes on while something long runs."""
        return Busy(self._err, what)

    def introduce(self, engine: SpecExtend, sampling: SamplingConfig) -> None:
        models, config = engine.models, engine.config
        source = f" ({models.target_id})" if models.preset.wheel else ""  # there are two places it may come from
        self._out.print(
            f"[bold]{escape(models.name)}[/]{escape(source)} on {models.device}, "
            f"{str(models.dtype).removeprefix('torch.')}, {getattr(engine, 'backend', 'eager')}; "
            f"draft {escape(models.draft_id or 'none')}"
        )
        on = {True: "on", False: "off"}
        self._out.print(
            f"{name_of(config)}: flash prefill {on[config.flash_prefill]}, "
            f"hybrid tree attention {on[config.hybrid_tree_attention]}, draft cache {config.draft_cache}; "
            f"{_shown(config.tree)}; "
            + ("greedy" if sampling.temperature == 0 else f"temperature {sampling.temperature}, seed {sampling.seed}")
        )

    def answer(self, prompt: EncodedPrompt, methods: dict[str, Callable[..., Generation]], **request) -> None:
        """Run every method on `prompt`, show the last one's text and the figures of all.

        Several methods are warmed up on the prompt, and timed twice, there and back again, so that a machine that
        slows down slows all of them.
        """
        cut = f", cut from {prompt.original_tokens}" if prompt.original_tokens > len(prompt.ids) else ""
        self._out.print(f"\n[bold]prompt[/] {escape(prompt.source)}: {len(prompt.ids)} tokens{cut}")
        shown = list(methods)[-1]
        runs: dict[str, list[Generation]] = {name: [] for name in methods}
        for name in [*methods, *reversed(methods)] if len(methods) > 1 else methods:
            streams = self._verbose and name == shown and not runs[name]
            if len(methods) > 1 and not runs[name]:
                self._warm_up(name, methods[name], prompt, request)
            runs[name].append(self._follow(name, methods[name], prompt, streams, request))
        if not self._verbose:
            self._out.print(runs[shown][0].text, markup=False)
        self._out.print()
        if len(methods) > 1:
            self._out.print(f"The text above as each method wrote it; speedup: over {[*methods][0]}.", style="dim")
            self._out.print(_figures(runs, self._out.width), soft_wrap=False)
        else:
            self._out.print(_one_line(shown, runs[shown][0]))
        if self._result_line:
            for name, done in runs.items():
                print(json.dumps({"method": name, "source": prompt.source} | _summary(done)))

    def _warm_up(self, name: str, generate, prompt: EncodedPrompt, request: dict) -> None:
        new_tokens = min(WARM_UP_NEW_TOKENS, request["max_new_tokens"])
        with self.busy(f"{name}: warming up on {len(prompt.ids)} tokens"):
            generate(prompt.ids, **request | {"max_new_tokens": new_tokens})

    def _follow(self, name: str, generate, prompt: EncodedPrompt, streams: bool, request: dict) -> Generation:
        if streams:
            return self._stream(name, generate, prompt, request)
        with self.busy(f"{name}: reading {len(prompt.ids)} tokens") as busy:

            def on_round(output: Output, round_: Round | None) -> None:
                busy.update(f"{name}: {output.new_tokens} of {output.max_new_tokens} tokens")

            tries = count()

            def once() -> Generation:
                again = next(tries)
                apart = {"prefix_scope": f"again {again}"} if again else {}  # its prefill shall be a whole one, too
                return generate(prompt.ids, on_round=on_round, **apart, **request)

            return warm(once)

    def _stream(self, name: str, generate, prompt: EncodedPrompt, request: dict) -> Generation:
        """A generation whose text is printed as it comes."""
        text: TextStream | None = None
        with self.busy(f"{name}: reading {len(prompt.ids)} tokens") as busy:

            def on_round(output: Output, round_: Round | None) -> None:
                nonlocal text
                busy.stop()
                text = text or TextStream(output.decode, output.stop)
                self._print_round(text, output, round_)

            result = generate(prompt.ids, on_round=on_round, **request)
        self._out.print()
        if self._out.color_system:
            legend = f"[{DRAFT_STYLE}]accepted draft tokens[/], [{TARGET_STYLE}]the target's own[/]"
            self._out.print(f"\n{legend}", end="")
        return result

    def _print_round(self, stream: TextStream, output: Output, round_: Round | None) -> None:
        """The round's text: its accepted draft tokens in one colour, the target's token in the other."""
        accepted = round_.accepted if round_ else 0
        own = len(round_.tokens) - accepted if round_ else 1
        before_own = output.token_ids[: output.new_tokens - own]
        pieces = [(stream.push(before_own), DRAFT_STYLE)] if accepted else []
        pieces.append((stream.push(output.token_ids, last=output.finished), TARGET_STYLE))
        for text, style in pieces:
            self._out.print(text, style=style, end="", markup=False)


def _shown(tree: TreeConfig) -> str:
    if tree.rule == "price":
        branch = ", one branch looked up in the text" * tree.lookup_branch
        return f"trees priced by their time, at most {tree.nodes} nodes, depth {tree.max_depth}{branch}"
    return f"tree of {tree.nodes} nodes, depth {tree.max_depth}, threshold {tree.threshold}"


def _one_line(name: str, result: Generation) -> str:
    known = f" ({result.cached_tokens} prompt tokens were known)" if result.cached_tokens else ""
    return (
        f"[bold]{name}[/]: {result.new_tokens} tokens ({result.finish_reason}), "
        f"{result.accepted_per_round:.2f} draft tokens accepted per round, {result.tokens_per_round:.2f} tokens per "
        f"round; prefill {result.ttft_s:.2f} s{known}, then {result.decode_tokens_per_s:.1f} tokens/s "
        f"({result.tokens_per_s:.1f} end to end)"
    ) + (f"; {_priced(result)}" if result.price else "")


def _priced(result: Generation) -> str:
    return (
        f"price {result.price:.0f} tokens/s, {result.nodes_per_round:.1f} nodes per round, {result.plain_share:.0%} of "
        "the rounds without speculation"
    )


def _figures(runs: dict[str, list[Generation]], width: int) -> RenderableType:
    """The methods side by side, the runs of each pooled; speedups are against the first of them."""
    figures = {name: _summary(done) for name, done in runs.items()}
    first, done_first = next(iter(figures.values())), next(iter(runs.values()))

    def column(heading: str, cell: Callable[[dict], str], rank: int = 0) -> Column:
        return Column(heading, [cell(one) for one in figures.values()], rank)

    same = [all(one.token_ids == done_first[0].token_ids for one in done) for done in runs.values()]
    columns = [
        Column("", list(figures), left=True),
        column("new tokens", lambda one: str(one["new_tokens"]), 5),
        column("accepted per round", lambda one: f"{one['accepted_per_round']:.2f}"),
        column("tokens per round", lambda one: f"{one['tokens_per_round']:.2f}", 4),
        column("prefill s", lambda one: f"{one['ttft_s']:.2f}", 3),
        column("decode tok/s", lambda one: f"{one['decode_tokens_per_s']:.1f}", 1),
        column("overall tok/s", lambda one: f"{one['tokens_per_s']:.1f}", 2),
        column("speedup decode", lambda one: _over(one["decode_tokens_per_s"], first["decode_tokens_per_s"])),
        column("speedup overall", lambda one: _over(one["tokens_per_s"], first["tokens_per_s"])),
        Column("same tokens", ["yes" if equal else "NO" for equal in same]),
    ]
    return fitted_table(columns, width)


def _over(value: float, baseline: float) -> str:
    return f"{value / baseline:.2f}x" if baseline else "-"


def _summary(runs: list[Generation]) -> dict:
    """The figures of a method's runs on one prompt, rates over all of them, for a line of JSON."""
    result = runs[0]
    decode_s, total_s = (sum(getattr(one, name) for one in runs) for name in ("decode_s", "total_s"))
    return {
        "prompt_tokens": result.prompt_tokens,
        "new_tokens": result.new_tokens,
        "finish_reason": result.finish_reason,
        "rounds": len(result.rounds),
        "accepted_per_round": round(result.accepted_per_round, 4),
        "tokens_per_round": round(result.tokens_per_round, 4),
        "ttft_s": round(statistics.fmean(one.ttft_s for one in runs), 4),
        "decode_tokens_per_s": round(sum(one.new_tokens - 1 for one in runs) / decode_s, 2) if decode_s else 0.0,
        "tokens_per_s": round(sum(one.new_tokens for one in runs) / total_s, 2) if total_s else 0.0,
        "text": result.text,
    }


class Busy:
    """What goes on, as a spinner; without a terminal as a line on stderr every `QUIET_S` seconds."""

    def __init__(self, console: Console, text: str):
        self._text, self._console, self._began = text, console, time.monotonic()
        self._status = console.status(escape(text)) if console.is_terminal else None
        self._ended = threading.Event()

    def __enter__(self) -> Busy:
        if self._status:
            self._status.start()
        else:
            threading.Thread(target=self._tell, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def update(self, text: str) -> None:
        self._text = text
        if self._status:
            self._status.update(escape(text))

    def stop(self) -> None:
        """Say no more; safe to call again."""
        self._ended.set()
        if self._status:
            self._status.stop()

    def _tell(self) -> None:
        while not self._ended.wait(QUIET_S):
            seconds = time.monotonic() - self._began
            self._console.print(f"{self._text}, {seconds:.0f} s so far", markup=False, soft_wrap=True)

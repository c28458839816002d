"""What a person sees of a run: progress, the text with its tokens coloured, and the figures side by side."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from specextend.cli.flags import console
from specextend.config import SamplingConfig
from specextend.data.encoded import EncodedPrompt
from specextend.decoding.output import Generation, Output, Round
from specextend.decoding.text import TextStream
from specextend.engine import SpecExtend
from specextend.methods import name_of

DRAFT_STYLE, TARGET_STYLE = "green", "bold yellow"


class ConsoleReporter:
    """Tells of generations on the terminal; progress goes to stderr, results to stdout.

    Args:
        verbose: stream the text as rounds finish.
        result_line: end each result with a line of JSON.
    """

    def __init__(self, *, verbose: bool, result_line: bool):
        self._verbose, self._result_line = verbose, result_line
        self._out, self._err = console(), console(stderr=True)

    def busy(self, what: str) -> AbstractContextManager:
        """A spinner while something long runs."""
        return self._err.status(escape(what))

    def introduce(self, engine: SpecExtend, sampling: SamplingConfig) -> None:
        models, config = engine.models, engine.config
        self._out.print(
            f"[bold]{escape(models.name)}[/] on {models.device}, {str(models.dtype).removeprefix('torch.')}; "
            f"draft {escape(str(models.draft_id))}"
        )
        on = {True: "on", False: "off"}
        self._out.print(
            f"{name_of(config)}: flash prefill {on[config.flash_prefill]}, "
            f"hybrid tree attention {on[config.hybrid_tree_attention]}, draft cache {config.draft_cache}; "
            f"tree of {config.tree.nodes} nodes, depth {config.tree.max_depth}, threshold {config.tree.threshold}; "
            + ("greedy" if sampling.temperature == 0 else f"temperature {sampling.temperature}, seed {sampling.seed}")
        )

    def answer(self, prompt: EncodedPrompt, methods: dict[str, Callable[..., Generation]], **request) -> None:
        """Run every method on `prompt`, show the last one's text and the figures of all."""
        cut = f", cut from {prompt.original_tokens}" if prompt.original_tokens > len(prompt.ids) else ""
        self._out.print(f"\n[bold]prompt[/] {escape(prompt.source)}: {len(prompt.ids)} tokens{cut}")
        results = {}
        for name, generate in methods.items():
            shown = self._verbose and name == list(methods)[-1]
            results[name] = self._follow(name, generate, prompt, shown, request)
        if not self._verbose:
            self._out.print(results[name].text, markup=False)
        self._out.print(_figures(results) if len(results) > 1 else "\n" + _one_line(name, results[name]))
        if self._result_line:
            for name, result in results.items():
                print(json.dumps({"method": name, "source": prompt.source} | _summary(result)))

    def _follow(self, name, generate, prompt: EncodedPrompt, shown: bool, request: dict) -> Generation:
        tokenizer_text: TextStream | None = None
        with self._err.status(f"{name}: reading {len(prompt.ids)} tokens") as status:

            def on_round(output: Output, round_: Round | None) -> None:
                nonlocal tokenizer_text
                if not shown:
                    status.update(f"{name}: {output.new_tokens} of {output.max_new_tokens} tokens")
                    return
                status.stop()
                tokenizer_text = tokenizer_text or TextStream(output.decode, output.stop)
                self._print_round(tokenizer_text, output, round_)

            result = generate(prompt.ids, on_round=on_round, **request)
        if shown:
            self._out.print(f"\n\n[{DRAFT_STYLE}]accepted draft tokens[/], [{TARGET_STYLE}]the target's own[/]", end="")
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


def _one_line(name: str, result: Generation) -> str:
    return (
        f"[bold]{name}[/]: {result.new_tokens} tokens ({result.finish_reason}), "
        f"{result.accepted_per_round:.2f} draft tokens accepted per round, {result.tokens_per_round:.2f} tokens per "
        f"round; prefill {result.ttft_s:.2f} s, then {result.decode_tokens_per_s:.1f} tokens/s "
        f"({result.tokens_per_s:.1f} end to end)"
    )


def _figures(results: dict[str, Generation]) -> Table:
    """The methods side by side; speedups are against the first of them."""
    baseline = next(iter(results.values()))
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for column in (
        "new\ntokens",
        "accepted\n/round",
        "tokens\n/round",
        "prefill\ns",
        "decode\ntok/s",
        "overall\ntok/s",
        "speedup\ndecode",
        "speedup\noverall",
        "same\ntokens",
    ):
        table.add_column(column, justify="right", no_wrap=True)
    for name, result in results.items():
        table.add_row(
            name,
            str(result.new_tokens),
            f"{result.accepted_per_round:.2f}",
            f"{result.tokens_per_round:.2f}",
            f"{result.ttft_s:.2f}",
            f"{result.decode_tokens_per_s:.1f}",
            f"{result.tokens_per_s:.1f}",
            f"{_over(result.decode_tokens_per_s, baseline.decode_tokens_per_s)}",
            f"{_over(result.tokens_per_s, baseline.tokens_per_s)}",
            "yes" if result.token_ids == baseline.token_ids else "NO",
        )
    return table


def _over(value: float, baseline: float) -> str:
    return f"{value / baseline:.2f}x" if baseline else "-"


def _summary(result: Generation) -> dict:
    """The figures of a generation, for a line of JSON."""
    return {
        "prompt_tokens": result.prompt_tokens,
        "new_tokens": result.new_tokens,
        "finish_reason": result.finish_reason,
        "rounds": len(result.rounds),
        "accepted_per_round": round(result.accepted_per_round, 4),
        "tokens_per_round": round(result.tokens_per_round, 4),
        "ttft_s": round(result.ttft_s, 4),
        "decode_tokens_per_s": round(result.decode_tokens_per_s, 2),
        "tokens_per_s": round(result.tokens_per_s, 2),
        "text": result.text,
    }

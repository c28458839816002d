"""A recorded race as an animated SVG, for pages that run no scripts: the lanes' texts appear as fast as they came.

CSS keyframes alone move it, in a loop; where motion is not wanted, the end is shown. Text is placed by character cells
of fixed width, so that it looks the same in every monospaced font.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from itertools import accumulate, groupby
from typing import Any

from specextend.drafting.retrieval import num_chunks
from specextend.race.record import Lane, Race, Selection

WIDTH, MARGIN, GAP = 920, 24, 20
COLUMN = (WIDTH - 2 * MARGIN - 2 * GAP) / 3
PAD = 12  # inside a lane
CELL, LINE = 6.9, 17  # of a character at 11.5 px
TOP, HEAD, STRIP = 66, 78, 44  # above the lanes, a lane's head, its strip of chunks
STYLE = """
  svg { --paper: #fff; --panel: #f7f8f9; --ink: #1b1f24; --muted: #57606a; --rule: #d5dae0; --idle: #dfe3e8;
    --draft: #00568f; --own: #963b00; }
  @media (prefers-color-scheme: dark) {
    svg { --paper: #14171a; --panel: #1b1f23; --ink: #e4e7ea; --muted: #9ea7b1; --rule: #363c43; --idle: #2c3238;
      --draft: #7fc4f3; --own: #f2a86b; }
  }
  text { font: 13px system-ui, -apple-system, "Segoe UI", "Liberation Sans", sans-serif; fill: var(--ink); }
  .m { font: 11.5px ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; white-space: pre; }
  .t { font-weight: 600; font-size: 16px; } .b { font-weight: 600; font-size: 14px; } .q { fill: var(--muted); }
  .n { font: 600 17px ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
  .d { fill: var(--draft); } .o { fill: var(--own); } .u { stroke: var(--draft); stroke-width: 1.2; }
  .gone { opacity: 0; }
"""


def race_svg(race: Race, environment: dict[str, Any], *, hold_s: float = 4.0) -> str:
    """The whole animation; it lasts as long as the slowest lane and `hold_s` seconds, and begins again."""
    clock = Clock(max(lane.total_s for lane in race.lanes), hold_s)
    columns = int((COLUMN - 2 * PAD) / CELL)
    texts = [list(runs(lane, race.prompt_end, columns)) for lane in race.lanes]
    lines = 1 + max(run.line for text in texts for run in text)
    body = TOP + HEAD + lines * LINE + 14
    height = body + STRIP + 84
    parts = [_head(race, environment, height)]
    for index, (lane, text) in enumerate(zip(race.lanes, texts, strict=True)):
        left = MARGIN + index * (COLUMN + GAP)
        parts += [_box(left, body + STRIP - TOP), *_figures(lane, race, left, clock), *_text(lane, text, left, clock)]
        parts += _strip(lane, race, left + PAD, body, clock)
    parts += _foot(race, height, clock)
    title = f"<title>{escape(_summary(race))}</title>"
    style = f"<style>{STYLE}{clock.css()}</style>"
    frame = f'xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"'
    return f'<svg {frame} role="img">\n{title}\n{style}\n' + "\n".join(parts) + "\n</svg>\n"


class Clock:
    """The animation's time: classes for what appears, disappears or grows at given seconds of the race."""

    def __init__(self, race_s: float, hold_s: float):
        self.race_s, self._period = race_s, race_s + hold_s
        self._rules: dict[str, str] = {}

    def from_(self, second: float) -> str:
        """Class of what appears at `second` and stays."""
        return self._animate(f"a{self._mark(second):.0f}", f"0%{{opacity:0}}{self._at(second)}{{opacity:1}}")

    def until(self, second: float, since: float = 0.0) -> str:
        """Class of what is there from `since` until `second`; add `gone`, for where nothing moves."""
        frames = f"0%{{opacity:{int(not since)}}}{self._at(since)}{{opacity:1}}{self._at(second)}{{opacity:0}}"
        return self._animate(f"w{self._mark(since):.0f}-{self._mark(second):.0f}", frames)

    def growing(self, name: str, points: list[tuple[float, float]]) -> str:
        """Class of what is scaled from the left through (second, part) points."""
        frames = "".join(f"{self._at(second)}{{transform:scaleX({part:.3f})}}" for second, part in points)
        self._rules[name] = f"@keyframes {name}{{0%{{transform:scaleX(0)}}{frames}100%{{transform:none}}}}" + (
            f".{name}{{animation:{name} {self._period:.2f}s linear infinite}}"
        )
        return name

    def css(self) -> str:
        calm = "@media (prefers-reduced-motion: reduce) { * { animation: none !important; } }"
        return "\n".join(self._rules.values()) + "\n" + calm

    def _animate(self, name: str, frames: str) -> str:
        self._rules[name] = (
            f"@keyframes {name}{{{frames}}}.{name}{{animation:{name} {self._period:.2f}s step-end infinite}}"
        )
        return name

    def _mark(self, second: float) -> float:
        return 1e4 * second / self._period

    def _at(self, second: float) -> str:
        return f"{self._mark(second) / 100:.2f}%"


@dataclass(frozen=True)
class Run:
    """Characters of one origin that come at once, in one line; step None is the prompt's end."""

    step: int | None
    drafted: bool
    line: int
    column: int
    text: str


def runs(lane: Lane, prompt_end: str, columns: int) -> Iterator[Run]:
    """The text of a lane behind the prompt's end, in lines of at most `columns` characters, broken at spaces."""
    marked = [(None, False, character) for character in f"… {prompt_end}"]
    for index, step in enumerate(lane.steps):
        for place, piece in enumerate(step.pieces):
            marked += [(index, place < step.accepted, character) for character in piece]
    for number, (begin, end) in enumerate(_lines("".join(mark[2] for mark in marked), columns)):
        column = 0
        for (step, drafted, _), group in groupby(marked[begin:end], lambda mark: (*mark[:2], mark[2] == " ")):
            text = "".join(mark[2] for mark in group)
            if text.strip():
                yield Run(step, drafted, number, column, text)
            column += len(text)


def _lines(text: str, columns: int) -> Iterator[tuple[int, int]]:
    """Where lines begin and end, newlines left out."""
    start = 0
    for line in text.split("\n"):
        end = start + len(line)
        while end - start > columns:
            space = text.rfind(" ", start + 1, start + columns + 1)
            cut = space if space > 0 else start + columns
            yield start, cut
            start = cut + (space > 0)
        yield start, end
        start = end + 1


def _head(race: Race, environment: dict[str, Any], height: float) -> str:
    hardware = environment["hardware"]
    where = hardware["gpu"] or f"{hardware['cores']} CPU cores"
    how = "greedy" if race.temperature == 0 else f"temperature {race.temperature}"
    detail = f"{race.model} pair, {race.dtype}, {where}, {how}; recorded one after the other, replayed in real time"
    return (
        f'<rect x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="10" fill="var(--paper)" '
        'stroke="var(--rule)"/>'
        f'<text class="t" x="{MARGIN}" y="32">One prompt of {race.prompt_tokens:,} tokens, the same '
        f"{len(race.lanes[0].token_ids)} tokens after it, three ways to decode them</text>"
        f'<text class="q" x="{MARGIN}" y="52">{escape(detail)}</text>'
    )


def _box(left: float, height: float) -> str:
    return (
        f'<rect x="{left:.1f}" y="{TOP}" width="{COLUMN:.1f}" height="{height}" rx="7" fill="var(--panel)" '
        'stroke="var(--rule)"/>'
    )


def _figures(lane: Lane, race: Race, left: float, clock: Clock) -> Iterator[str]:
    x, first = left + PAD, lane.steps[0].at_s
    rounds = len(lane.steps) - 1
    yield f'<text class="b" x="{x:.1f}" y="{TOP + 24}">{escape(lane.label)}</text>'
    turns = f"{rounds} {'steps' if lane.method == 'autoregressive' else 'rounds'}"
    right = left + COLUMN - PAD
    yield f'<text class="q {clock.from_(lane.total_s)}" x="{right:.1f}" y="{TOP + 24}" text-anchor="end">{turns}</text>'
    states = [(clock.until(first), f"reading {race.prompt_tokens:,} tokens")]
    states += [(clock.until(lane.total_s, first), "decoding")]
    for there, text in states:
        yield f'<text class="q gone {there}" x="{x:.1f}" y="{TOP + 60}">{text}</text>'
    made = list(accumulate(len(step.pieces) for step in lane.steps))
    points = [(step.at_s, count / made[-1]) for step, count in zip(lane.steps, made, strict=True)]
    kept = [(first, 0.0), *points[:: max(1, len(points) // 24)], points[-1]]
    width = COLUMN - 2 * PAD
    yield f'<rect x="{x:.1f}" y="{TOP + 33}" width="{width:.1f}" height="3" rx="1.5" fill="var(--idle)"/>'
    yield (
        f'<g transform="translate({x:.1f} {TOP + 33})"><rect class="{clock.growing(f"p-{lane.method}", kept)}" '
        f'width="{width:.1f}" height="3" rx="1.5" fill="var(--ink)"/></g>'
    )
    yield f'<g class="{clock.from_(lane.total_s)}"><text class="n" x="{x:.1f}" y="{TOP + 60}">'
    yield f"{lane.decode_tokens_per_s:.0f}</text>"
    accepted = "" if lane.method == "autoregressive" else f", {lane.accepted_per_round:.2f} accepted/round"
    after = x + 11 + 10.3 * len(f"{lane.decode_tokens_per_s:.0f}")
    yield f'<text class="q" x="{after:.1f}" y="{TOP + 60}">tokens/s{accepted}</text></g>'


def _text(lane: Lane, text: list[Run], left: float, clock: Clock) -> Iterator[str]:
    """The runs, a group per step."""
    for step, group in groupby(text, lambda run: run.step):
        drawn = "".join(_run(run, left + PAD) for run in group)
        yield drawn if step is None else f'<g class="{clock.from_(lane.steps[step].at_s)}">{drawn}</g>'


def _run(run: Run, left: float) -> str:
    x, y = left + run.column * CELL, TOP + HEAD + (run.line + 1) * LINE - 4
    origin = "q" if run.step is None else "d" if run.drafted else "o"
    width = len(run.text) * CELL
    line = f'<path class="u" d="M{x:.1f} {y + 3.5}h{width:.1f}"/>' if run.drafted else ""
    fit = f' textLength="{width:.1f}" lengthAdjust="spacingAndGlyphs"'
    return f'<text class="m {origin}" x="{x:.1f}" y="{y}"{fit}>{escape(run.text, quote=False)}</text>{line}'


def _strip(lane: Lane, race: Race, left: float, top: float, clock: Clock) -> Iterator[str]:
    """Chunks of prompt and output, those the draft reads standing up."""
    if lane.method == "autoregressive":
        yield f'<text class="q" x="{left:.1f}" y="{top + 30}">no draft</text>'
        return
    size = num_chunks(race.prompt_tokens + len(lane.token_ids), race.chunk_size)
    width = (COLUMN - 2 * PAD) / size
    yield f'<rect x="{left:.1f}" y="{top + 27}" width="{size * width:.1f}" height="4" fill="var(--idle)"/>'
    whole = [Selection(0, list(range(size)), size)]
    selections = race.selections if lane.method == "specextend" else whole
    if selections:
        read = f"the draft reads {len(selections[-1].chunks)} of {size} chunks"
        yield f'<text class="q {clock.from_(lane.steps[0].at_s)}" x="{left:.1f}" y="{top + 12}">{read}</text>'
    for index, selection in enumerate(selections):
        since = lane.steps[selection.round].at_s
        last = index + 1 == len(selections)
        there = clock.from_(since)
        if not last:
            there = f"gone {clock.until(lane.steps[selections[index + 1].round].at_s, since)}"
        cells = "".join(
            f"M{left + begin * width:.1f} {top + 18}h{count * width - 0.4:.1f}v13h-{count * width - 0.4:.1f}z"
            for begin, count in _stretches(selection.chunks)
        )
        yield f'<path class="{there}" fill="var(--draft)" d="{cells}"/>'


def _stretches(chunks: list[int]) -> Iterator[tuple[int, int]]:
    """First and number of chunks that follow one another."""
    for _, group in groupby(enumerate(chunks), lambda pair: pair[1] - pair[0]):
        stretch = [chunk for _, chunk in group]
        yield stretch[0], len(stretch)


def _foot(race: Race, height: float, clock: Clock) -> Iterator[str]:
    """What the colours mean, and a line of time with everyone's end on it."""
    left, right, y = MARGIN, WIDTH - MARGIN, height - 40
    span = right - left
    yield f'<path stroke="var(--rule)" stroke-width="2" d="M{left} {y}h{span}"/>'
    whole = clock.growing("clock", [(clock.race_s, 1.0)])
    moving = f'<rect class="{whole}" width="{span}" height="2" fill="var(--ink)"/>'
    yield f'<g transform="translate({left} {y - 1})">{moving}</g>'
    ends = sorted(race.lanes, key=lambda lane: lane.total_s)
    places = [left + span * lane.total_s / clock.race_s for lane in ends]
    for lane, x in zip(ends, places, strict=True):
        crowded = bisect_right(places, x + 150) - 1 > places.index(x)  # another ends soon after
        before = x > right - 170 or (crowded and x > left + 150)
        anchor, shift = ("end", -6) if before else ("start", 6)
        yield (
            f'<g class="{clock.from_(lane.total_s)}"><circle cx="{x:.1f}" cy="{y}" r="4" fill="var(--ink)"/>'
            f'<text x="{x + shift:.1f}" y="{y - 10}" text-anchor="{anchor}">{escape(lane.label)} '
            f'<tspan class="n" style="font-size:13px">{lane.total_s:.2f} s</tspan></text></g>'
        )
    same = "the three texts are the same" if race.differs_at is None else "THE TEXTS DIFFER"
    legend = y + 25
    yield (
        f'<text class="m d" x="{left}" y="{legend}">accepted draft token</text>'
        f'<path class="u" d="M{left} {legend + 3.5}h{20 * CELL:.1f}"/>'
        f'<text class="m o" x="{left + 23 * CELL:.1f}" y="{legend}">the target’s own token</text>'
        f'<text class="q" x="{right}" y="{legend}" text-anchor="end">time from the prompt on; {same}</text>'
    )


def _summary(race: Race) -> str:
    times = ", ".join(f"{lane.label} {lane.total_s:.2f} s" for lane in race.lanes)
    return f"The same {len(race.lanes[0].token_ids)} tokens after a prompt of {race.prompt_tokens:,}: {times}"

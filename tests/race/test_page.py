"""The replay of a race: nothing a model writes becomes markup, in the page or in the animation."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from scripts.report.race_svg import STYLE, race_svg, runs
from specextend.race.page import embedded, replay_page
from specextend.race.record import Lane, Race, Selection, Step

NASTY = ["</script>", "<b>", "<!--", "& \"quoted\" 'text' ", "漢\u2028", "{{race}}", "\\u003c", "\n  \U0001f469 end"]


def lane(method: str, steps: list[Step]) -> Lane:
    count = sum(len(step.pieces) for step in steps)
    return Lane(method, method.title(), list(range(count)), steps, 1.0, 10.0, steps[-1].at_s, "length")


@pytest.fixture
def race() -> Race:
    single = [Step(1.0 + 0.5 * index, [piece], 0) for index, piece in enumerate(NASTY)]
    rounds = [Step(0.5, NASTY[:1], 0), Step(1.0, NASTY[1:5], 3), Step(2.0, NASTY[5:], 2)]
    return Race(
        source="<i>notes</i>.txt", model="bundled", draft="bundled/draft", device="cpu", dtype="float32",
        prompt_tokens=300, original_tokens=1000, prompt_end="was <told>", max_new_tokens=8, temperature=0.0, seed=0,
        chunk_size=32, lanes=[lane("autoregressive", single), lane("standard", single), lane("specextend", rounds)],
        selections=[Selection(0, [0, 1, 9], 10)], differs_at=None,
    )  # fmt: skip


class Scripts(HTMLParser):
    """Text of every script element, and every tag there is."""

    def __init__(self, document: str):
        super().__init__()
        self.scripts: list[str] = []
        self.tags: list[str] = []
        self.frames: list[str] = []
        self._inside = False
        self.feed(document)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self._inside = tag == "script"
        if self._inside:
            self.scripts.append("")
        if tag == "iframe":
            self.frames.append(dict(attributes)["srcdoc"])

    def handle_endtag(self, tag):
        self._inside = False

    def handle_data(self, data):
        if self._inside:
            self.scripts[-1] += data


def test_page_holds_the_record_and_no_markup_of_it(race):
    page = Scripts(replay_page(race))
    data, program = page.scripts
    assert not set("<>&") & set(data), "nothing in it can end the element, or open a comment"
    assert json.loads(data) == json.loads(json.dumps(race.to_dict()))
    assert "innerHTML" not in program and "b" not in page.tags and "i" not in page.tags
    assert not re.search(r"(src|href)=|https?://(?!www\.w3\.org/2000/svg)", replay_page(race)), "it asks for nothing"


def test_embedded_page_is_the_page_in_a_frame_that_reaches_nothing(race):
    page = replay_page(race)
    frame = Scripts(embedded(page))
    assert frame.tags == ["iframe"] and frame.frames == [page]
    assert 'sandbox="allow-scripts"' in embedded(page)


ENVIRONMENT = {"hardware": {"gpu": None, "cores": 2}}


def test_animation_is_xml_without_scripts(race):
    drawing = ElementTree.fromstring(race_svg(race, ENVIRONMENT))
    kinds = {element.tag.rpartition("}")[2] for element in drawing.iter()}
    assert kinds == {"svg", "title", "style", "rect", "text", "tspan", "g", "path", "circle"}


def test_animation_shows_every_character_of_every_lane_where_it_belongs(race):
    for one in race.lanes:
        columns = 12
        grid: dict[tuple[int, int], str] = {}
        for run in runs(one, race.prompt_end, columns):
            for index, character in enumerate(run.text):
                assert run.column + index < columns and (run.line, run.column + index) not in grid
                grid[run.line, run.column + index] = character
        shown = "".join(grid[place] for place in sorted(grid))
        assert shown.replace(" ", "") == re.sub(r"[ \n]", "", f"… {race.prompt_end}{one.text}")


def test_animation_breaks_lines_at_spaces_and_long_words_where_they_must():
    steps = [Step(0.0, ["aaa bbb"], 0), Step(1.0, [" ccc ", "dddddddddd\n", "  e"], 2)]
    placed = {(run.line, run.column): run.text for run in runs(lane("specextend", steps), "", 7)}
    assert placed == {
        (0, 0): "…", (0, 2): "aaa", (1, 0): "bbb", (1, 4): "ccc", (2, 0): "ddddddd", (3, 0): "ddd", (4, 2): "e",
    }  # fmt: skip


def test_animation_shows_each_step_at_its_time(race):
    hold = 4.0
    drawing = ElementTree.fromstring(race_svg(race, ENVIRONMENT, hold_s=hold))
    (style,) = drawing.iter("{http://www.w3.org/2000/svg}style")
    rules = style.text.removeprefix(STYLE)
    period = max(one.total_s for one in race.lanes) + hold
    assert {float(number) for number in re.findall(r"([\d.]+)s (?:step-end|linear)", rules)} == {round(period, 2)}
    shown = {}
    for group in drawing.iter("{http://www.w3.org/2000/svg}g"):
        texts = [text.text for text in group if text.get("class") in ("m d", "m o")]
        if texts and group.get("class"):
            at = re.search(rf"@keyframes {group.get('class')}{{0%{{opacity:0}}([\d.]+)%", rules)
            shown.setdefault(float(at[1]) / 100 * period, []).append("".join(texts))
    for time, texts in ((0.5, ["</script>"]), (1.5, ["<b>", "<b>"])):
        (found,) = [shown[at] for at in shown if at == pytest.approx(time, abs=2e-3)]
        assert found == texts
    assert re.search(r"prefers-reduced-motion: reduce.*animation: none", rules)

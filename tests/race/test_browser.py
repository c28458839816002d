"""app.py in a browser: a race is run, replayed, stopped and watched by keyboard, on a desk and on a phone.

Needs Chromium (`apt-get install chromium`) and playwright; screenshots of every state are left in the test's folder.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("gradio")
sync_api = pytest.importorskip("playwright.sync_api")

ROOT = Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
PATIENCE_MS = 60_000


@pytest.fixture(scope="module")
def address(tmp_path_factory) -> Iterator[str]:
    """Of the page, served by `python app.py` with its defaults but for the port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("app") / "log"
    with log.open("w") as output:
        command = [sys.executable, str(ROOT / "app.py"), "--port", str(port)]
        server = subprocess.Popen(command, stdout=output, stderr=output, cwd="/", env=os.environ)
    url = f"http://127.0.0.1:{port}/"
    try:
        for _ in range(300):
            assert server.poll() is None, log.read_text()
            try:
                urllib.request.urlopen(url, timeout=1).close()
                break
            except (urllib.error.URLError, TimeoutError):
                time.sleep(0.2)
        yield url
    finally:
        server.terminate()
        server.wait(timeout=20)
    assert "Traceback" not in log.read_text(), log.read_text()


@pytest.fixture(scope="module")
def browser() -> Iterator:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, address, tmp_path):
    """visit(width, height, **options): the page in a window of its own; an error on it fails the test."""
    contexts, errors = [], []

    def open_(width: int = 1280, height: int = 1500, **options):
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE_MS)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(address)
        page.get_by_role("button", name="Start the race").wait_for()
        return page

    yield open_
    for context in contexts:
        context.close()
    assert not errors


def start(page, prompt: str = "512", new_tokens: int = 16) -> None:
    page.get_by_role("radio", name=prompt, exact=True).check()
    field = page.get_by_role("spinbutton", name="New tokens")
    field.fill(str(new_tokens))
    field.press("Tab")
    page.get_by_role("button", name="Start the race").click()


def replay(page):
    """The finished race's frame."""
    frame = page.frame_locator("iframe.replay")
    frame.locator(".lane").first.wait_for()
    return frame


def texts(frame) -> list[str]:
    """What is shown of each lane's output."""
    return [
        lane.evaluate("lane => [...lane.querySelectorAll('.text > .on')].map(span => span.textContent).join('')")
        for lane in frame.locator(".lane").all()
    ]


def at_the_end(frame) -> None:
    frame.get_by_role("button", name="Replay").wait_for()


def test_race_is_run_and_replayed_with_three_equal_texts(visit, tmp_path, bundled_engine):
    from specextend.race.documents import read_prompt

    page = visit()
    start(page, new_tokens=32)
    frame = replay(page)
    page.wait_for_timeout(400)
    page.screenshot(path=tmp_path / "replaying.png")
    at_the_end(frame)
    expected = bundled_engine.autoregressive(read_prompt(bundled_engine, None, 512).ids, 32)
    assert texts(frame) == [expected.text] * 3
    assert "identical, token for token" in frame.locator("#verdict").inner_text()
    assert frame.locator(".lane[data-method=specextend] .draft.on").count() > 5
    assert frame.locator(".lane[data-method=autoregressive] .draft").count() == 0
    assert "17 of 17 chunks" in frame.locator("#strips").inner_text()
    page.screenshot(path=tmp_path / "over.png")


def test_replay_obeys_the_keyboard(visit):
    page = visit()
    start(page)
    frame = replay(page)
    at_the_end(frame)
    button = frame.locator("#play")
    frame.get_by_role("radio", name="a quarter of real time").check()
    button.focus()
    page.keyboard.press("Enter")
    assert button.inner_text() == "Pause"
    page.keyboard.press("Space")
    assert button.inner_text() == "Play"
    shown = [len(text) for text in texts(frame)]
    page.wait_for_timeout(300)
    assert [len(text) for text in texts(frame)] == shown, "a paused replay stands still"
    page.keyboard.press("Tab")
    assert page.frames[-1].evaluate("document.activeElement.name") == "speed"
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.frames[-1].evaluate("document.querySelector('input[name=speed]:checked').value") == "4"
    frame.locator("#scrub").focus()
    page.keyboard.press("End")
    at_the_end(frame)
    page.keyboard.press("Home")
    assert texts(frame) == ["", "", ""]
    button.focus()
    page.keyboard.press("Space")
    at_the_end(frame)
    assert len(set(texts(frame))) == 1 and texts(frame)[0]
    assert "race is over" in frame.get_by_role("status").inner_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_phone_shows_all_without_scrolling_sideways(visit, tmp_path, scheme):
    page = visit(375, 812, color_scheme=scheme, has_touch=True)
    start(page)
    frame = replay(page)
    at_the_end(frame)
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    inner = frame.locator("html").evaluate("page => [page.scrollWidth, innerWidth, page.scrollHeight, innerHeight]")
    assert inner[0] <= inner[1] and inner[2] <= inner[3], "the frame is as large as what is in it"
    assert frame.locator("html").get_attribute("data-theme") == scheme
    lefts = {round(lane.bounding_box()["x"]) for lane in frame.locator(".lane").all()}
    assert len(lefts) == 1, "lanes stack"
    frame.locator("#title").scroll_into_view_if_needed()
    page.screenshot(path=tmp_path / f"phone-{scheme}.png")


def test_race_can_be_cancelled_and_another_run(visit):
    page = visit()
    start(page, "8,192", 512)
    page.get_by_text("reading").wait_for()
    page.get_by_role("button", name="Cancel").click()
    page.get_by_text("The race was cancelled.").wait_for()
    start(page)
    at_the_end(replay(page))


def test_uploaded_document_is_raced_on_and_its_text_is_no_markup(visit, tmp_path):
    document = tmp_path / "notes <i>.txt"
    document.write_text("</script><b>bold</b> & \u2028 " * 60, encoding="utf-8")
    page = visit()
    page.get_by_role("radio", name="A file of mine").check()
    page.locator("input[type=file]").set_input_files(document)
    page.get_by_text("notes").first.wait_for()
    start(page)
    frame = replay(page)
    at_the_end(frame)
    assert "notes" in frame.locator("#title").inner_text() and frame.locator("b", has_text="bold").count() == 0
    assert len(set(texts(frame))) == 1


def test_missing_document_is_said_in_a_line(visit):
    page = visit()
    page.get_by_role("radio", name="A file of mine").check()
    start(page)
    alert = page.get_by_role("alert")
    alert.wait_for()
    assert "no file was uploaded" in alert.inner_text() and "\n" not in alert.inner_text()


def test_replay_is_saved_as_a_page_of_its_own_which_moves_only_where_motion_is_wanted(visit, tmp_path, browser):
    page = visit()
    start(page)
    at_the_end(replay(page))
    with page.expect_download() as download:
        page.get_by_text("Save the replay").click()
    download.value.save_as(tmp_path / "saved.html")
    for motion, said in (("no-preference", "The race is over."), ("reduce", "")):
        alone = browser.new_page(reduced_motion=motion)
        alone.goto((tmp_path / "saved.html").as_uri())
        at_the_end(alone)
        assert "identical" in alone.locator("#verdict").inner_text() and len(set(texts(alone))) == 1
        assert alone.get_by_role("status").inner_text().startswith(said)
        assert bool(said) == bool(alone.get_by_role("status").inner_text()), "without motion nothing was played"
        alone.close()

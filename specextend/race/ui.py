"""The page around the replay: the choice of a document, the race's progress, and a way to cancel it."""

from __future__ import annotations

import html
import os
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported

import gradio as gr

from specextend.config import SamplingConfig
from specextend.errors import ConfigError, SpecExtendError
from specextend.race.documents import BUILTIN, MAX_BYTES, SUFFIXES, read_prompt
from specextend.race.page import embedded, replay_page
from specextend.race.record import Progress, Race, Racetrack

UPLOAD = "A file of mine"
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
CPU_LENGTH = 8192  # beyond it, standard decoding's dense prefill takes minutes and gigabytes on a CPU
NEW_TOKENS = (16, 512)
POLL_S = 0.25  # between two reports of a running race
STYLE = Path(__file__).with_name("page.css")
# The replay tells its height and is told whether the page is dark; when it is new, it is brought into sight.
SCRIPT = """
<script>
addEventListener("message", (event) => {
  const frame = [...document.querySelectorAll("iframe.replay")].find((one) => one.contentWindow === event.source);
  if (!frame || event.data?.race !== "height") return;
  frame.style.height = `${Math.min(Number(event.data.height) || 0, 20000) + 2}px`;
  if (!frame.dataset.seen) frame.scrollIntoView({ block: "start", behavior: "instant" });
  frame.dataset.seen = true;
  const theme = document.body.classList.contains("dark") ? "dark" : "light";
  event.source.postMessage({ theme }, "*");
});
</script>
"""


def serve(track: Racetrack, host: str, port: int) -> None:
    """Show the page until it is interrupted."""
    if not 1 <= port <= 65535:
        raise ConfigError(f"port is {port}; it must lie in 1 .. 65535")
    with tempfile.TemporaryDirectory() as folder:
        try:
            build(RaceQueue(track, Path(folder))).launch(
                server_name=host, server_port=port, max_file_size=MAX_BYTES, show_error=True, footer_links=[],
                theme=_theme(), css_paths=STYLE, head=SCRIPT, ssr_mode=False,
            )  # fmt: skip
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {host}, port {port} ({error}); choose another --host or --port"
            ) from error


class RaceCancelled(Exception):
    """The race was cancelled, or the page that asked for it is gone."""


class RaceQueue:
    """Runs races one at a time, in the order of arrival, and ends those that are cancelled.

    Args:
        folder: where replays are written for download.
    """

    def __init__(self, track: Racetrack, folder: Path):
        self.track, self._folder = track, folder
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._cancelled: dict[str, threading.Event] = {}

    def race(
        self, session: str, path: Path | None, length: int, new_tokens: int, sampling: SamplingConfig
    ) -> Iterator[Progress | Race]:
        """Yields the `Progress` of a race every `POLL_S`, and at last the `Race`.

        `cancel` makes it raise `RaceCancelled` at once; the race itself ends after the step it is in.
        """
        cancelled = self._cancelled[session] = threading.Event()
        latest = Progress("Waiting for another race", None, new_tokens)

        def report(progress: Progress) -> None:
            nonlocal latest
            if cancelled.is_set():
                raise RaceCancelled
            latest = progress

        def run() -> Race:
            report(Progress("Reading the document", None, new_tokens))
            return self.track.run(read_prompt(self.track.engine, path, length), new_tokens, sampling, report)

        future: Future[Race] = self._thread.submit(run)
        try:
            yield latest
            while not future.done() and not cancelled.wait(POLL_S):
                yield latest
            if cancelled.is_set():
                raise RaceCancelled
            yield future.result()
        finally:
            cancelled.set()  # the page may be gone
            future.cancel()
            if self._cancelled.get(session) is cancelled:
                del self._cancelled[session]

    def cancel(self, session: str) -> None:
        """Cancel the session's race, if there is one."""
        if (cancelled := self._cancelled.get(session)) is not None:
            cancelled.set()

    def save(self, page: str, session: str) -> Path:
        path = self._folder / session / "specextend-race.html"
        path.parent.mkdir(exist_ok=True)
        path.write_text(page, encoding="utf-8")
        return path


def build(races: RaceQueue) -> gr.Blocks:
    """The page."""
    engine = races.track.engine
    with gr.Blocks(title="SpecExtend: a race", analytics_enabled=False) as page:
        gr.HTML(_introduction(engine.models.name, str(engine.models.draft_id), str(engine.models.device)))
        with gr.Row(equal_height=True):
            with gr.Column(scale=3, min_width=280):
                document = gr.Radio([BUILTIN, UPLOAD], value=BUILTIN, label="Document")
            with gr.Column(scale=3, min_width=280):
                choices = lengths(engine.limit, engine.models.device.type)
                length = gr.Radio(
                    [(f"{one:,}", one) for one in choices], value=min(4096, choices[-1]), label="Prompt, tokens"
                )
            with gr.Column(scale=2, min_width=220):
                new_tokens = gr.Slider(*NEW_TOKENS, value=128, step=16, label="New tokens")
            with gr.Column(scale=2, min_width=220):
                temperature = gr.Slider(0, 1.5, value=0, step=0.1, label="Temperature")
        upload = gr.File(
            label=f"{', '.join(SUFFIXES)}, at most {MAX_BYTES // 2**20} MB", file_types=list(SUFFIXES),
            type="filepath", visible=False, height=150, elem_id="upload",
        )  # fmt: skip
        with gr.Row(elem_classes="actions"):
            start = gr.Button("Start the race", variant="primary", scale=0, min_width=170, elem_id="start")
            cancel = gr.Button("Cancel", scale=0, min_width=120, interactive=False, elem_id="cancel")
            download = gr.DownloadButton("Save the replay", scale=0, min_width=190, visible=False, elem_id="save")
        status = gr.HTML(elem_id="race-status")
        replay = gr.HTML(elem_id="replay")

        def run(document, upload, length, new_tokens, temperature, request: gr.Request) -> Iterator[dict]:
            session = request.session_hash
            yield {
                status: _note("Waiting to start."),
                replay: "",
                download: gr.DownloadButton(visible=False),
            }
            finished = {cancel: gr.Button(interactive=False)}
            try:
                path = _chosen(document, upload)
                for moment in races.race(session, path, length, int(new_tokens), SamplingConfig(temperature)):
                    if isinstance(moment, Progress):
                        yield {status: _progress(moment), cancel: gr.Button(interactive=True)}
            except RaceCancelled:
                yield finished | {status: _note("The race was cancelled.")}
            except SpecExtendError as error:
                yield finished | {status: _error(error)}
            else:
                made = replay_page(moment)
                saved = gr.DownloadButton(value=str(races.save(made, session)), visible=True)
                yield finished | {status: "", replay: embedded(made), download: saved}

        def end(request: gr.Request) -> None:
            races.cancel(request.session_hash)

        options = {"show_progress": "hidden", "api_visibility": "private"}
        document.change(lambda choice: gr.File(visible=choice == UPLOAD), document, upload, **options)
        # races wait in `RaceQueue`, not in gradio's queue, and `run` alone writes what the page shows of them: were it
        # cancelled by gradio, a message on its way could arrive after the last word
        inputs = [document, upload, length, new_tokens, temperature]
        start.click(run, inputs, [status, replay, download, cancel], concurrency_limit=None, **options)
        cancel.click(end, queue=False, **options)
        page.unload(end)
    return page.queue(max_size=16)


def lengths(limit: int, device: str) -> list[int]:
    """Prompt lengths to choose from, in tokens: what the models hold and, on a CPU, is done while one waits."""
    longest = min(limit - NEW_TOKENS[1], CPU_LENGTH if device == "cpu" else limit)
    return [one for one in LENGTHS if one <= longest] or [max(1, longest)]


def _chosen(document: str, upload: str | None) -> Path | None:
    if document == UPLOAD and upload is None:
        raise ConfigError(f"no file was uploaded; add one ({', '.join(SUFFIXES)}) or choose the {BUILTIN}")
    return Path(upload) if document == UPLOAD else None


def _introduction(model: str, draft: str, device: str) -> str:
    return (
        '<div class="introduction"><h1>SpecExtend: a race</h1><p>The same prompt, decoded three times, one after the '
        "other: by the target model alone, by standard speculative decoding, and by SpecExtend. Then the three are "
        "replayed side by side, as fast as they were. The texts are the same, token for token; only the time differs."
        f'</p><p class="quiet">{html.escape(f"{model} with {draft} as draft, on {device}")}</p></div>'
    )


def _progress(progress: Progress) -> str:
    done, part = "reading", 0.0
    if progress.tokens is not None:
        done, part = f"{progress.tokens} of {progress.max_new_tokens} tokens", progress.tokens / progress.max_new_tokens
    return (
        f'<div class="line"><b>{html.escape(progress.label)}</b><span>{done}</span>'
        f'<div class="track"><i style="width: {100 * part:.0f}%"></i></div></div>'
    )


def _note(text: str) -> str:
    return f'<div class="line" role="status">{html.escape(text)}</div>'


def _error(error: SpecExtendError) -> str:
    return f'<div class="line error" role="alert">{html.escape(" ".join(str(error).split()))}</div>'


def _theme() -> gr.themes.Base:
    """Quiet, in the replay's colours and the system's own fonts: nothing is fetched from elsewhere."""
    theme = gr.themes.Base(
        neutral_hue="gray", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"], radius_size="md"
    )
    light = {"paper": "#ffffff", "panel": "#f7f8f9", "ink": "#1b1f24", "muted": "#57606a", "rule": "#d5dae0"}
    light |= {"idle": "#dfe3e8", "accent": "#00568f"}
    dark = {"paper": "#14171a", "panel": "#1b1f23", "ink": "#e4e7ea", "muted": "#9ea7b1", "rule": "#363c43"}
    dark |= {"idle": "#2c3238", "accent": "#7fc4f3"}
    parts = {
        "body_background_fill": "paper", "body_text_color": "ink", "block_background_fill": "panel",
        "block_border_color": "rule", "block_label_text_color": "muted", "block_title_text_color": "muted",
        "block_info_text_color": "muted", "border_color_primary": "rule", "input_background_fill": "paper",
        "input_border_color": "rule", "checkbox_label_background_fill": "paper",
        "checkbox_label_background_fill_hover": "idle", "checkbox_label_background_fill_selected": "idle",
        "checkbox_label_border_color": "rule", "checkbox_label_text_color": "ink",
        "checkbox_label_text_color_selected": "ink", "checkbox_background_color": "paper",
        "checkbox_background_color_selected": "accent", "checkbox_border_color": "muted", "slider_color": "accent",
        "button_primary_background_fill": "ink", "button_primary_background_fill_hover": "ink",
        "button_primary_text_color": "paper", "button_primary_text_color_hover": "paper",
        "button_secondary_background_fill": "paper", "button_secondary_background_fill_hover": "idle",
        "button_secondary_text_color": "ink", "button_secondary_border_color": "rule",
    }  # fmt: skip
    colours = {part: light[name] for part, name in parts.items()}
    colours |= {f"{part}_dark": dark[name] for part, name in parts.items()}
    lines = {f"{part}_border_width{mode}": "1px" for part in ("checkbox_label", "button") for mode in ("", "_dark")}
    return theme.set(**colours, **lines)

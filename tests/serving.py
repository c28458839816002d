"""What the tests of the server share: one in a thread, an engine with a script, a request."""

from __future__ import annotations

import json
import socket
import threading
import time

import httpx
import openai
import torch
import uvicorn

from specextend.decoding.output import Output
from specextend.serve import Settings, create_app
from specextend.serve.connections import server_config
from specextend.serve.logprobs import Recorder

MODEL = "bundled"
PROMPT = "The king said that the"


class Server:
    """An application behind uvicorn in a thread, on a port of its own."""

    def __init__(self, engine, **settings):
        settings = Settings(MODEL, **settings)
        self.app = create_app(engine, settings)
        self.worker = self.app.state.worker
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._server = uvicorn.Server(server_config(self.app, settings, log_level="critical"))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]})

    def __enter__(self) -> Server:
        self._thread.start()
        wait_for(lambda: self._server.started)
        return self

    def __exit__(self, *error: object) -> None:
        self._server.should_exit = True
        self._thread.join(20)
        assert not self._thread.is_alive()

    def client(self, key: str = "none", **options) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, **options)

    def async_client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def post(self, body: dict, path: str = "/v1/completions", **options) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=300, **options)

    def metric(self, name: str, **labels: str) -> float:
        return self.worker.metrics.registry.get_sample_value(f"specextend_{name}", labels) or 0.0

    def send(self, body: dict, path: str = "/v1/completions") -> socket.socket:
        """A request on a raw connection, to hang up on."""
        content = json.dumps(body).encode()
        head = ["Host: x", "Content-Type: application/json", f"Content-Length: {len(content)}", "", ""]
        connection = socket.create_connection(("127.0.0.1", self.port))
        connection.sendall("\r\n".join([f"POST {path} HTTP/1.1", *head]).encode() + content)
        return connection


def wait_for(condition, seconds: float = 20.0) -> float:
    """Seconds until `condition` held."""
    begin = time.perf_counter()
    while not condition():
        assert time.perf_counter() - begin < seconds, "it never happened"
        time.sleep(0.005)
    return time.perf_counter() - begin


class Scripted:
    """An engine whose answer is `octets`, so many bytes per round, each a token; every round takes `pace` seconds."""

    def __init__(self, models, octets: bytes = b"x" * 400, per_round: int = 3, pace: float = 0.0):
        self.models, self._octets, self._per_round, self._pace = models, octets, per_round, pace
        self.limit, self.rounds_run, self.fail = 1000, 0, None

    @property
    def cache_bytes(self) -> int:
        return 0

    def encode_chat(self, messages, **_):
        return torch.tensor([len(messages)])

    def generate(
        self,
        ids,
        max_new_tokens,
        *,
        sampling,
        stop,
        on_round,
        on_block,
        processors=(),
        prefix_scope=None,
        eos_token_ids=None,
    ):
        recorders = [one for one in processors if isinstance(one, Recorder)]

        def record(tokens: int) -> None:
            for recorder in recorders * tokens:
                recorder(ids[None], torch.zeros(1, 256))

        def decode(tokens):
            return bytes(tokens).decode(errors="replace")

        new_tokens = min(max_new_tokens, len(self._octets))
        output = Output(ids, new_tokens, frozenset(), tuple(stop), decode)
        output.prefill_seconds["target"] = 0.0
        if self.fail:
            raise self.fail
        record(1)
        output.begin(torch.tensor(self._octets[0]))
        on_round(output, None)
        while not output.finished:
            time.sleep(self._pace)
            self.rounds_run += 1
            at = output.new_tokens
            record(min(self._per_round, new_tokens - at))
            on_round(
                output, output.append(self._per_round - 1, list(self._octets[at : at + self._per_round]), {"v": 1})
            )
        return output.result(None)


def request(**changes) -> dict:
    return {"model": MODEL, "prompt": PROMPT, "max_tokens": 24, "temperature": 0} | changes

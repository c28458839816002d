"""`python -m specextend.serve --model_name bundled --port 8000`: an OpenAI-compatible server."""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
from collections.abc import Callable
from pathlib import Path

import uvicorn

from specextend.cli import flags
from specextend.cli.commands import load_pair
from specextend.engine import SpecExtend
from specextend.errors import ConfigError
from specextend.models.loading import LoadedModels
from specextend.serve.app import create_app
from specextend.serve.connections import server_config
from specextend.serve.keys import ONLY, read_keys
from specextend.serve.settings import Settings, check_host, hosts_of
from specextend.serve.worker import Worker

KEY_VARIABLE = "SPECEXTEND_API_KEY"


def main(
    add_model_flags: Callable[[argparse.ArgumentParser], None] = flags.add_model_flags,
    load: Callable[[argparse.Namespace], LoadedModels] = load_pair,
) -> None:
    """Serve until a signal comes.

    Args:
        add_model_flags, load: what the flags for the models are, and loading what they name.
    """
    args = parse_args(add_model_flags)
    keys = _keys(args)
    check_host(args.host, has_key=bool(keys))
    settings = Settings(
        model_id=args.served_model_name or args.model_name,
        api_keys=keys,
        max_waiting=args.max_waiting,
        max_prompt_tokens=args.max_prompt_tokens,
        max_new_tokens=args.max_new_tokens,
        default_max_tokens=args.default_max_tokens,
        max_body_bytes=args.max_body_bytes,
        grace_s=args.grace,
        allowed_hosts=hosts_of(args.host, args.allowed_hosts, has_key=bool(keys)),
        allowed_origins=tuple(args.allowed_origins),
        max_connections=args.max_connections,
        header_timeout_s=args.header_timeout,
        body_timeout_s=args.body_timeout,
        request_timeout_s=args.request_timeout,
    )
    listener = _listen(args.host, args.port)
    args.use_specextend = args.use_specextend or "method" not in args
    models = load(args)
    app = create_app(SpecExtend(models, flags.config_from(args, models), eager=args.eager), settings)
    host, port = listener.getsockname()[:2]
    print(f"{settings.model_id} on http://{f'[{host}]' if ':' in host else host}:{port}/v1", flush=True)
    Server(server_config(app, settings, log_level="warning"), app.state.worker, settings.grace_s).run(
        sockets=[listener]
    )


class Server(uvicorn.Server):
    """Stops in two steps: refuse new requests and finish the one being decoded, then close."""

    def __init__(self, config: uvicorn.Config, worker: Worker, grace_s: float):
        super().__init__(config)
        self._worker, self._grace_s = worker, grace_s

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    def handle_exit(self, sig: int, frame) -> None:
        """First signal: drain; second: close at once."""
        if self._worker.stopping:
            self.should_exit = True
            return
        self._loop.call_soon_threadsafe(lambda: self._loop.create_task(self._stop()))

    async def _stop(self) -> None:
        await asyncio.to_thread(self._worker.drain)
        deadline = self._loop.time() + self._grace_s
        while self._worker.busy and self._loop.time() < deadline and not self.should_exit:
            await asyncio.sleep(0.05)
        await asyncio.to_thread(self._worker.stop)  # a response that is not finished ends with an error
        self.should_exit = True


def parse_args(add_model_flags: Callable[[argparse.ArgumentParser], None]) -> argparse.Namespace:
    parser = flags.parser(__doc__)
    add_model_flags(parser)
    flags.add_method_flags(parser)
    server = parser.add_argument_group("server")
    server.add_argument("--host", default="127.0.0.1", help="other addresses than this machine's own need a key")
    server.add_argument("--port", type=int, default=8000, help="0 takes any that is free")
    server.add_argument("--served_model_name", help="the model's name towards clients; else --model_name")
    server.add_argument("--api_key", help=f"clients must send it; better --api_key_file or {KEY_VARIABLE}")
    server.add_argument(
        "--api_key_file", type=Path, help="file with the keys, one per line, KEY or NAME: KEY; keys share no prefixes"
    )
    server.add_argument("--max_waiting", type=int, default=64, help="requests in the queue; more get 429")
    server.add_argument("--max_prompt_tokens", type=int, default=0, help="per request; 0: what the model holds")
    server.add_argument(
        "--max_new_tokens", type=int, default=0, help="per request, longer ones are cut; 0: what the model holds"
    )
    server.add_argument(
        "--default_max_tokens", type=int, default=1024, help="new tokens of a chat whose request gives no limit"
    )
    server.add_argument("--max_body_bytes", type=int, default=4 * 2**20, help="of a request; more get 413")
    server.add_argument("--grace", type=float, default=30.0, help="seconds a stop waits for the request being decoded")
    server.add_argument(
        "--allowed_hosts",
        nargs="+",
        default=[],
        metavar="NAME",
        help="Host headers served; else, without a key, this machine's own names; * takes any",
    )
    server.add_argument(
        "--allowed_origins", nargs="+", default=[], metavar="URL", help="web pages that may ask (CORS); * takes any"
    )
    server.add_argument("--max_connections", type=int, default=512, help="open at once; idle ones make room")
    server.add_argument("--header_timeout", type=float, default=10.0, help="seconds for a request's header")
    server.add_argument("--body_timeout", type=float, default=60.0, help="seconds for a request's body")
    server.add_argument(
        "--request_timeout", type=float, default=0.0, help="seconds for an answer, waiting included; 0: no limit"
    )
    return parser.parse_args()


def _keys(args: argparse.Namespace) -> dict[str, str]:
    """Name -> API key, by whichever way they are given; empty without any."""
    ways = {
        "--api_key": args.api_key, "--api_key_file": args.api_key_file, KEY_VARIABLE: os.environ.get(KEY_VARIABLE)
    }  # fmt: skip
    given = {way: value for way, value in ways.items() if value is not None}
    if len(given) > 1:
        raise ConfigError(f"the API key is given by {' and '.join(given)}; give it once")
    value = next(iter(given.values()), None)
    if isinstance(value, Path):
        return read_keys(value)
    return {} if value is None else {ONLY: value}


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket, bound before the models are loaded; ConfigError where it cannot be."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"{host}:{port} cannot be listened on ({error}); choose another --port or --host") from error


if __name__ == "__main__":
    flags.run(main)

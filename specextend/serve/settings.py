"""Limits and identity of a server, checked once."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from specextend.errors import ConfigError
from specextend.serve.keys import ONLY, check_keys


@dataclass(frozen=True)
class Settings:
    """Limits and identity of a server.

    Args:
        model_id: the model's name towards clients.
        api_key: what clients must send as bearer token; None, without `api_keys`: nobody is asked, and only this
            machine is served.
        api_keys: name -> key of several clients, who share no prefixes.
        max_waiting: requests that may wait for the one being decoded; more are refused with 429.
        max_prompt_tokens: a longer prompt is refused; 0: as many as the model holds.
        max_new_tokens: a longer response is cut there; 0: as many as the model holds.
        default_max_tokens: new tokens of a chat response where the request gives no limit.
        max_body_bytes: of a request.
        grace_s: seconds a stop waits for the request being decoded.
        allowed_hosts: names that a request's Host header may have; none given: any.
        allowed_origins: web pages that may ask from a browser, as "https://example.org"; "*": all.
        max_connections: open at once, idle ones included.
        header_timeout_s, body_timeout_s: for a request to arrive.
        request_timeout_s: for the answer, waiting included; 0: it may take as long as it does.
    """

    model_id: str
    api_key: str | None = field(default=None, repr=False)
    api_keys: Mapping[str, str] = field(default_factory=dict, repr=False)
    max_waiting: int = 64
    max_prompt_tokens: int = 0
    max_new_tokens: int = 0
    default_max_tokens: int = 1024
    max_body_bytes: int = 4 * 2**20
    grace_s: float = 30.0
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    max_connections: int = 512
    header_timeout_s: float = 10.0
    body_timeout_s: float = 60.0
    request_timeout_s: float = 0.0

    def __post_init__(self) -> None:
        least = {
            "max_waiting": 1, "max_prompt_tokens": 0, "max_new_tokens": 0, "default_max_tokens": 1, "max_body_bytes": 1,
            "grace_s": 0, "max_connections": 1, "header_timeout_s": 0.01, "body_timeout_s": 0.01,
            "request_timeout_s": 0,
        }  # fmt: skip
        for name, minimum in least.items():
            if not getattr(self, name) >= minimum:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least {minimum}")
        if self.api_key is not None and self.api_keys:
            raise ConfigError("api_key and api_keys are both given; give one of them")
        check_keys(self.keys)

    @property
    def keys(self) -> Mapping[str, str]:
        """Name -> key of all clients; empty where nobody is asked for one."""
        return self.api_keys if self.api_key is None else {ONLY: self.api_key}


def check_host(host: str, *, has_key: bool) -> None:
    """ConfigError for an address that others reach, where no key keeps them out."""
    if not has_key and not _is_loopback(host):
        raise ConfigError(
            f"host is {host!r}, which other machines may reach, and no API key is set; give --api_key_file (or set "
            "SPECEXTEND_API_KEY), or keep --host 127.0.0.1"
        )


def hosts_of(host: str, given: Sequence[str] = (), *, has_key: bool) -> tuple[str, ...]:
    """Names a server at `host` answers to: those given, else its own; with a key any."""
    if given:
        return () if "*" in given else tuple(name.lower() for name in given)
    return () if has_key else ("localhost", "127.0.0.1", "::1", host.lower())


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"

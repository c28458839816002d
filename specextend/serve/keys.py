"""API keys: who may ask, and under which name. What one key's prompts taught is never known to another's."""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from pathlib import Path

from specextend.errors import ConfigError, InputError

ONLY = "default"  # name of a key that is given alone


def read_keys(path: Path) -> dict[str, str]:
    """Name -> key of a file with one key per line, "KEY" or "NAME: KEY"; empty lines and # comments do not count.

    A key without a name is called by its place among the keys, "key 1", "key 2", ...
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"api_key_file {path} cannot be read ({error}); it should hold one key per line") from error
    keys: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        name, colon, key = (part.strip() for part in text.rpartition(": "))
        name = name if colon else f"key {len(keys) + 1}"
        if not name or " " in key:
            raise InputError(f"api_key_file {path}, line {number} is neither KEY nor NAME: KEY")
        if name in keys:
            raise InputError(f"api_key_file {path}, line {number}: the name {name} is given twice")
        keys[name] = key
    if not keys:
        raise InputError(f"api_key_file {path} holds no key; it should hold one key per line")
    return keys


def check_keys(keys: Mapping[str, str]) -> None:
    """ConfigError for a key that no header carries, or that two names share."""
    for name, key in keys.items():
        what = "the API key" if name == ONLY else f"the API key of {name}"
        if not (key.isascii() and key.isprintable() and key):
            raise ConfigError(f"{what} is empty or has characters no HTTP header carries; use printable ASCII")
    if len(set(keys.values())) < len(keys):
        raise ConfigError("two names have the same API key; give each client its own")


class Keyring:
    """Knows a key's name in a time that tells nothing of the keys."""

    def __init__(self, keys: Mapping[str, str]):
        self._keys = {name: key.encode() for name, key in keys.items()}

    def __bool__(self) -> bool:
        return bool(self._keys)

    def name_of(self, given: str) -> str | None:
        """The name of the key in an Authorization header's value, None where it holds none."""
        kind, _, key = given.partition(" ")
        # all are compared, whatever the first word is and wherever one fits
        fits = [hmac.compare_digest(key.strip().encode("latin-1", "replace"), known) for known in self._keys.values()]
        names = [name for name, fit in zip(self._keys, fits, strict=True) if fit]
        return names[0] if names and kind.lower() == "bearer" else None

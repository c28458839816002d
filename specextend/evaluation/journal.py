"""Records on disk: a resumable JSON Lines journal, and JSON files written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from specextend.errors import ConfigError, InputError
from specextend.evaluation.files import append_lines, set_aside, write_whole
from specextend.evaluation.records import SampleRecord


class Record(Protocol):
    """What a journal holds lines of: `SampleRecord`, `Panel`."""

    @property
    def key(self) -> tuple: ...

    @property
    def name(self) -> str: ...

    def to_json(self) -> dict[str, Any]: ...


T = TypeVar("T")
R = TypeVar("R", bound=Record)
# may change between the sessions that fill one journal; threads stand in every record
RENAMED = {"setting.config.draft": "setting.config.drafting"}  # in old records
NOT_COMPARED = ("environment.commit", "environment.date", "environment.threads")


class Journal(Generic[R]):
    """Records on disk, append-only: what was appended survives a kill, and the next process goes on from there.

    Args:
        path: the JSON Lines file; opened if it is there, begun with `manifest` if not.
        manifest: `{"setting": ..., "environment": ...}`. An existing journal must have been begun with the same one,
            commit and date aside; ConfigError otherwise.
        fresh: read nothing and start over: with the first record what is there moves aside, and so does `derived`.
        derived: the file that is made of the journal.
        read: makes a record of a line's content.
    """

    def __init__(
        self, path: Path, manifest: dict[str, Any], *, fresh: bool = False, derived: Path | None = None,
        read: Callable[[dict[str, Any]], R] = SampleRecord.from_json,
    ) -> None:  # fmt: skip
        self.path = path
        self.manifest = manifest
        self.records: list[R] = []
        self._from_json = read
        self._old = [one for one in (path, derived) if one is not None] if fresh else []
        if not fresh:
            self._read()

    def _read(self) -> None:
        """Take over what is there."""
        lines = _complete_lines(self.path)
        if len(lines) < 2:
            return
        measured = _parse(self.path, 1, lines[0], dict)
        _require_same(self.path, measured, self.manifest)
        self.manifest = measured
        for number, line in enumerate(lines[1:], start=2):
            record = _parse(self.path, number, line, self._from_json)
            if self.find(record.key) is not None:
                raise InputError(
                    f"{self.path}:{number} repeats a record ({record.name}); remove that line, "
                    "or pass --fresh to start over"
                )
            self.records.append(record)

    def find(self, key: tuple) -> R | None:
        """The record of a key, as (bucket, sample, run), if it was measured already."""
        return next((record for record in self.records if record.key == key), None)

    def append(self, record: R) -> None:
        """Write a record through to the disk; the first one brings the manifest with it."""
        assert self.find(record.key) is None, f"{record.key} is in {self.path} already"
        for old in self._old:
            set_aside(old)
        entries = [record.to_json()] if self.records else [self.manifest, record.to_json()]
        if not self.records:
            self.path.unlink(missing_ok=True)  # it holds a manifest at most
        append_lines(self.path, [json.dumps(entry, ensure_ascii=False) for entry in entries])
        self.records.append(record)
        self._old = []


def _complete_lines(path: Path) -> list[bytes]:
    """Lines of a journal, after cutting off a last one that a killed process left unfinished."""
    content = path.read_bytes() if path.exists() else b""
    if content and not content.startswith(b'{"setting":'):
        raise InputError(f"{path} does not begin with a manifest; choose another --output_file or remove that file")
    complete = content.rfind(b"\n") + 1
    if complete < len(content):
        os.truncate(path, complete)
    return content[:complete].splitlines()


def _parse(path: Path, number: int, line: bytes, read: Callable[[dict[str, Any]], T]) -> T:
    try:
        return read(json.loads(line))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path}:{number} is damaged ({error}); pass --fresh to start over") from error


def _require_same(path: Path, measured: dict[str, Any], wanted: dict[str, Any]) -> None:
    # Through JSON, so that tuples and lists, and keys of either kind, compare equal.
    old, new = (
        {RENAMED.get(name, name): value for name, value in _flatten(json.loads(json.dumps(manifest)))}
        for manifest in (measured, wanted)
    )
    compared = [name for name in {**old, **new} if not name.startswith(NOT_COMPARED)]
    different = [name for name in compared if old.get(name) != new.get(name)]
    if different:
        shown = "; ".join(f"{name} was {old.get(name)!r}, now {new.get(name)!r}" for name in different)
        raise ConfigError(
            f"{path} holds records of another setting: {shown}. Pass --fresh to start over or another --output_file"
        )


def _flatten(value: Any, name: str = "") -> Iterable[tuple[str, Any]]:
    """Leaves of nested dicts with dotted names: `setting.config.tree.nodes`."""
    if not isinstance(value, dict):
        yield name, value
        return
    for key, inner in value.items():
        yield from _flatten(inner, f"{name}.{key}" if name else key)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write the whole file or nothing: a reader, or a kill, never meets half of it."""
    write_whole(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

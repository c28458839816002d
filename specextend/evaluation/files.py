"""Output files: checked before any work, locked while it lasts, written whole or not at all, never deleted.

Whatever goes wrong with a path is one `ConfigError` that names it.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from specextend.errors import ConfigError

PROBE_BYTES = 1 << 16  # room a disk must have before anything is measured
TRIES, TRY_S = 5, 0.1  # for a lock
LONGEST_SUFFIX = ".lock.tmp"  # of the files that may come to lie beside an output


def check_output(path: Path) -> None:
    """ConfigError unless `path` can be written; leaves nothing behind, no folder either."""
    with _named(path):
        if path.is_dir():
            raise ConfigError(f"{path} is a folder; give the name of a file in it")
        if path.exists() and not path.is_file():
            raise ConfigError(f"{path} is a device or a pipe; give the name of a file")
        made = _make_folders(path.parent)
        try:
            _probe(path)
        finally:
            _remove(made)


def write_whole(path: Path, content: str) -> None:
    """Write the whole file or nothing: a reader, a kill or a full disk never leaves half of it."""
    with _named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.tmp")
        try:
            with temporary.open("w", encoding="utf-8") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


def append_lines(path: Path, lines: list[str]) -> None:
    """Append lines, each without its end, through to the disk; of a failed write nothing stays."""
    with _named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            size = file.tell()
            try:
                file.write("".join(f"{line}\n" for line in lines).encode())
                file.flush()
                os.fsync(file.fileno())
            except OSError:
                os.truncate(path, size)
                raise


def set_aside(path: Path) -> Path | None:
    """Rename `path` to its name with .bak (.bak2, .bak3, ...); the new name, None where there is no such file."""
    if not path.exists():
        return None
    with _named(path):
        number, aside = 1, path.with_name(f"{path.name}.bak")
        while aside.exists():
            number += 1
            aside = path.with_name(f"{path.name}.bak{number}")
        path.rename(aside)
    return aside


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep `path` to this process; ConfigError at once where another one has it.

    The lock is the system's, on `<path>.lock`, and ends with the process whatever ends that.
    """
    lock = path.with_name(f"{path.name}.lock")
    with _named(path):
        made = _make_folders(path.parent)
        descriptor = _take(lock, path)
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(descriptor)
        _remove(made)


def _take(lock: Path, path: Path) -> int:
    """An open descriptor that holds the lock; waits for half a second, since a check holds it for a moment."""
    for _ in range(TRIES):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
        with suppress(BlockingIOError, FileNotFoundError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), os.stat(lock)):  # else its holder removed the file meanwhile
                return descriptor
        os.close(descriptor)
        time.sleep(TRY_S)
    raise ConfigError(
        f"{path} is being written by another evaluation; wait for it to end, or give another --output_file"
    )


def _probe(path: Path) -> None:
    """Write as much as a small result takes under the longest name there will be, and remove it."""
    if path.exists():
        path.open("ab").close()
    longest = path.with_name(path.name + LONGEST_SUFFIX)
    os.close(os.open(longest, os.O_WRONLY | os.O_CREAT, 0o644))
    longest.unlink(missing_ok=True)
    with tempfile.TemporaryFile(dir=path.parent) as file:
        file.write(b"0" * PROBE_BYTES)
        file.flush()
        os.fsync(file.fileno())


def _make_folders(folder: Path) -> list[Path]:
    """Make `folder`; those that were missing, the outermost first."""
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    made: list[Path] = []
    try:
        for one in reversed(missing):
            one.mkdir(exist_ok=True)
            made.append(one)
    except OSError:
        _remove(made)
        raise
    return made


def _remove(folders: list[Path]) -> None:
    """Remove folders, the innermost last in the list, unless something lies in them by now."""
    with suppress(OSError):
        for folder in reversed(folders):
            folder.rmdir()


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Any failure of the system is the caller's path's."""
    try:
        yield
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"{path} cannot be written ({reason}); give another --output_file") from error
